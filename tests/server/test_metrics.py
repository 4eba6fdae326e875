"""``/metrics`` as Prometheus reads it: names, types, and counts of what was sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pyramidinfer import LLM
from tests.server.live import STORY, Live, beside, serving, until

TYPES = {
    "vllm:num_requests_running": "gauge",
    "vllm:num_requests_waiting": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
    "vllm:request_prefill_time_seconds": "histogram",
    "vllm:request_decode_time_seconds": "histogram",
    "vllm:request_inference_time_seconds": "histogram",
    "vllm:request_time_per_output_token_seconds": "histogram",
    "vllm:request_max_num_generation_tokens": "histogram",
    "vllm:request_params_max_tokens": "histogram",
    "vllm:request_params_n": "histogram",
    "vllm:iteration_tokens_total": "histogram",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "pyramidinfer:step_seconds": "counter",
    "pyramidinfer:draft_seconds": "counter",
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:request_success": "counter",
    "pyramidinfer:kv_kept_share": "gauge",
    "pyramidinfer:kv_entries_evicted": "counter",
    "pyramidinfer:prefill_tokens_skipped": "counter",
    "pyramidinfer:prefill_tokens_reread": "counter",
    "pyramidinfer:reuse_hits": "counter",
    "pyramidinfer:reuse_misses": "counter",
    "pyramidinfer:reuse_tokens": "counter",
    "pyramidinfer:recompressed": "counter",
    "pyramidinfer:recompressed_tokens": "counter",
    "pyramidinfer:requests_rejected": "counter",
    "pyramidinfer:client_disconnects": "counter",
    "pyramidinfer:peak_requests_running": "gauge",
    "pyramidinfer:pool_pages": "gauge",
    "pyramidinfer:pool_pages_in_use": "gauge",
    "pyramidinfer:pool_pages_reusable": "gauge",
    "pyramidinfer:pool_checks": "counter",
    "pyramidinfer:pool_check_failures": "counter",
}


@pytest.fixture
def fresh(llm: LLM) -> Iterator[Live]:
    with serving(beside(llm, kv_memory="32MiB"), model_name='odd "name"\\') as live:
        yield live


def read(live: Live) -> dict[str, float]:
    """Samples by name, and by ``name label=value`` where there is a label besides the model's."""
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    values: dict[str, float] = {}
    found: dict[str, str] = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.name not in found and family.documentation
        found[family.name] = family.type
        ours = family.name.startswith(("vllm:", "pyramidinfer:"))
        for sample in family.samples if ours else []:
            assert sample.labels["model_name"] == live.service.name
            if family.name.startswith("vllm:"):
                assert sample.labels["engine"] == "0"
            others = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            name = " ".join([sample.name, *(f"{k}={v}" for k, v in others.items())])
            assert name not in values
            values[name] = sample.value
    assert found == found | TYPES
    return values


def test_before_and_after_load(fresh: Live) -> None:
    before = read(fresh)
    (runs,) = (name for name in before if name.startswith("pyramidinfer:server_info"))
    policy = fresh.service.llm.policy
    assert policy.rule and f" policy=pyramid rule={policy.rule} " in runs and " keep=0.45 " in runs
    for name in (
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_count",
        "vllm:num_requests_running",
        "pyramidinfer:pool_pages_in_use",
        "vllm:kv_cache_usage_perc",
    ):
        assert before[name] == 0, name
    assert not any(name.startswith("pyramidinfer:kv_kept_share") for name in before)

    bodies = [{"max_tokens": 8}, {"max_tokens": 5, "n": 3, "temperature": 1}, {"max_tokens": 3}]
    answers = [
        fresh.complete(STORY * (20 + i), ignore_eos=True, **body) for i, body in enumerate(bodies)
    ]
    streamed = fresh.complete(STORY, max_tokens=6, ignore_eos=True, stream=True)
    ended = fresh.complete(STORY, logit_bias={"3": 100})  # its end at once
    assert fresh.complete(STORY, bogus=1).status_code == 400
    assert fresh.complete(STORY, model="other").status_code == 404
    assert streamed.status_code == 200
    until(lambda: fresh.service.worker.is_idle)
    after = read(fresh)

    usages = [each.json()["usage"] for each in [*answers, ended]]
    new = sum(each["completion_tokens"] for each in usages) + 6
    assert new == 8 + 15 + 3 + 1 + 6 == after["vllm:generation_tokens_total"]
    story = usages[-1]["prompt_tokens"]
    prompts = sum(each["prompt_tokens"] for each in usages) + story
    assert prompts == after["vllm:prompt_tokens_total"]
    assert after["vllm:request_success_total finished_reason=length"] == 6
    assert after["vllm:request_success_total finished_reason=stop"] == 1
    for name in (
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "request_params_max_tokens",
        "request_prompt_tokens",
        "request_generation_tokens",
    ):
        assert after[f"vllm:{name}_count"] == 7, name
        assert after[f"vllm:{name}_bucket le=+Inf"] == 7
    assert after["vllm:inter_token_latency_seconds_count"] == new - 7
    assert after["vllm:request_generation_tokens_sum"] == new
    # the answer that ended with its first token has no time between tokens
    assert after["vllm:request_time_per_output_token_seconds_count"] == 6
    assert after["vllm:request_params_max_tokens_sum"] == 8 + 3 * 5 + 3 + 6 + 4
    assert after["vllm:request_params_n_sum"] == 1 + 3 + 1 + 1 + 1
    assert after["vllm:request_params_n_count"] == 5
    assert after["vllm:request_max_num_generation_tokens_sum"] == 8 + 5 + 3 + 6 + 1
    assert after["vllm:iteration_tokens_total_sum"] == prompts + new
    longest = max(each["prompt_tokens"] for each in usages)
    assert after["vllm:iteration_tokens_total_bucket le=16384.0"] > 7  # steps, not requests
    assert after["vllm:iteration_tokens_total_sum"] > longest
    parts = ("queue", "prefill", "decode")
    spent = sum(after[f"vllm:request_{part}_time_seconds_sum"] for part in parts)
    assert after["vllm:e2e_request_latency_seconds_sum"] == pytest.approx(spent)
    for part in ("prefill", "decode"):
        spent = after[f"vllm:request_{part}_time_seconds_sum"]
        assert 0 < spent < after["vllm:request_inference_time_seconds_sum"]
    assert after["pyramidinfer:step_seconds_total"] > 0
    assert after["pyramidinfer:draft_seconds_total"] == 0
    assert after["pyramidinfer:requests_rejected_total status=400"] == 1
    assert after["pyramidinfer:requests_rejected_total status=404"] == 1
    skipped = sum(each["prefill_tokens_skipped"] for each in usages)
    assert skipped > 0
    assert after["pyramidinfer:prefill_tokens_skipped_total"] == pytest.approx(skipped, abs=3)
    assert after["pyramidinfer:kv_entries_evicted_total"] > 0
    shares = [after[f"pyramidinfer:kv_kept_share layer={layer}"] for layer in range(12)]
    assert all(0 < share <= 1 for share in shares) and min(shares) < max(shares)
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["pyramidinfer:peak_requests_running"] == 3
    assert after["pyramidinfer:pool_check_failures_total"] == 0
    # what is held for reuse is nobody's use of the cache
    assert after["pyramidinfer:pool_pages_in_use"] == after["pyramidinfer:pool_pages_reusable"] > 0
    assert after["vllm:kv_cache_usage_perc"] == 0
    for name, value in before.items():
        if name.endswith(("_total", "_count", "_sum")) or "_bucket" in name:
            assert after[name] >= value, name


def test_reuse_is_counted(fresh: Live) -> None:
    said = fresh.chat(STORY).json()
    second = fresh.chat(STORY, said["choices"][0]["message"]["content"], "Where ?").json()
    values = read(fresh)
    assert values["pyramidinfer:reuse_hits_total"] == 1
    assert values["pyramidinfer:reuse_misses_total"] == 1
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert values["pyramidinfer:reuse_tokens_total"] == cached > 0
    assert values["vllm:prefix_cache_hits_total"] == cached
    asked = [each["usage"]["prompt_tokens"] for each in (said, second)]
    assert values["vllm:prefix_cache_queries_total"] == sum(asked)
    fresh.chat(STORY, compression={"reuse": False})  # asks for nobody's cache
    assert read(fresh)["vllm:prefix_cache_queries_total"] == sum(asked)


def test_guessing_takes_its_share_of_the_time(llm: LLM) -> None:
    with serving(beside(llm, kv_memory="32MiB", draft_tokens=2)) as live:
        answer = live.complete(STORY * 8, max_tokens=12, compression={"lossless": True})
        assert answer.json()["usage"]["verifications"] > 0
        values = read(live)
        steps = values["pyramidinfer:step_seconds_total"]
        assert 0 < values["pyramidinfer:draft_seconds_total"] < steps


def test_no_series_tells_when_a_metric_was_made(fresh: Live) -> None:
    fresh.complete()
    assert "_created" not in fresh.http.get("/metrics").text


def test_while_something_runs(fresh: Live) -> None:
    body = {"prompt": STORY, "max_tokens": 3000, "ignore_eos": True, "stream": True}
    with fresh.http.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        values = read(fresh)
        assert values["vllm:num_requests_running"] == 1
        assert 0 < values["vllm:kv_cache_usage_perc"] < 1
        assert values["pyramidinfer:kv_bytes_reserved"] > 0
    until(lambda: fresh.service.worker.is_idle)
    values = read(fresh)
    assert values["pyramidinfer:client_disconnects_total"] == 1
    assert values["vllm:request_success_total finished_reason=abort"] == 1
    assert values["vllm:num_requests_running"] == 0


def test_a_request_that_waited_too_long_counts_its_samples(llm: LLM) -> None:
    with serving(beside(llm, max_requests=3), queue_timeout=0.05) as live:
        body = {"prompt": STORY, "max_tokens": 3000, "ignore_eos": True, "stream": True}
        with live.http.stream("POST", "/v1/completions", json=body) as running:
            lines = running.iter_lines()
            next(lines)
            assert live.complete(n=3, temperature=1).status_code == 429
        values = read(live)
        assert values["vllm:request_success_total finished_reason=queue_timeout"] == 3
        assert values["pyramidinfer:requests_rejected_total status=429"] == 1


def test_gauges_are_what_the_engines_thread_told(fresh: Live) -> None:
    """Nothing is read off an engine that another thread is changing."""
    worker = fresh.service.worker
    worker.stats = worker.stats._replace(running=7, waiting=5, reuse_hits=11, pages_in_use=3)
    found = read(fresh)
    assert found["vllm:num_requests_running"] == 7 and found["vllm:num_requests_waiting"] == 5
    assert found["pyramidinfer:reuse_hits_total"] == 11
    assert found["pyramidinfer:pool_pages_in_use"] == 3


def test_routers_find_what_they_read(fresh: Live) -> None:
    """The gauges that llm-d and the Gateway API's inference extension score servers by, with
    vLLM's labels, and how large the cache is in blocks."""
    text = fresh.http.get("/metrics").text
    samples = {
        sample.name: sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc"):
        found = samples[f"vllm:{name}"]
        assert found.labels == {"model_name": fresh.service.name, "engine": "0"}
        assert found.value == 0
    info = samples["vllm:cache_config_info"]
    assert info.value == 1
    engine = fresh.service.llm.engine
    size, blocks = int(info.labels["block_size"]), int(info.labels["num_gpu_blocks"])
    assert size == engine.config.page_size
    assert int(info.labels["kv_cache_size_tokens"]) == size * blocks
    assert int(info.labels["kv_cache_memory_bytes"]) == 32 * 2**20
    assert info.labels["enable_prefix_caching"] == "True"
    whole = engine.pool.layout.least_bytes(engine.pool.layout.specs, size)
    assert blocks * whole <= 32 * 2**20 < (blocks + 1) * whole
