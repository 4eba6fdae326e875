"""Send generated requests, valid and invalid, to a server: ``python -m pyramidinfer.lab.fuzz``.

Schemathesis reads the server's own OpenAPI document and generates bodies that follow it and bodies
that do not.  In addition, bodies with known field names and random values are sent, and bodies with
changed bytes.  Every request must get an answer, no answer may be a 5xx, and every error must have
OpenAI's format.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyramidinfer.lab.bench.served import Served
from pyramidinfer.lab.record import write_result

__all__ = ["LIMITS", "fuzz", "main"]

#: Low limits, so that ten thousand answers take only minutes.
LIMITS: dict[str, Any] = {
    "max_tokens_limit": 4,
    "default_max_tokens": 2,
    "max_prompt_tokens": 200,
    "max_n": 3,
    "max_body_bytes": 64 * 1024,
    "request_timeout": 20.0,
}
WORDS = [
    "--port",
    "0",
    "--kv-memory",
    "16MiB",
    "--max-tokens-limit",
    "4",
    "--default-max-tokens",
    "2",
    "--max-prompt-tokens",
    "200",
    "--max-n",
    "3",
    "--max-body",
    "64KiB",
    "--request-timeout",
    "20",
]
SHOWN = 20  # failures that a result reports in full
BARE = 5  # cases for an operation without arguments
RAW = 0.2  # share of cases with known names and random values, or with changed bytes
ROUND = 250  # cases that are drawn at once

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "The storm", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2},
        {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 2, "compression": {"policy": "full"}},
        {"prompt": "x", "stream": True, "stream_options": {"include_kv": True}, "stop": ["a"]},
        {
            "prompt": "x",
            "logit_bias": {"5": 3},
            "seed": 1,
            "min_p": 0.1,
            "top_k": 3,
            "repetition_penalty": 1.5,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "return_token_ids": True,
        },
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 2, "n": 2},
        {
            "messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}],
            "logprobs": True,
            "top_logprobs": 3,
            "compression": {"keep": 0.5, "reuse": False},
        },
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object"}},
            },
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": "y",
                    "reasoning_content": "z",
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "x"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning_effort": "low",
            "stream": True,
        },
    ],
    "/v1/responses": [
        {"input": "x", "instructions": "y", "max_output_tokens": 2, "stream": True},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]},
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "x"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
            "tool_choice": {"type": "function", "name": "f"},
            "previous_response_id": "resp_1",
            "store": False,
            "reasoning": {"effort": "low"},
        },
        {
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "metadata": {"a": "b"},
            "compression": {"keep": 0.5},
        },
    ],
    "/tokenize": [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}],
    "/detokenize": [{"tokens": [5, 6]}],
}


@dataclass
class _Tally:
    """The requests sent and the statuses and failures of their answers."""

    url: str
    session: Any
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failures: list[dict[str, str]] = field(default_factory=list)
    failed: int = 0

    @property
    def cases(self) -> int:
        return sum(counts.total() for counts in self.statuses.values())

    def ask(self, operation: str, send: Callable[[], Any], reproduce: Callable[[], str]) -> None:
        """Send a case and check the answer."""
        try:
            answer = send()
            status, wrong = str(answer.status_code), _wrong(answer)
        except OSError as error:  # base class of all errors of requests
            status, wrong = "none", f"no answer: {error}"
        self.statuses[operation][status] += 1
        if wrong:
            self.failed += 1
            if len(self.failures) < SHOWN:
                self.failures.append(
                    {"operation": operation, "wrong": wrong, "reproduce": reproduce()}
                )


def _wrong(answer: Any) -> str:
    """The fault in an answer, in words; empty if there is none."""
    text = answer.content.decode("utf-8", "replace")
    if answer.status_code >= 500:
        return f"status {answer.status_code}: {text[:300]}"
    if answer.status_code < 400:
        failed = 'data: {"error"' in text or "event: response.failed" in text
        return f"an error in a stream: {text[-300:]}" if failed else ""
    try:
        shape = set(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError):
        shape = set()
    whole = shape == {"message", "type", "param", "code"}
    return "" if whole else f"status {answer.status_code} without OpenAI's error: {text[:300]}"


def fuzz(url: str, cases: int, seed: int = 0) -> dict[str, Any]:
    """Send ``cases`` requests to a server that runs with ``LIMITS``, and return the result.

    ``ValueError`` without Schemathesis.
    """
    try:
        import requests
        import schemathesis
    except ImportError:
        raise ValueError("the fuzz needs schemathesis: pip install schemathesis") from None
    begun = time.perf_counter()
    with requests.Session() as session:
        session.trust_env = False
        tally = _Tally(url, session)
        schema: Any = schemathesis.openapi.from_url(f"{url}/openapi.json")
        found = [each.ok() for each in schema.get_all_operations()]
        takes = [each for each in found if each.body or list(each.iter_parameters())]
        for operation in found:
            if operation not in takes:
                for _ in range(min(BARE, max(0, cases - tally.cases))):
                    _send(tally, operation.Case())
        kinds = [(each, mode) for each in takes for mode in schemathesis.GenerationMode]
        while tally.cases < cases:
            seed += 1
            now = min(ROUND, cases - tally.cases)
            raw = math.ceil(RAW * now)
            _draw_raw(tally, raw, seed)
            share = max(1, (now - raw) // len(kinds))
            for kind in list(kinds):
                wanted = min(share, cases - tally.cases)
                if wanted and not _draw(tally, *kind, wanted, seed):
                    kinds.remove(kind)
    by_operation = {
        name: {"cases": counts.total(), "statuses": dict(sorted(counts.items()))}
        for name, counts in sorted(tally.statuses.items())
    }
    return {
        "cases": tally.cases,
        "failures": tally.failed,
        "seconds": time.perf_counter() - begun,
        "by_operation": by_operation,
        "examples": tally.failures,
    }


def _send(tally: _Tally, case: Any) -> None:
    tally.ask(
        case.operation.label,
        lambda: case.call(base_url=tally.url, session=tally.session, timeout=60),
        lambda: str(case.as_curl_command(base_url=tally.url)),
    )


def _tame(case: Any) -> None:
    """Reduce a body that follows the schema to the server's limits, so that it generates."""
    body = case.body
    if not isinstance(body, dict) or not {"prompt", "messages", "input"} & set(body):
        return
    for name, most in (
        ("max_tokens", 4),
        ("max_completion_tokens", 4),
        ("max_output_tokens", 4),
        ("n", 3),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("min_tokens", 2),
        ("prompt_logprobs", 5),
    ):
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    for name in ("model", "max_completion_tokens" if "max_tokens" in body else "", "best_of"):
        body.pop(name, None)
    for name in ("previous_response_id", "reasoning_effort", "reasoning", "chat_template_kwargs"):
        body.pop(name, None)  # not supported or unknown here
    for name in [name for name in body if name.startswith(("guided_", "structured_"))]:
        del body[name]  # the shipped model's tokenizer supports none
    body.pop("response_format", None)
    if isinstance(body.get("tools"), list):
        _tame_tools(body)
    if isinstance(body.get("messages"), list):
        body["messages"] = [_tame_message(each) for each in body["messages"][:4]]
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if "top_logprobs" in body and "input" not in body:
        body["logprobs"] = True
    if isinstance(body.get("logit_bias"), dict):
        biases = enumerate(body["logit_bias"].values())
        body["logit_bias"] = {str(7 * index): amount for index, amount in biases}
    if isinstance(body.get("compression"), dict) and "policy" in body["compression"]:
        body["compression"]["policy"] = "snapkv"
    if isinstance(body.get("stop"), list):
        body["stop"] = body["stop"][:8]
    if not body.get("stream"):
        body.pop("stream_options", None)
    for name in ("stop_token_ids", "prompt"):
        if isinstance(body.get(name), list):
            body[name] = _within(body[name])[:8]


def _tame_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with text that does not depend on others: no tool call, no tool result."""
    role = "user" if message["role"] == "tool" else message["role"]
    content = message.get("content") or "x"
    parts = content[:4] if isinstance(content, list) else content
    return {"role": role, "content": parts}


def _tame_tools(body: dict[str, Any]) -> None:
    """At most three functions with different names, none of them required: the shipped model's
    tokenizer does not support enforced calls."""
    functions = [each.get("function", each) for each in body["tools"] if isinstance(each, dict)]
    for number, function in enumerate(functions):
        function.pop("strict", None)
        function |= {"name": f"f{number}"}
    body["tools"] = body["tools"][:3]
    if body.get("tool_choice") not in ("auto", "none"):
        body.pop("tool_choice", None)


def _within(tokens: list[Any]) -> list[Any]:
    """Replace token IDs, also in nested lists, by IDs that the shipped model has."""
    return [
        _within(each[:50]) if isinstance(each, list) else each % 1000 if type(each) is int else each
        for each in tokens
    ]


def _draw(tally: _Tally, operation: Any, mode: Any, count: int, seed: int) -> bool:
    """Send ``count`` cases that follow an operation's schema, or violate it; False if there are
    none."""
    from hypothesis.errors import Unsatisfiable

    def send(case: Any) -> None:
        if mode.is_positive and seed % 2:
            _tame(case)
        _send(tally, case)

    try:
        _each(operation.as_strategy(generation_mode=mode), send, count, seed)
    except Unsatisfiable:
        return False
    return True


def _draw_raw(tally: _Tally, count: int, seed: int) -> None:
    """Send bodies with known names and random values, and bodies with changed bytes."""
    from hypothesis import strategies as st

    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
        ),
        max_leaves=6,
    )

    def changed(path: str) -> Any:
        body = st.sampled_from(BODIES[path])
        names = sorted({name for each in BODIES[path] for name in each})
        odd = st.dictionaries(st.sampled_from(names), values, min_size=1, max_size=2)
        mixed = st.tuples(body, odd).map(lambda pair: json.dumps(pair[0] | pair[1]).encode())
        places = st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=4)
        bytes_changed = st.tuples(body, places).map(lambda pair: _cut(*pair))
        return st.tuples(st.just(path), mixed | bytes_changed | st.binary(max_size=40))

    def send(drawn: tuple[str, bytes]) -> None:
        path, body = drawn
        head = {"Content-Type": "application/json"}
        tally.ask(
            f"POST {path} (raw)",
            lambda: tally.session.post(tally.url + path, data=body, headers=head, timeout=60),
            lambda: (
                f"echo {b64encode(body).decode()} | base64 -d | curl -H 'Content-Type: "
                f"application/json' --data-binary @- {tally.url}{path}"
            ),
        )

    _each(st.one_of([changed(path) for path in BODIES]), send, count, seed)


def _cut(body: dict[str, Any], places: list[tuple[int, bytes]]) -> bytes:
    text = json.dumps(body).encode()
    for at, piece in places:
        at %= len(text) + 1
        text = text[:at] + piece + text[at + len(piece) :]
    return text


def _each(strategy: Any, act: Callable[[Any], None], count: int, seed: int) -> None:
    """Call ``act`` with ``count`` values drawn from a strategy."""
    import hypothesis

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(drawn: Any) -> None:
        act(drawn)

    one()


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pyramidinfer.lab.fuzz", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="of the server; 0: its choice")
    parser.add_argument("--json", type=Path, default=Path("out/fuzz.json"))
    given = parser.parse_args(arguments)
    server = Served(WORDS, given.threads)
    try:
        if given.cases < 1:
            raise ValueError(f"cases={given.cases} must be a whole number of at least 1")
        server.ready()
        result = fuzz(server.url, given.cases, given.seed)
        after = server.idle()
        code = server.stop()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        server.kill()
    lost = int(after["pyramidinfer:pool_check_failures_total"])
    result |= {"exit_code": code, "pool_check_failures": lost}
    write_result(given.json, {"cases": given.cases, "seed": given.seed, "words": WORDS}, result)
    for name, told in result["by_operation"].items():
        counts = ", ".join(f"{status}: {count}" for status, count in told["statuses"].items())
        print(f"{told['cases']:6} {name}  {counts}")
    for example in result["examples"]:
        print(f"{example['operation']}: {example['wrong']}\n  {example['reproduce']}")
    print(f"{result['cases']} cases in {result['seconds']:.0f} s, {result['failures']} failures")
    sys.exit(bool(result["failures"] or lost or code))


if __name__ == "__main__":
    main()
