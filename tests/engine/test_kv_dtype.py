"""Engines whose keys and values are stored in few bits: what they do with a cache they do as with
any other, and what a model says stays near."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cache import Copier
from pyramidinfer.codec import CODECS
from pyramidinfer.engine import Engine
from pyramidinfer.engine.memory import full_bytes
from pyramidinfer.engine.request import Request
from pyramidinfer.lab.samples import Corpus
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Policy, StreamingLLM, make_policy
from tests.engine.build import bound_policy
from tests.engine.serving import NAMES, after, finish, queue, start, talk
from tests.engine.test_offload import down, files, on_disk
from tests.tiny import random_prompt, tiny_model

FEW = ("int8", "int4", "fp8")
#: A backend, and a dtype that it does not leave to another one.
WAYS = {"reference": torch.float64, "cpu": torch.float32}
BACKENDS = pytest.mark.parametrize("backend", WAYS)
DTYPES = pytest.mark.parametrize("kv_dtype", FEW)
#: Without state, with running scores, with a ring, by head, at once for all heads.
SEVERAL = ("full", "h2o", "scissorhands", "pyramid", "rkv")


def coded(
    kv_dtype: str, backend: str, name: str | Policy = "full", family: str = "llama", **options: Any
) -> Engine:
    policy = bound_policy(name, family, WAYS[backend]) if isinstance(name, str) else name
    options = {"kv_dtype": kv_dtype, "backend": backend, **options}
    return start(policy, family, WAYS[backend], **options)


def told(request: Request) -> tuple[Any, ...]:
    """What must be the same however a request got there."""
    assert request.kv is not None
    return request.output, request.kv.kept_len, request.kv.bytes, request.kv.full_bytes


@BACKENDS
@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_every_policy_runs(name: str, kv_dtype: str, backend: str) -> None:
    """Several at once, on poisoned pages; bytes are those of the pages that are held, and those of
    the full cache of 16 bits."""
    engine = coded(kv_dtype, backend, name, slot_scores=True)
    sizes = [(37, 9), (5, 12), (70, 6)]
    requests = [queue(engine, random_prompt(i, n), new) for i, (n, new) in enumerate(sizes)]
    finish(engine)
    layout, runner = engine.pool.layout, engine.runner
    for request, (length, new) in zip(requests, sizes, strict=True):
        kv = request.kv
        assert request.finish_reason == "length" and len(request.output) == new
        assert kv is not None and kv.seen_len == length + new - 1
        pages = sum(layout.pages_for(len_) for layer in kv.kept_len for len_ in layer)
        assert kv.bytes == pages * layout.page_bytes[0]
        assert kv.full_bytes == full_bytes(layout, runner, kv.seen_len)
    # keys and values of 8 channels: codes and a scale each; a position, a running score
    per_entry = 2 * (8 * CODECS[kv_dtype].bits // 8 + 2) + 4 + 4
    assert layout.page_bytes == [4 * per_entry]
    assert layout.uncoded_page_bytes.tolist() == [4 * (2 * 16 + 4 + 4)] * runner.depth


@BACKENDS
@DTYPES
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_chunks_of_a_prompt_change_nothing(kv_dtype: str, backend: str, family: str) -> None:
    """What is new is attended to as it will be read later, so it does not matter what is new."""
    answers = []
    for chunk in (1, 7, 16, 1024):
        engine = coded(kv_dtype, backend, family=family, prefill_chunk=chunk)
        request = queue(engine, random_prompt(3, 61), 12)
        finish(engine)
        answers.append(told(request))
    assert answers[1:] == answers[:1] * 3


@BACKENDS
@DTYPES
def test_decoding_a_text_equals_taking_it_in(kv_dtype: str, backend: str) -> None:
    """A prompt of one token more gives the token that decoding gave."""
    engine, prompt = coded(kv_dtype, backend), random_prompt(4, 30)
    whole = queue(engine, prompt, 8)
    finish(engine)
    for count in range(1, 8):
        again = queue(engine, prompt + whole.output[:count], 1)
        finish(engine)
        assert again.output == [whole.output[count]]


@BACKENDS
@DTYPES
@pytest.mark.parametrize("name", SEVERAL)
def test_samples_share_a_prompt(name: str, kv_dtype: str, backend: str) -> None:
    """Each answer is that of a request of its own, whose pages nobody shares."""
    engine = coded(kv_dtype, backend, name)
    hot = {"temperature": 1.0, "seed": 5}
    request = queue(engine, random_prompt(1, 39), 12, samples=2, **hot)
    finish(engine)
    found = [told(each) for each in (request, *request.samples)]
    assert len(found) == 2 and found[0][0] != found[1][0]
    for index, expected in enumerate(found):
        own = queue(engine, random_prompt(1, 39), 12, temperature=1.0, seed=5 + index)
        finish(engine)
        assert told(own) == expected


@BACKENDS
@DTYPES
def test_a_preempted_request_goes_on_as_if_it_had_not_been(kv_dtype: str, backend: str) -> None:
    """The older one comes to need all of the memory."""

    def ask(engine: Engine) -> list[Request]:
        return [queue(engine, random_prompt(seed, 24), 160 - seed) for seed in (1, 2)]

    roomy = coded(kv_dtype, backend)
    expected = ask(roomy)
    finish(roomy)
    size = int(expected[0].cost.bytes)
    scarce = {"admission": "overcommit", "expected_output": 0.0, "kv_memory": size}
    engine = coded(kv_dtype, backend, **scarce)
    requests = ask(engine)
    finish(engine)
    assert engine.scheduler.counts.swapped == engine.scheduler.counts.resumed > 0
    assert [told(each) for each in requests] == [told(each) for each in expected]


@BACKENDS
@DTYPES
def test_an_exported_cache_comes_back_to_the_bit(kv_dtype: str, backend: str) -> None:
    engine = coded(kv_dtype, backend, "h2o")
    request = queue(engine, random_prompt(1, 40), 12)
    while len(request.output) < 4:
        engine.step()
    pool, table = engine.pool, request.table

    def held(table: Any) -> list[Tensor]:
        layers = range(engine.runner.depth)
        return [read(table, i).clone() for i in layers for read in (pool.keys, pool.values)]

    before, size = held(table), pool.bytes(table)
    exported = Copier(pool).export(table)
    again = Copier(pool).import_(exported)
    assert pool.bytes(again) == size
    assert all(torch.equal(a, b) for a, b in zip(held(again), before, strict=True))
    pool.release(again)
    finish(engine)


@BACKENDS
@DTYPES
def test_a_rejected_draft_leaves_no_trace(kv_dtype: str, backend: str) -> None:
    engine = coded(kv_dtype, backend)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    turn = engine.add(random_prompt(1, 14), params, hold=True)
    while turn.finish_reason is None:
        engine.step()
    engine.truncate(turn, 11)
    again = engine.extend(turn, random_prompt(5, 9), SamplingParams(max_tokens=8, ignore_eos=True))
    while again.finish_reason is None:
        engine.step()
    alone = queue(engine, random_prompt(1, 14)[:11] + random_prompt(5, 9), 8)
    finish(engine)
    assert again.output == alone.output


@BACKENDS
@DTYPES
def test_turns_on_a_held_cache_equal_those_from_scratch(kv_dtype: str, backend: str) -> None:
    engine, fresh = coded(kv_dtype, backend), coded(kv_dtype, backend)
    text, held = random_prompt(1, 21), 0
    for number in range(2, 5):
        turn, scratch = talk(engine, text), talk(fresh, text, owner=None)
        assert turn.output == scratch.output and turn.reused == held
        held, text = len(turn.text) - 1, after(turn, number)


@BACKENDS
@DTYPES
def test_a_cache_comes_back_from_a_file_of_its_own_kv_dtype(
    kv_dtype: str, backend: str, tmp_path: Path
) -> None:
    """A file of another one is left alone, and found by who stores so."""
    undisturbed = coded(kv_dtype, backend, "h2o")
    turn = talk(undisturbed, random_prompt(1, 40))
    text = after(turn, 2)
    expected = talk(undisturbed, text)
    assert expected.reused == 45

    engine = coded(kv_dtype, backend, "h2o", **on_disk(tmp_path))
    assert talk(engine, random_prompt(1, 40)).output == turn.output
    down(engine, to_disk=True)
    engine.conversations.close()
    left = {each: each.read_bytes() for each in files(tmp_path)}
    assert len(left) == 1
    other = "auto" if kv_dtype == "int4" else "int4"
    engine = coded(other, backend, "h2o", **on_disk(tmp_path))
    assert talk(engine, text, owner="ann").reused == 0
    engine.conversations.clear()
    engine.conversations.close()
    assert {each: each.read_bytes() for each in files(tmp_path)} == left
    engine = coded(kv_dtype, backend, "h2o", **on_disk(tmp_path))
    again = talk(engine, text)
    assert again.reused == 45 and told(again) == told(expected)
    assert engine.conversations.hits_from == {"disk": 1}
    engine.conversations.close()


@BACKENDS
@DTYPES
def test_a_stream_goes_on_past_the_models_positions(kv_dtype: str, backend: str) -> None:
    """Keys are turned to places inside the cache, out of what is stored and back into it."""
    model = tiny_model("llama", WAYS[backend], max_position_embeddings=64)
    policy = StreamingLLM(sinks=4, window=16)
    options: dict[str, Any] = {"kv_memory": "4MiB", "page_size": 4, "backend": backend}
    params = SamplingParams(max_tokens=150, ignore_eos=True, logprobs=1)
    llm = LLM(model, policy, kv_dtype=kv_dtype, **options)
    (found,) = llm.generate([random_prompt(1, 30)], params)
    llm.engine.check()
    assert found.kv.seen_len == 179 and found.finish_reason == "length"
    assert all(head <= 20 for layer in found.kv.kept_len for head in layer)
    if kv_dtype == "int8":  # near enough for the first tokens, however often keys were turned
        (exact,) = LLM(model, policy, **options).generate([random_prompt(1, 30)], params)
        assert found.token_ids[:10] == exact.token_ids[:10]


# --- how near -----------------------------------------------------------------------------------


@cache
def passage() -> tuple[list[int], list[int]]:
    """A text in the shipped model's language, and how it goes on."""
    tokenizer = LLM(shipped_model(), "full", kv_memory="16MiB").tokenizer
    (found,) = Corpus(tokenizer, None).passages(3, 1, 400, 11)
    return found.context, found.continuation


@cache
def scored(kv_dtype: str, backend: str, name: str) -> tuple[Tensor, Tensor, list[int]]:
    """Logits ``[tokens, vocab]`` of the continuation on a compressed cache, their log-probabilities
    and a greedy answer."""
    options: dict[str, Any] = {"kv_memory": "64MiB", "dtype": "float32", "backend": backend}
    llm = LLM(shipped_model(), make_policy(name, KEEPS[name]), kv_dtype=kv_dtype, **options)
    context, continuation = passage()
    (score,) = llm.score([context], [continuation], logits=True)
    (answer,) = llm.generate([context], SamplingParams(max_tokens=12, temperature=0.0))
    assert score.logits is not None
    logits = score.logits.double()
    return logits, torch.log_softmax(logits, -1), answer.token_ids


#: Policies, and what they keep of the passage.
KEEPS = {"full": None, "pyramid": 0.3, "snapkv": 0.3}
#: Measured 9e-7, 2e-5 and 6e-4 at most: mean KL divergence, in nats.
NEAR = {"int8": 1e-5, "fp8": 2e-4, "int4": 5e-3}


@BACKENDS
@pytest.mark.parametrize("name", KEEPS)
def test_the_shipped_model_says_nearly_the_same(name: str, backend: str) -> None:
    """... as with keys and values as they are computed, by its next tokens; and of 11 logits rows
    none of int8 is further off than a hundredth of how far logits differ."""
    exact, likely, answer = scored("auto", backend, name)
    for kv_dtype in FEW:
        found, told, said = scored(kv_dtype, backend, name)
        assert not torch.equal(found, exact), "nothing was stored in few bits"
        divergence = float((likely.exp() * (likely - told)).sum(-1).mean())
        assert 0 < divergence < NEAR[kv_dtype], kv_dtype
        if kv_dtype == "int8":
            assert said == answer
            assert float((found - exact).abs().max()) < 0.01 * float(exact.max() - exact.min())


def test_heads_that_cannot_be_cut_are_refused_by_name() -> None:
    model = tiny_model("llama", head_dim=6)
    for kv_dtype in FEW:
        with pytest.raises(ValueError, match=f"kv_dtype='{kv_dtype}' needs .* this model has 6"):
            LLM(model, "full", kv_memory="4MiB", kv_dtype=kv_dtype)
    assert LLM(model, "full", kv_memory="4MiB").engine.config.kv_dtype == "auto"


def test_values_that_cannot_be_cut_are_refused_too() -> None:
    runner = ModelRunner(tiny_model("llama"), "reference")
    runner.shapes = [replace(each, value_dim=6) for each in runner.shapes]
    with pytest.raises(ValueError, match="this model has 6"):
        runner.group_specs("int8")


def test_a_codec_changes_nothing_where_it_is_not_asked_for() -> None:
    layout = start("full", kv_dtype="auto").pool.layout
    assert layout.uncoded_page_bytes.tolist() == layout.layer_page_bytes.tolist()
