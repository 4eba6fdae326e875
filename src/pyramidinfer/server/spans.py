"""Traces of requests as OpenTelemetry spans (needs the extra ``otel``).

Each request that the engine accepted gets a span in the trace of the client's ``traceparent``,
with child spans ``prepare`` (tokenization), ``queue``, ``prefill`` and ``decode``.  Attribute names
follow OpenTelemetry's conventions for generative AI; others are our own.
"""

from __future__ import annotations

import os
import time
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode

import pyramidinfer
from pyramidinfer.engine.request import Request
from pyramidinfer.server.logs import Asked

__all__ = ["Spans", "check_variables"]

#: OpenTelemetry's variables that could ask for something unsupported, and their allowed values.
UNDERSTOOD = {
    "OTEL_TRACES_EXPORTER": ("", "otlp"),
    "OTEL_EXPORTER_OTLP_PROTOCOL": ("", "http/protobuf"),
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": ("", "http/protobuf"),
}


class Spans:
    """Creates spans of ended requests and passes them to an exporter, in its own thread."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.provider = TracerProvider(resource=_resource())
        self.provider.add_span_processor(BatchSpanProcessor(self._exporter()))
        self._tracer = self.provider.get_tracer("pyramidinfer", pyramidinfer.__version__)

    def _exporter(self) -> SpanExporter:
        return OTLPSpanExporter()

    def close(self) -> None:
        """Send the remaining spans."""
        self.provider.shutdown()

    def over(self, operation: str, about: Asked, arrived: float, requests: list[Request]) -> None:
        """All requests of a body have ended; ``arrived``: its arrival (``time.monotonic``)."""
        base = time.time_ns() - time.monotonic_ns()

        def at(moment: float) -> int:
            return base + int(moment * 1e9)

        def child(name: str, start: float, end: float, **about: Any) -> None:
            span = self._tracer.start_span(name, inside, start_time=at(start), attributes=about)
            span.end(at(end))

        ended = max(each.times.ended or each.times.arrived for each in requests)
        whole = self._tracer.start_span(
            f"{operation} {self.model}",
            propagate.extract(about.headers),
            SpanKind.SERVER,
            self._attributes(operation, about, requests),
            start_time=at(arrived),
        )
        inside: Context = trace.set_span_in_context(whole)
        child("prepare", arrived, requests[0].times.arrived)
        for index, each in enumerate(requests):
            times, end = each.times, each.times.ended or ended
            started, first = times.started or end, times.first_token or end
            if each.leads:
                child("queue", times.arrived, started, choice=index)
            if each.leads and times.started is not None:
                child("prefill", started, first, choice=index)
            if times.first_token is not None:
                child("decode", first, end, choice=index, tokens=len(each.output))
        failed = [each for each in requests if each.finish_reason not in ("stop", "length")]
        if failed:
            reason = failed[0].error or failed[0].finish_reason or ""
            whole.set_status(Status(StatusCode.ERROR, reason))
        whole.end(at(ended))

    def _attributes(self, operation: str, about: Asked, requests: list[Request]) -> dict[str, Any]:
        first = requests[0]
        leaders = [each for each in requests if each.leads]
        shares = [each.kv.kept_share for each in requests if each.kv and each.kv.seen_len]
        kept = {"pyramidinfer.kv_kept_share": sum(shares) / len(shares)} if shares else {}
        return {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "pyramidinfer",
            "gen_ai.request.model": self.model,
            "gen_ai.response.model": self.model,
            "gen_ai.response.id": about.answer,
            "gen_ai.request.max_tokens": first.params.max_tokens,
            "gen_ai.request.temperature": float(first.params.temperature),
            "gen_ai.request.top_p": float(first.params.top_p),
            "gen_ai.request.choice.count": len(requests) // len(leaders),
            "gen_ai.usage.input_tokens": sum(len(each.prompt) for each in leaders),
            "gen_ai.usage.output_tokens": sum(len(each.output) for each in requests),
            "gen_ai.response.finish_reasons": [each.finish_reason or "" for each in requests],
            "pyramidinfer.request_id": about.id,
            "pyramidinfer.policy": first.policy.name,
            "pyramidinfer.cached_tokens": sum(each.reused for each in leaders),
            **kept,
        }


def check_variables() -> None:
    """``ValueError`` if OpenTelemetry's variables ask for something unsupported."""
    for name, values in UNDERSTOOD.items():
        value = os.environ.get(name, "")
        if value not in values:
            raise ValueError(
                f"{name}={value}: traces are sent by OTLP as {values[1]} only; unset it, or let a "
                f"collector pass them on"
            )


def _resource() -> Resource:
    """The sending service, from ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES``; otherwise
    our name."""
    found = Resource.create()
    if str(found.attributes[SERVICE_NAME]).startswith("unknown_service"):
        found = found.merge(Resource({SERVICE_NAME: "pyramidinfer"}))
    return found
