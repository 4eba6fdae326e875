"""Send generated requests, valid and invalid, to a server: ``pyramidinfer bench fuzz``.

Schemathesis reads the server's own OpenAPI document and generates bodies that follow it and bodies
that do not.  In addition, bodies with known field names and random values are sent, and bodies with
changed bytes.  Every request must get an answer, no answer may be a 5xx, and every error must have
OpenAI's format.
"""

from __future__ import annotations

import json
import math
import sys
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyramidinfer.lab.bench.adapters import adapter_words
from pyramidinfer.lab.bench.serve_plan import FuzzPlan
from pyramidinfer.lab.bench.served import Served
from pyramidinfer.lab.fuzz_bodies import BODIES, tame
from pyramidinfer.lab.record import write_result

__all__ = ["fuzz", "report", "run_fuzz"]

SHOWN = 20  # failures that a result reports in full
BARE = 5  # cases for an operation without arguments
RAW = 0.2  # share of cases with known names and random values, or with changed bytes
ROUND = 250  # cases that are drawn at once


@dataclass
class _Tally:
    """The requests sent and the statuses and failures of their answers.

    models : names that the server has;  stored : the id of the response stored last.
    """

    url: str
    session: Any
    models: list[str] = field(default_factory=list)
    stored: str = ""
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
            self._note(answer)
        except OSError as error:  # base class of all errors of requests
            status, wrong = "none", f"no answer: {error}"
        self.statuses[operation][status] += 1
        if wrong:
            self.failed += 1
            print(f"{operation}: {wrong}", file=sys.stderr, flush=True)
            if len(self.failures) < SHOWN:
                self.failures.append(
                    {"operation": operation, "wrong": wrong, "reproduce": reproduce()}
                )

    def _note(self, answer: Any) -> None:
        """Remember a stored response, which later requests continue, read or delete."""
        if answer.status_code == 200 and answer.content.startswith(b'{"id":"resp_'):
            said = answer.json()
            self.stored = said["id"] if said.get("store") else self.stored


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
    """Send ``cases`` requests to a server with the limits of ``FuzzPlan``; return the result.

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
        listed = session.get(f"{url}/v1/models", timeout=60).json()["data"]
        tally = _Tally(url, session, [each["id"] for each in listed])
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


def _draw(tally: _Tally, operation: Any, mode: Any, count: int, seed: int) -> bool:
    """Send ``count`` cases that follow an operation's schema, or violate it; False if there are
    none."""
    from hypothesis.errors import Unsatisfiable

    def send(case: Any) -> None:
        if mode.is_positive and seed % 2:
            tame(case.body, tally.models, tally.stored)
            if tally.stored and "/v1/responses/" in case.operation.label:
                case.path_parameters["id"] = tally.stored
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


def run_fuzz(plan: FuzzPlan, out: Path | None = None) -> dict[str, Any]:
    """Start a server, send the requests, write ``out``, and return the result."""
    plan.check()
    with TemporaryDirectory() as folder:
        words = [*plan.words, *adapter_words(None, plan.adapters, Path(folder))]
        server = Served(words, plan.threads)
        try:
            server.ready()
            result = fuzz(server.url, plan.cases, plan.seed)
            after = server.idle()
            code = server.stop()
        finally:
            server.kill()
    failed = int(after["pyramidinfer:pool_check_failures_total"])
    result |= {"exit_code": code, "pool_check_failures": failed}
    if out is not None:
        write_result(out, {**asdict(plan), "words": plan.words}, result)
    return result


def report(result: dict[str, Any]) -> bool:
    """Print the result; returns whether there was no failure."""
    for name, told in result["by_operation"].items():
        counts = ", ".join(f"{status}: {count}" for status, count in told["statuses"].items())
        print(f"{told['cases']:6} {name}  {counts}")
    for example in result["examples"]:
        print(f"{example['operation']}: {example['wrong']}\n  {example['reproduce']}")
    print(f"{result['cases']} cases in {result['seconds']:.0f} s, {result['failures']} failures")
    return not (result["failures"] or result["pool_check_failures"] or result["exit_code"])
