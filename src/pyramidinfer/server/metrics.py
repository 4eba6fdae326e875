"""Prometheus metrics: vLLM's names for vLLM's metrics, other names for the rest."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric

from pyramidinfer.engine.request import Request
from pyramidinfer.server.gauges import ENGINE, Gauges, labels_of

__all__ = ["Metrics"]

# vLLM's buckets, in seconds.
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
BETWEEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
    20,
    40,
    80,
)
WHOLE = (
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SHARES = tuple(round(0.05 * step, 2) for step in range(1, 21))

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
#: Finish reasons; their counters start at 0, so that a rate includes the first request.
REASONS = ("stop", "length", "abort", "timeout", "queue_timeout", "error")


class Registry(CollectorRegistry):
    """A registry without the ``_created`` series of counters and histograms."""

    def collect(self) -> Iterator[Metric]:
        for metric in super().collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Metrics:
    """Counts requests and tokens in the engine's thread, and reads gauges at each scrape."""

    def __init__(self, model: str, about: dict[str, str]) -> None:
        self.model = model
        self.registry = Registry()
        ProcessCollector(registry=self.registry)  # memory, CPU time, open files
        info = Info("pyramidinfer:server", "What runs", ("model_name",), registry=self.registry)
        info.labels(model).info(about)
        self._step = 0  # tokens of the current step
        self.gauges = Gauges(model)
        self.registry.register(self.gauges)
        self.rejected = self._counter(
            "pyramidinfer:requests_rejected", "Requests answered with an error", "status"
        )
        self.disconnected = self._counter(
            "pyramidinfer:client_disconnects", "Clients that disconnected before their answer ended"
        ).labels(model)
        self._first = self._histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN
        )
        self._between = self._histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a request", BETWEEN
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token", WHOLE
        )
        self._queue = self._histogram(
            "vllm:request_queue_time_seconds", "Arrival to the start of prefill", WHOLE
        )
        self._prefill = self._histogram(
            "vllm:request_prefill_time_seconds", "Start of prefill to first token", WHOLE
        )
        self._decode = self._histogram(
            "vllm:request_decode_time_seconds", "First token to last token", WHOLE
        )
        self._inference = self._histogram(
            "vllm:request_inference_time_seconds", "Start of prefill to last token", WHOLE
        )
        self._per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between the tokens of a request",
            BETWEEN,
        )
        self._steps = self._histogram(
            "vllm:iteration_tokens_total",
            "Prompt tokens of requests that got their first token in a step, and tokens generated",
            STEP_TOKENS,
        )
        self._max_tokens = self._histogram(
            "vllm:request_params_max_tokens", "max_tokens of a request", TOKENS
        )
        self._choices = self._histogram(
            "vllm:request_params_n", "Answers requested for a prompt", CHOICES
        )
        self._longest = self._histogram(
            "vllm:request_max_num_generation_tokens",
            "Generated tokens of the longest answer to a prompt",
            TOKENS,
        )
        self._prompt_sizes = self._histogram(
            "vllm:request_prompt_tokens", "Prompt tokens of a request", TOKENS
        )
        self._output_sizes = self._histogram(
            "vllm:request_generation_tokens", "Generated tokens of a request", TOKENS
        )
        self._kept = self._histogram(
            "pyramidinfer:request_kept_share",
            "Share of a full cache's entries that a request kept",
            SHARES,
        )
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens taken in").labels(
            model, ENGINE
        )
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated").labels(
            model, ENGINE
        )
        self._success = self._counter(
            "vllm:request_success", "Requests that came to an end", "finished_reason"
        )
        for reason in REASONS:
            self._success.labels(model, ENGINE, reason)
        self._skipped = self._counter(
            "pyramidinfer:prefill_tokens_skipped",
            "Prompt tokens dropped between layers, mean over layers",
        ).labels(model)
        self._reread = self._counter(
            "pyramidinfer:prefill_tokens_reread",
            "Tokens computed in reading prompts again, mean over layers",
        ).labels(model)
        self._evicted = self._counter(
            "pyramidinfer:kv_entries_evicted",
            "Entries computed and no longer in the cache when a request ended, all layers",
        ).labels(model)
        self._checks = self._counter(
            "pyramidinfer:pool_checks",
            "Checks of an idle engine that found every page with its owner",
        ).labels(model)
        self._check_failures = self._counter(
            "pyramidinfer:pool_check_failures", "Times it found a page lost"
        ).labels(model)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels_of(name, *labels), registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        names = labels_of(name)
        made = Histogram(name, text, names, buckets=buckets, registry=self.registry)
        child: Histogram = made.labels(*(self.model, ENGINE)[: len(names)])
        return child

    def render(self) -> bytes:
        """The text of ``/metrics``."""
        return generate_latest(self.registry)

    # --- told by the engine's thread ----------------------------------------------------------

    def tokens(self, request: Request, count: int, since: float | None) -> None:
        """See ``engine.worker.Observer``."""
        self._generated.inc(count)
        self._step += count
        if since is not None:
            for _ in range(count):
                self._between.observe(since / count)
        elif request.times.first_token is not None:
            self._first.observe(request.times.first_token - request.times.arrived)
        if since is None and request.leads:
            self._step += len(request.prompt)

    def stepped(self) -> None:
        """See ``engine.worker.Observer``."""
        if self._step:
            self._steps.observe(self._step)
        self._step = 0

    def ended(self, request: Request, reason: str) -> None:
        """See ``engine.worker.Observer``."""
        self._success.labels(self.model, ENGINE, reason).inc()
        self._output_sizes.observe(len(request.output))
        self._max_tokens.observe(request.params.max_tokens)
        self._observe_times(request)
        if request.times.started is None or request.kv is None or not request.kv.seen_len:
            return
        self._prompt_sizes.observe(len(request.prompt))
        self._kept.observe(request.kv.kept_share)
        self.gauges.layers.add(request.kv.layer_means, request.kv.full_len)
        depth = len(request.kv.kept_len)
        computed = sum(request.computed[:depth])
        new = request.kv.seen_len - request.reused
        if request.leads:
            self._prompt.inc(len(request.prompt))
            entered = request.computed[0] if request.computed else 0
            self._skipped.inc(max(0.0, entered - computed / depth))
            self._reread.inc(sum(request.computed[depth:]) / depth)
        fed = max(0, new - (request.computed[0] if request.computed else 0))
        gone = computed + fed * depth + request.reused_entries - sum(request.kv.layer_means)
        self._evicted.inc(max(0, gone))

    def _observe_times(self, request: Request) -> None:
        times, more = request.times, len(request.output) - 1
        if times.ended is not None:
            self._whole.observe(times.ended - times.arrived)
        if times.started is not None:
            self._queue.observe(times.started - times.arrived)
        if times.started is None or times.first_token is None or times.ended is None:
            return
        self._prefill.observe(times.first_token - times.started)
        self._decode.observe(times.ended - times.first_token)
        self._inference.observe(times.ended - times.started)
        if more > 0:
            self._per_token.observe((times.ended - times.first_token) / more)

    def over(self, requests: list[Request]) -> None:
        """All requests of one body have ended; called in the engine's thread."""
        for leader in [each for each in requests if each.leads]:
            answers = (leader, *leader.samples)
            self._choices.observe(len(answers))
            self._longest.observe(max(len(each.output) for each in answers))

    def checked(self, sound: bool) -> None:
        """See ``engine.worker.Observer``."""
        (self._checks if sound else self._check_failures).inc()
