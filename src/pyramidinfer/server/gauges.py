"""Metrics of the engine's last snapshot (``engine.stats.Stats``)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.stats import Stats
from pyramidinfer.engine.worker import AsyncEngine

__all__ = ["ENGINE", "Gauges", "Shares", "labels_of"]

#: vLLM labels its metrics with the number of the data-parallel engine; a server here has one.
ENGINE = "0"


def labels_of(name: str, *more: str) -> tuple[str, ...]:
    """The labels of a metric; metrics with vLLM's names have vLLM's labels."""
    return ("model_name", *(("engine",) if name.startswith("vllm:") else ()), *more)


class Shares:
    """Kept share per layer over all ended requests."""

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
        "Largest number of requests that ran at once",
        "peak_running",
    ),
}
COUNTERS = {
    "vllm:prefix_cache_queries": (
        "Prompt tokens of requests that began and may reuse a cache",
        "prefix_queries",
    ),
    "vllm:prefix_cache_hits": ("Prompt tokens found in a cache, not computed again", "prefix_hits"),
    "pyramidinfer:step_seconds": ("Seconds that steps took", "step_seconds"),
    "pyramidinfer:draft_seconds": (
        "Seconds of steps spent drafting tokens, without their verification",
        "guessing_seconds",
    ),
    "vllm:spec_decode_num_drafts": ("Steps of requests that verified drafts", "verifications"),
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
    "pyramidinfer:recompressed": ("Held caches that were recompressed while idle", "recompressed"),
    "pyramidinfer:recompressed_tokens": (
        "Tokens computed to recompress held caches, mean over layers",
        "recompressed_tokens",
    ),
}
#: Metrics with one value for each place of a cache.
BY_PLACE: dict[str, tuple[Any, str, str]] = {
    "pyramidinfer:caches": (GaugeMetricFamily, "Caches of finished conversations", "caches"),
    "pyramidinfer:cache_bytes": (GaugeMetricFamily, "Bytes that they take", "cache_bytes"),
    "pyramidinfer:cache_hits": (
        CounterMetricFamily,
        "Requests that reused a conversation's cache, by the cache's place",
        "hits_from",
    ),
}


class Gauges:
    """The last snapshot of the engine's thread, read at each scrape.

    ``worker``: there are no values before it is set;  ``layers``: entries that ended requests kept.
    """

    def __init__(self, model: str) -> None:
        self.model, self.layers = model, Shares()
        self.worker: AsyncEngine | None = None

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        worker, model = self.worker, self.model
        if worker is None:
            return
        stats = worker.stats
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
                "Requests preempted because memory ran out",
                stats.swapped + stats.recomputed + stats.restarted,
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
        for layer, (kept, full) in enumerate(zip(self.layers.kept, self.layers.full, strict=True)):
            shares.add_metric([model, str(layer)], kept / max(1, full))
        yield shares


def _one(family: Metric, model: str, value: float) -> Metric:
    values = [model, ENGINE] if family.name.startswith("vllm:") else [model]
    family.add_metric(values, value)  # type: ignore[attr-defined]
    return family


def _adapters(engine: Engine, stats: Stats, model: str) -> Metric:
    """The adapters of running and of waiting requests; the value is the time, as in vLLM."""
    about = {
        "max_lora": len(engine.adapters),
        "waiting_lora_adapters": ",".join(stats.adapters_waiting),
        "running_lora_adapters": ",".join(stats.adapters_running),
    }
    name = "vllm:lora_requests_info"
    family = GaugeMetricFamily(name, "Adapters of requests", labels=labels_of(name, *about))
    family.add_metric([model, ENGINE, *map(str, about.values())], time.time())
    return family


def _cache_config(engine: Engine, model: str) -> Metric:
    """The size of the cache: value 1, with those of vLLM's labels that apply here.

    ``num_gpu_blocks`` counts blocks of ``block_size`` tokens on any device, as if all of their
    entries were kept.
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
