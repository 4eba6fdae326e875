"""Traces of requests: which spans there are, whose they are, and that OTLP brings them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pyramidinfer import LLM
from pyramidinfer.server import service as service_module
from pyramidinfer.server.spans import Spans
from tests.server.live import MODEL, STORY, Live, beside, serving, until

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture(scope="module")
def kept() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def live(llm: LLM, kept: InMemorySpanExporter) -> Iterator[Live]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spans, "_exporter", lambda _: kept)
        started = serving(beside(llm), otel_traces=True)
        live = started.__enter__()
    try:
        yield live
    finally:
        started.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def clean(kept: InMemorySpanExporter) -> None:
    kept.clear()


def spans_of(live: Live, kept: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    """Finished spans by name; the whole request's under ``""``."""
    until(lambda: live.service.worker.is_idle)
    live.inside(lambda: None)
    live.service.spans.provider.force_flush()
    found: dict[str, list[ReadableSpan]] = {}
    for each in kept.get_finished_spans():
        found.setdefault("" if each.kind == SpanKind.SERVER else each.name, []).append(each)
    return found


def test_a_request_in_its_clients_trace(live: Live, kept: InMemorySpanExporter) -> None:
    answer = live.http.post(
        "/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": STORY * 4}],
            "max_tokens": 5,
            "n": 2,
            "temperature": 0.5,
            "ignore_eos": True,
        },
        headers={**TRACEPARENT, "X-Request-Id": "mine"},
    ).json()
    found = spans_of(live, kept)
    (whole,) = found.pop("")
    assert {name: len(each) for name, each in found.items()} == {
        "prepare": 1,
        "queue": 1,
        "prefill": 1,
        "decode": 2,
    }
    assert whole.name == f"chat {MODEL}"
    assert whole.context and f"{whole.context.trace_id:032x}" == TRACE
    assert whole.parent and f"{whole.parent.span_id:016x}" == PARENT
    children = [each for spans in found.values() for each in spans]
    for each in children:
        assert each.parent and each.parent.span_id == whole.context.span_id
        assert each.start_time and each.end_time and whole.start_time and whole.end_time
        assert whole.start_time <= each.start_time <= each.end_time <= whole.end_time
    (prepare,), (queue,), (prefill,) = (found[name] for name in ("prepare", "queue", "prefill"))
    assert prepare.end_time == queue.start_time and queue.end_time == prefill.start_time
    assert prefill.end_time == found["decode"][0].start_time
    said: Any = whole.attributes
    usage = answer["usage"]
    assert said["gen_ai.response.id"] == answer["id"]
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 10
    assert said["gen_ai.request.choice.count"] == 2
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    assert said["pyramidinfer.request_id"] == "mine"
    assert 0 < said["pyramidinfer.kv_kept_share"] <= 1
    assert whole.status.status_code == StatusCode.UNSET


def test_a_trace_of_its_own_without_a_client(live: Live, kept: InMemorySpanExporter) -> None:
    live.complete(max_tokens=1)
    (whole,) = spans_of(live, kept)[""]
    assert whole.parent is None and whole.name == f"text_completion {MODEL}"


def test_who_goes_away_is_an_error(live: Live, kept: InMemorySpanExporter) -> None:
    body = {"prompt": STORY, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with live.http.stream("POST", "/v1/completions", json=body) as running:
        next(running.iter_lines())
    (whole,) = spans_of(live, kept)[""]
    assert whole.status.status_code == StatusCode.ERROR
    assert whole.status.description == "abort"


def test_traces_go_where_the_variables_say(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[str, str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            got.append((self.path, self.headers.get("x-team", ""), content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv(
                "OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}"
            )
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-team=ours")
            monkeypatch.setenv("OTEL_SERVICE_NAME", "llm-7")
            with serving(beside(llm), otel_traces=True) as live:
                live.complete(max_tokens=2)
        finally:  # a server that stops sends what is left
            collector.shutdown()
            thread.join()
    ((path, team, content),) = got
    assert (path, team) == ("/v1/traces", "ours")
    sent = ExportTraceServiceRequest.FromString(content).resource_spans[0]
    names = {each.key: each.value.string_value for each in sent.resource.attributes}
    assert names["service.name"] == "llm-7"
    spans = [each.name for scope in sent.scope_spans for each in scope.spans]
    assert sorted(spans) == ["decode", "prefill", "prepare", "queue", f"text_completion {MODEL}"]


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc: .* http/protobuf only"):
        service_module.spans_module()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(__import__("sys").modules, "pyramidinfer.server.spans", None)
    monkeypatch.delattr("pyramidinfer.server.spans", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'pyramidinfer\[otel\]'"):
        service_module.spans_module()
