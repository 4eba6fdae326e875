"""Prometheus metrics: vLLM's names for what vLLM has, ours for the rest."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.stats import Stats
from pyramidinfer.engine.worker import AsyncEngine

__all__ = ["Metrics"]

# Buckets as vLLM has them, in seconds.
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

#: vLLM numbers its data-parallel engines and labels its metrics by them; a server here is one.
ENGINE = "0"


def labels_of(name: str, *more: str) -> tuple[str, ...]:
    """The labels of a metric; those with vLLM's names have vLLM's."""
    return ("model_name", *(("engine",) if name.startswith("vllm:") else ()), *more)


class Metrics:
    """Counts what requests get (the engine's thread tells) and reads gauges when asked."""

    def __init__(self, model: str, about: dict[str, str]) -> None:
        self.model = model
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        info = Info("pyramidinfer:server", "What runs", ("model_name",), registry=self.registry)
        info.labels(model).info(about)
        self.worker: AsyncEngine | None = None
        self.rejected = self._counter(
            "pyramidinfer:requests_rejected", "Requests answered with an error", "status"
        )
        self.disconnected = self._counter(
            "pyramidinfer:client_disconnects", "Clients that went away before their answer ended"
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
            "Entries that were computed and are not in the cache at a request's end, all layers",
        ).labels(model)
        self._checks = self._counter(
            "pyramidinfer:pool_checks", "Times an idle engine found every page in its place"
        ).labels(model)
        self._check_failures = self._counter(
            "pyramidinfer:pool_check_failures", "Times it found a page lost"
        ).labels(model)
        self._layers = _Shares()
        self.registry.register(_Gauges(self))

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
        if since is not None:
            for _ in range(count):
                self._between.observe(since / count)
        elif request.times.first_token is not None:
            self._first.observe(request.times.first_token - request.times.arrived)

    def ended(self, request: Request, reason: str) -> None:
        """See ``engine.worker.Observer``."""
        self._success.labels(self.model, ENGINE, reason).inc()
        self._output_sizes.observe(len(request.output))
        times = request.times
        if times.ended is not None:
            self._whole.observe(times.ended - times.arrived)
        if times.started is None or request.kv is None or not request.kv.seen_len:
            return
        self._queue.observe(times.started - times.arrived)
        self._prompt_sizes.observe(len(request.prompt))
        self._kept.observe(request.kv.kept_share)
        self._layers.add(request.kv.layer_means, request.kv.full_len)
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

    def checked(self, sound: bool) -> None:
        """See ``engine.worker.Observer``."""
        (self._checks if sound else self._check_failures).inc()


class _Shares:
    """Kept share per layer over all requests that ended."""

    def __init__(self) -> None:
        self.kept: list[float] = []
        self.full: list[float] = []

    def add(self, kept: tuple[float, ...], full: tuple[int, ...]) -> None:
        nothing = [0.0] * len(kept)
        self.kept = [a + b for a, b in zip(self.kept or nothing, kept, strict=True)]
        self.full = [a + b for a, b in zip(self.full or nothing, full, strict=True)]


#: Gauges and counters by the field of ``engine.stats.Stats`` that they show.
GAUGES = {
    "vllm:num_requests_running": ("Requests in flight", "running"),
    "vllm:num_requests_swapped": ("Requests put off for want of memory", "preempted"),
    "pyramidinfer:swapped_bytes": (
        "Bytes of host memory that preempted requests take",
        "swapped_bytes",
    ),
    "pyramidinfer:pool_pages": ("Pages there are", "pages"),
    "pyramidinfer:pool_pages_in_use": ("Pages somebody owns", "pages_in_use"),
    "pyramidinfer:pool_pages_reusable": ("Pages of finished conversations", "pages_reusable"),
    "pyramidinfer:reuse_bytes": ("Bytes that finished conversations hold", "reuse_bytes"),
    "pyramidinfer:kv_bytes_reserved": ("Bytes of kv_memory that are reserved", "reserved_bytes"),
    "pyramidinfer:peak_requests_running": (
        "The most requests that were ever in flight",
        "peak_running",
    ),
}
COUNTERS = {
    "vllm:spec_decode_num_drafts": ("Steps of requests that verified guesses", "verifications"),
    "vllm:spec_decode_num_draft_tokens": ("Tokens guessed and verified", "drafted"),
    "vllm:spec_decode_num_accepted_tokens": ("Guessed tokens that were right", "accepted"),
    "pyramidinfer:swapped": ("Caches moved to host memory", "swapped"),
    "pyramidinfer:recomputed": ("Caches freed and computed anew", "recomputed"),
    "pyramidinfer:restarted": ("Prompts in progress that began again", "restarted"),
    "pyramidinfer:resumed": ("Requests that came back", "resumed"),
    "pyramidinfer:tightened": ("Times a running request's keep was lowered", "tightened"),
    "pyramidinfer:reuse_hits": ("Requests that reused a conversation's cache", "reuse_hits"),
    "pyramidinfer:reuse_misses": ("Requests that found none", "reuse_misses"),
    "pyramidinfer:reuse_tokens": ("Tokens not computed again", "reuse_tokens"),
    "pyramidinfer:reuse_dropped": ("Held caches that went for room", "reuse_dropped"),
    "pyramidinfer:cache_spills": ("Held caches moved from the pool to host memory", "spills"),
    "pyramidinfer:cache_loads": ("Held caches brought back into the pool", "loads"),
    "pyramidinfer:cache_file_errors": (
        "Files of caches that could not be read or written",
        "file_errors",
    ),
}
#: Those that have a value for each place where a cache can be.
BY_PLACE: dict[str, tuple[Any, str, str]] = {
    "pyramidinfer:caches": (GaugeMetricFamily, "Caches of finished conversations", "caches"),
    "pyramidinfer:cache_bytes": (GaugeMetricFamily, "Bytes that they take", "cache_bytes"),
    "pyramidinfer:cache_hits": (
        CounterMetricFamily,
        "Requests that reused a conversation's cache, by where it was",
        "hits_from",
    ),
}


class _Gauges:
    """What the engine's thread last told of the engine, at the moment of asking."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        worker, model = self.metrics.worker, self.metrics.model
        if worker is None:
            return
        stats, idle = worker.stats, worker.recompressor
        in_use = max(0, stats.pages_in_use - stats.pages_reusable)
        gauges = [(name, text, getattr(stats, field)) for name, (text, field) in GAUGES.items()] + [
            ("vllm:num_requests_waiting", "Requests that have not begun", worker.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the pages that running requests hold, 0 to 1",
                in_use / stats.pages,
            ),
        ]
        counters = [
            (name, text, getattr(stats, field)) for name, (text, field) in COUNTERS.items()
        ] + [
            (
                "vllm:num_preemptions",
                "Requests that were put off for want of memory",
                stats.swapped + stats.recomputed + stats.restarted,
            ),
            (
                "pyramidinfer:recompressed",
                "Held caches that were recompressed while idle",
                idle.done if idle else 0,
            ),
            (
                "pyramidinfer:recompressed_tokens",
                "Tokens computed to recompress held caches, mean over layers",
                idle.tokens if idle else 0,
            ),
        ]
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, text, value in values:
                yield _one(family(name, text, labels=labels_of(name)), model, value)
        for name, (kind, text, field) in BY_PLACE.items():
            places = kind(name, text, labels=["model_name", "place"])
            for place, value in getattr(stats, field).items():
                places.add_metric([model, place], value)
            yield places
        yield _cache_config(worker.engine, model)
        yield _adapters(worker.engine, stats, model)
        shares = GaugeMetricFamily(
            "pyramidinfer:kv_kept_share",
            "Share of a full cache's entries that a layer kept, over all ended requests",
            labels=["model_name", "layer"],
        )
        layers = self.metrics._layers
        for layer, (kept, full) in enumerate(zip(layers.kept, layers.full, strict=True)):
            shares.add_metric([model, str(layer)], kept / max(1, full))
        yield shares


def _one(family: Metric, model: str, value: float) -> Metric:
    values = [model, ENGINE] if family.name.startswith("vllm:") else [model]
    family.add_metric(values, value)  # type: ignore[attr-defined]
    return family


def _adapters(engine: Engine, stats: Stats, model: str) -> Metric:
    """Which adapters requests run with and wait for; the value is the time, as vLLM has it."""
    about = {
        "max_lora": len(engine.adapters),
        "waiting_lora_adapters": ",".join(stats.adapters_waiting),
        "running_lora_adapters": ",".join(stats.adapters_running),
    }
    name = "vllm:lora_requests_info"
    family = GaugeMetricFamily(name, "Adapters that requests have", labels=labels_of(name, *about))
    family.add_metric([model, ENGINE, *map(str, about.values())], time.time())
    return family


def _cache_config(engine: Engine, model: str) -> Metric:
    """How large the cache is: 1, with those of vLLM's labels that are true here.

    ``num_gpu_blocks`` counts blocks of ``block_size`` tokens, on whatever device, as if all of
    their entries were kept.
    """
    layout, config = engine.pool.layout, engine.config
    about = {
        "block_size": layout.page_size,
        "cache_dtype": config.kv_dtype,
        "num_gpu_blocks": layout.whole_blocks,
        "kv_cache_size_tokens": layout.whole_blocks * layout.page_size,
        "kv_cache_memory_bytes": layout.budget,
        "enable_prefix_caching": config.reuse_share > 0,
    }
    name = "vllm:cache_config_info"
    family = GaugeMetricFamily(name, "Sizes of the cache", labels=labels_of(name, *about))
    family.add_metric([model, ENGINE, *map(str, about.values())], 1)
    return family
