"""Sections of ``docs/numbers.md`` on the server: load, conversations, guidellm, clients, soak,
fuzzing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyramidinfer.lab.bench.serve_views import milliseconds, rate
from pyramidinfer.lab.numbers_studies import command_block, origin, table

__all__ = ["SECTIONS"]

Result = dict[str, Any]


def _model(result: Result) -> str:
    name = result["model"]
    return "the shipped model" if name == "demo-model" else f"`{name}`"


def _latency(values: dict[str, float] | None) -> str:
    return " / ".join(milliseconds(values, "p50", "p99"))


def load(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    memory = "" if c["url"] else f", each with {c['kv_memory']} of KV memory"
    lines = [
        "## A server under load\n",
        origin(entry),
        f"On {_model(result)} over HTTP; {c['requests']} requests of {c['prompt_len']:,} prompt "
        f"tokens and {c['output_len']} generated ones at each rate; one server for each policy"
        f"{memory}, keep {c['keep']:g}. Policies take turns at each rate, with the same prompts "
        f"and the same (Poisson) arrivals; `inf` sends all at once.\n",
        command_block(entry),
        "**How to read it.** "
        "Latencies are p50 / p99 and count from the time when a request was due. TTFT is the time "
        "to the first token, ITL the inter-token latency. `good` requests had their first token "
        f"within {c['slo_ttft']:g} s and further tokens within {1e3 * c['slo_itl']:g} ms each "
        "(mean of a request). `times` compares output tokens/s with the first policy; as long as a "
        "server keeps up, the arrival rate determines it. `at once` is the largest number of "
        "requests that ran at the same time. Client and server share the machine.\n",
    ]
    head = [
        "requests/s",
        "policy",
        "done",
        "429",
        "failed",
        "TTFT, ms",
        "ITL, ms",
        "output tokens/s",
        "times",
        "done/s",
        "good/s",
        "at once",
    ]
    lines += table(
        head,
        [
            [
                rate(row),
                f"`{row['policy']}`",
                str(row["completed"]),
                str(row["refused"]),
                str(row["failed"]),
                _latency(row["first_token_seconds"]),
                _latency(row["inter_token_seconds"]),
                f"{row['output_tokens_per_second']:.0f}",
                _times(row["throughput_against_first"]),
                f"{row['requests_per_second']:.2f}",
                f"{row['goodput']:.2f}",
                "–" if row["peak_running"] is None else f"{row['peak_running']:.0f}",
            ]
            for row in result["rows"]
        ],
    )
    most = [
        f"`{row['policy']}` {row['peak_running']:.0f}"
        + (f" ({row['against_first']:.2f} times)" if row["against_first"] else "")
        for row in result["concurrency"]
    ]
    lines.append(f"\nMost requests running at once, over all rates: {', '.join(most)}.")
    return "\n".join([*lines, "\n![a server under load](images/bench_serve.png)\n"])


def _times(values: dict[str, float] | None) -> str:
    if values is None:
        return "–"
    low, high = values["min"], values["max"]
    return f"{values['median']:.2f}" + ("" if low == high else f" [{low:.2f}, {high:.2f}]")


def conversations(entry: Result, name: str = "turns", title: str = "Conversations") -> str:
    c, result = entry["configuration"], entry["result"]
    lines = [
        f"## {title}\n",
        origin(entry),
        f"On {_model(result)} over HTTP, one at a time; {c['conversations']} conversations of "
        f"{c['turns']} turns: {c['prompt_len']:,} tokens first, {c['turn_len']} new ones per turn, "
        f"{c['output_len']} generated; keep {c['keep']:g}, {c['kv_memory']} of KV memory.\n",
        command_block(entry),
        "**How to read it.** "
        "Times are medians of the milliseconds to the first token. `anew` computes the whole "
        "prompt (`reuse: false`); `reuse` continues from the cache of the turn before. Both "
        "alternate turn by turn on the same server; `times faster` is taken within a conversation, "
        "with the range in brackets. `kept` is the number of entries per layer at the end of the "
        "turn.\n",
    ]
    head = [
        "policy",
        "turn",
        "prompt",
        "reused",
        "tokens cached",
        "anew, ms",
        "reuse, ms",
        "times faster",
        "kept anew",
        "kept with reuse",
    ]
    lines += table(
        head,
        [
            [
                f"`{row['policy']}`",
                str(row["turn"]),
                f"{row['prompt_tokens']:,}",
                f"{row['reused']} of {row['conversations']}",
                f"{row['cached_tokens']['reuse']['median']:,.0f}",
                *(
                    f"{1e3 * row['first_token_seconds'][mode]['median']:.1f}"
                    for mode in ("anew", "reuse")
                ),
                _times(row["times_faster"]),
                *(f"{row['kv_tokens_kept'][mode]['median']:,.0f}" for mode in ("anew", "reuse")),
            ]
            for row in result["rows"]
        ],
    )
    return "\n".join([*lines, f"\n![{title.lower()}](images/bench_{name}.png)\n"])


def guidellm(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    lines = [
        "## The same server under guidellm\n",
        origin(entry),
        f"{result['version'].replace('==', ' ')}, an independent load generator, on "
        f"{c.get('model') or 'the shipped model'}: {c['prompt_len']:,} prompt tokens, "
        f"{c['output_len']} generated, Poisson arrivals "
        f"for {c['seconds']:g} seconds at each rate; {c['kv_memory']} of KV memory, keep "
        f"{c['keep']:g}; one server after the other.\n",
        "```bash\nmake bench-guidellm\n```\n",
        "**How to read it.** "
        "The figures are guidellm's own and cover the requests that were answered in time; "
        "`cut off` are requests that were still running at the end. Latencies are p50 / p99 over "
        "requests.\n",
    ]
    head = [
        "requests/s",
        "policy",
        "done",
        "errors",
        "cut off",
        "TTFT, ms",
        "ITL, ms",
        "output tokens/s",
        "done/s",
        "at once, mean",
    ]
    lines += table(
        head,
        [
            [
                f"{row['rate']:g}",
                f"`{row['policy']}`",
                str(row["completed"]),
                str(row["errors"]),
                str(row["cut_off"]),
                *(
                    f"{row[key]['p50']:,.{digits}f} / {row[key]['p99']:,.{digits}f}"
                    for key, digits in (("first_token_ms", 0), ("inter_token_ms", 1))
                ),
                f"{row['output_tokens_per_second']:.0f}",
                f"{row['requests_per_second']:.2f}",
                f"{row['concurrency']:.1f}",
            ]
            for row in sorted(result["rows"], key=lambda row: row["rate"])
        ],
    )
    words = sorted({word for row in result["rows"] for word in row["error_words"]})
    lines += [f"\nErrors: {'; '.join(words)}."] if words else []
    return "\n".join(lines) + "\n"


def clients(entry: Result) -> str:
    rows = [
        [each["client"], each["version"], name, "yes" if told["passed"] else f"no: {told['said']}"]
        for each in entry["result"]["clients"]
        for name, told in each["checks"].items()
    ]
    lines = [
        "## Clients\n",
        origin(entry),
        "Agent frameworks, chat front ends and a proxy with `pyramidinfer serve --model smollm2`, "
        "each set up as its documentation describes, with only the address and the model's name "
        "changed.\n",
        "```bash\nmake check-clients\n```\n",
    ]
    return "\n".join(lines + table(["client", "version", "what it did", "works"], rows)) + "\n"


def soak(entry: Result) -> str:
    c, result = entry["configuration"], entry["result"]
    outcomes, after, memory = result["outcomes"], result["after"], result["memory"]
    statuses = ", ".join(
        f"{n:,} with {status}" for status, n in sorted(result["statuses"].items()) if status != "0"
    )
    lines = [
        "## Soak\n",
        origin(entry),
        f"{c['clients']} clients at once for {c['seconds']:g} seconds on {c['kv_memory']} of KV "
        f"memory and a queue of {c['max_waiting']}; mixed policies, budgets, lengths and options; "
        "clients disconnect from a third of the requests at a random moment.\n",
        command_block(entry),
        "| measure | figure |",
        "|---|---|",
        f"| requests | {result['requests']:,}: {outcomes.get('completed', 0):,} answered, "
        f"{outcomes.get('left', 0):,} disconnected, {outcomes.get('refused', 0):,} refused (429), "
        f"{outcomes.get('failed', 0):,} failed |",
        f"| statuses | {statuses} |",
        f"| tokens streamed | {result['streamed_tokens']:,} |",
        f"| most requests running | {after.get('pyramidinfer:peak_requests_running', 0):.0f} |",
        f"| caches reused by a next turn | {after.get('pyramidinfer:reuse_hits_total', 0):,.0f} |",
        f"| pages in use when idle | {after['pyramidinfer:pool_pages_in_use']:.0f}, held by "
        f"conversations that may continue: {after['pyramidinfer:pool_pages_reusable']:.0f} |",
        f"| consistency checks of the pool | {after['pyramidinfer:pool_checks_total']:.0f}, "
        f"failed: {after['pyramidinfer:pool_check_failures_total']:.0f} |",
    ]
    if memory is not None:
        lines.append(
            f"| resident memory | {memory['warm_bytes'] / 2**20:.0f} MiB after warm-up, "
            f"{memory['end_bytes'] / 2**20:.0f} MiB at the end ({memory['growth']:+.1%}) |"
        )
    lines.append(f"| SIGTERM with requests in progress | exit code {result['exit_code']} |")
    wrong = "; ".join(result["breaches"])
    lines.append(f"\n{'Failed: ' + wrong if wrong else 'All checks passed'}.\n")
    return "\n".join(lines)


def fuzz(entry: Result) -> str:
    result = entry["result"]
    lines = [
        "## Fuzzing\n",
        origin(entry),
        f"{result['cases']:,} requests in {result['seconds']:.0f} seconds, generated from the "
        "server's OpenAPI document (schemathesis), from known field names with arbitrary values, "
        f"and from bodies with changed bytes. **{result['failures']:,} failures**; a failure is no "
        "answer, a status of 500 or more, or an error that does not have OpenAI's format.\n",
        command_block(entry),
    ]
    by_operation = result.get("by_operation", {})
    if by_operation:
        lines += table(
            ["operation", "requests", "statuses"],
            [
                [f"`{name}`", f"{each['cases']:,}", _statuses(each["statuses"])]
                for name, each in by_operation.items()
            ],
        )
    return "\n".join(lines) + "\n"


def _statuses(counts: dict[str, int]) -> str:
    return ", ".join(f"{status}: {count:,}" for status, count in sorted(counts.items()))


SECTIONS: dict[str, Callable[[Result], str]] = {
    "bench_serve": load,
    "bench_turns": conversations,
    "bench_turns_long": partial(conversations, name="turns_long", title="Long conversations"),
    "guidellm": guidellm,
    "clients": clients,
    "soak": soak,
    "fuzz": fuzz,
}
