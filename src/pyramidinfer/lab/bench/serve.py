"""``bench serve``: a server under load over HTTP, request rate by request rate.

Every policy has its own server with the same ``kv_memory``; at each rate they take turns with the
same prompts and the same arrivals, so that ratios compare runs that are close in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pyramidinfer.lab.bench.load import Body, Record, arrival_times, client, httpx, offer
from pyramidinfer.lab.bench.serve_plan import AS_IT_IS, ServePlan, ServerSetting, rate_name
from pyramidinfer.lab.bench.served import (
    PEAK,
    PROGRAM,
    RUNNING,
    Remote,
    parse_metrics,
    serving,
)
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.bench.timing import ratios
from pyramidinfer.lab.documents import document
from pyramidinfer.lab.record import write_result

__all__ = [
    "check_length",
    "check_tokens",
    "chosen_ids",
    "figures",
    "meets",
    "percentiles",
    "run_serve",
    "servers_for",
]

WATCH_SECONDS = 0.25
FAREWELL_SECONDS = 120.0  # for requests that still run after a pass
Prompts = list[list[int]]


def run_serve(
    plan: ServePlan, out: Path, api_key: str | None = None, program: Sequence[str] = PROGRAM
) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    passes: dict[tuple[str, float], list[_Pass]] = {}
    load = psutil.getloadavg()[0]
    rounds = [(rate, repeat) for rate in plan.rates for repeat in range(plan.repeats)]
    with servers_for(plan.setting, api_key, program) as servers:
        model = next(iter(servers.values())).model()
        check_length(model, plan.prompt_len, plan.output_len)
        ids = chosen_ids(next(iter(servers.values())), plan.setting.token_ids)
        with progress("serve", (len(rounds) + 1) * len(servers)) as done:
            for spec, server in servers.items():
                if plan.warmup:
                    prompts = _prompts(plan, ids, (0,), plan.warmup)
                    _run_pass(plan, server, spec, prompts, [0.0] * plan.warmup)
                done(f"{spec}, warm")
            for rate, repeat in rounds:
                key = (1, plan.rates.index(rate), repeat)
                prompts = _prompts(plan, ids, key, plan.requests)
                due = arrival_times(rate, plan.requests, plan.setting.seed + repeat)
                for spec, server in servers.items():
                    run = _run_pass(plan, server, spec, prompts, due)
                    passes.setdefault((spec, rate), []).append(run)
                    done(f"{spec}, {rate:g} requests/s")
    result = {"model": model["id"], "load_before": load, "rows": _rows(plan, passes, list(servers))}
    result["concurrency"] = _concurrency(result["rows"])
    write_result(out, plan.configuration, result)
    return result


@contextlib.contextmanager
def servers_for(
    setting: ServerSetting, api_key: str | None = None, program: Sequence[str] = PROGRAM
) -> Iterator[dict[str, Remote]]:
    """A server for every policy: each is started here, or all use the running one."""
    if setting.url is not None:
        remote = Remote(setting.url, api_key)
        yield dict.fromkeys(setting.policies or (AS_IT_IS,), remote)
        return
    commands = {spec: setting.words(spec) for spec in setting.policies}
    with serving(commands, setting.threads, program) as servers:
        yield {**servers}


def check_length(model: dict[str, Any], prompt_len: int, output_len: int) -> None:
    """``ValueError`` if the served model has too few positions."""
    longest = model.get("max_model_len")
    if longest is not None and prompt_len + output_len > longest:
        raise ValueError(
            f"{prompt_len} prompt tokens and {output_len} generated ones exceed the served "
            f"model's {longest} positions"
        )


def chosen_ids(server: Remote, given: str | None) -> list[int]:
    """Token ids that prompts are drawn from; ``given`` is ``LOW-HIGH``."""
    if given is not None:
        low, _, high = given.partition("-")
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
            raise ValueError(f"--token-ids {given!r}: write LOW-HIGH, as in 3-1000")
        return list(range(int(low), int(high) + 1))
    text = document(random.Random(0), 2000, 10).text
    try:
        answer = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        answer.raise_for_status()
        return sorted(set(answer.json()["tokens"]))
    except (httpx.HTTPError, LookupError, ValueError) as error:
        raise ValueError(
            f"{server.url}/tokenize does not report the model's token ids ({error}); give them: "
            f"--token-ids LOW-HIGH"
        ) from None


def _prompts(plan: ServePlan, ids: list[int], key: tuple[int, ...], count: int) -> Prompts:
    draw = np.random.default_rng([plan.setting.seed, *key])
    found: Prompts = draw.choice(ids, (count, plan.prompt_len)).tolist()
    return found


# --- one pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    records: list[Record]
    peak_running: float | None

    @property
    def seconds(self) -> float:
        """Seconds from the due time of the first request to the end of the last."""
        return max(each.ended for each in self.records)


def _run_pass(
    plan: ServePlan, server: Remote, spec: str, prompts: Prompts, due: list[float]
) -> _Pass:
    setting = plan.setting
    body: Body = {
        "max_tokens": plan.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    if compression := setting.compression(spec):
        body["compression"] = compression
    bodies = [{**body, "prompt": prompt} for prompt in prompts]
    before = server.idle(FAREWELL_SECONDS).get(PEAK)
    records, seen = asyncio.run(_under_watch(server, bodies, due, setting.timeout))
    for record in records:
        check_tokens(record, plan.output_len)
    after = server.metrics().get(PEAK)
    if after is not None and after != before:  # the server's count is exact, this one is sampled
        seen = after
    return _Pass(records, seen)


async def _under_watch(
    server: Remote, bodies: list[Body], due: list[float], timeout: float
) -> tuple[list[Record], float | None]:
    """Records, and the maximum number of requests observed running at once."""
    seen: list[float] = []

    async def watch(http: httpx.AsyncClient) -> None:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                now = parse_metrics((await http.get("/metrics")).text)
                seen.extend([now[RUNNING]] if RUNNING in now else [])
            await asyncio.sleep(WATCH_SECONDS)

    async with client(server.url, server.api_key, timeout) as http:
        watcher = asyncio.create_task(watch(http))
        records = await offer(http, "/v1/completions", bodies, due)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
    return records, max(seen, default=None)


def check_tokens(record: Record, output_len: int) -> None:
    """An answer whose length differs from the requested one is a failure."""
    if record.outcome == "completed" and record.output_tokens != output_len:
        record.error = f"generated {record.output_tokens} tokens instead of {output_len}"


# --- figures --------------------------------------------------------------------------------------


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p99 and maximum; None without measurements."""
    if not values:
        return None
    found = {f"p{at}": float(np.percentile(values, at)) for at in (50, 99)}
    return {**found, "max": max(values)}


def meets(record: Record, slo_ttft: float, slo_itl: float) -> bool:
    """Whether a request was answered in time: its first token, and its mean time between
    tokens."""
    if record.outcome != "completed" or not record.arrivals:
        return False
    first, last = record.arrivals[0], record.arrivals[-1]
    between = (last - first) / max(1, len(record.arrivals) - 1)
    return first - record.due <= slo_ttft and between <= slo_itl


def figures(
    records: Sequence[Record], seconds: float, slo_ttft: float, slo_itl: float
) -> dict[str, Any]:
    """The figures of one pass, or of several passes that took ``seconds`` together."""
    whole = [each for each in records if each.outcome == "completed"]
    counts = Counter(each.outcome for each in records)
    good = sum(meets(each, slo_ttft, slo_itl) for each in records)
    reasons = Counter(each.why for each in records if each.outcome == "failed")
    return {
        "requests": len(records),
        "seconds": seconds,
        **{name: counts[name] for name in ("completed", "refused", "failed")},
        "failures": dict(reasons.most_common(5)),
        "first_token_seconds": percentiles([r.arrivals[0] - r.due for r in whole if r.arrivals]),
        "inter_token_seconds": percentiles([b - a for r in whole for a, b in pairwise(r.arrivals)]),
        "request_seconds": percentiles([each.ended - each.due for each in whole]),
        "output_tokens_per_second": sum(each.output_tokens for each in whole) / seconds,
        "requests_per_second": len(whole) / seconds,
        "good": good,
        "goodput": good / seconds,
        "client_late_seconds": percentiles([each.sent - each.due for each in records]),
    }


def _rows(
    plan: ServePlan, passes: dict[tuple[str, float], list[_Pass]], specs: list[str]
) -> list[dict[str, Any]]:
    rows = []
    for rate in plan.rates:
        first = [_speed(run) for run in passes[specs[0], rate]]
        for spec in specs:
            runs = passes[spec, rate]
            peaks = [run.peak_running for run in runs if run.peak_running is not None]
            records = [record for run in runs for record in run.records]
            seconds = sum(run.seconds for run in runs)
            speeds = [_speed(run) for run in runs]
            rows.append(
                {
                    "policy": spec,
                    "rate": rate_name(rate),
                    **figures(records, seconds, plan.slo_ttft, plan.slo_itl),
                    "peak_running": max(peaks, default=None),
                    "throughput_against_first": ratios(speeds, first) if all(first) else None,
                }
            )
    return rows


def _speed(run: _Pass) -> float:
    """Output tokens per second."""
    whole = [each.output_tokens for each in run.records if each.outcome == "completed"]
    return sum(whole) / run.seconds


def _concurrency(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Maximum number of concurrent requests of every policy, relative to the first policy."""
    most: dict[str, float] = {}
    for row in rows:
        if row["peak_running"] is not None:
            most[row["policy"]] = max(most.get(row["policy"], 0.0), row["peak_running"])
    first = most.get(rows[0]["policy"])
    return [
        {"policy": spec, "peak_running": peak, "against_first": peak / first if first else None}
        for spec, peak in most.items()
    ]
