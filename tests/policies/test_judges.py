"""Every method against its judge: a float64 model with whole attention rows.

Entries kept per layer and head and their number at every step must be the same; logits agree to
rounding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.policies import make_policy
from pyramidinfer.policies.profile import Calibrated, Centres, Fingerprint, Profile
from pyramidinfer.types import Trace
from tests.policies import judge_model
from tests.policies.judge import Judge
from tests.policies.judge_model import exact_llama
from tests.tiny import VOCAB, random_prompt

NEW = 20
BITS = ("int8", "int4", "fp8")
SPANS = (3, 4, 20)
PER_HEAD = {
    "h2o",
    "scissorhands",
    "snapkv",
    "pyramidkv",
    "fastkv",
    "pyramid",
    "duo",
    "keydiff",
    "expected_attention",
    "kvzip",
    "rkv",
    "triattention",
}
BY_HEAD = {"duo", "pyramid"}  # some heads lose nothing
NEEDED = Profile(
    ((0.1, 0.9), (0.4, 0.2), (0.8, 0.3), (0.02, 0.05)),
    (True,) * 4,
    "a text",
    (9, 9),
    0.9,
    0.2,
    "a commit",
    Fingerprint("llama", (), ()),
)
FEW = {"profile": NEEDED, "sinks": 2, "recent": 9, "min_context": 8}
SHORT = {"profile": NEEDED, "min_context": 8, "recent": 5, "window": 8, "kernel": 7}
ZIPPED = {"min_text": 8, "question": (5, 6, 7), "question_from": (8, 9), "chunk_length": 30}
EARLY = {"start_layer": 1, "propagate_ratio": 0.4}
LATE = replace(NEEDED, share=((0.3, 0.1), (0.2, 0.5), (0.05, 0.4), (0.6, 0.02)))
KNOWN = replace(NEEDED, calibrated=Calibrated(1, 0.6, 0.5, 1.0, 0.8, 0.01, 900, 20, 2))
IDLE = replace(NEEDED, share=((0.3, 0.0), (1e-4, 0.5), (0.0, 0.4), (0.0, 0.02)))


def centres(seed: int, layers: int = 4, heads: int = 4, dim: int = 8) -> Centres:
    """Random ones, each pair's mean length at least that of its mean."""
    mean = torch.randn(layers, heads, dim, generator=torch.Generator().manual_seed(seed))
    left, right = mean.chunk(2, dim=-1)
    sizes = left.hypot(right) * 1.5 + 0.1 * left.abs()
    return Centres(
        *(
            tuple(tuple(tuple(row) for row in layer) for layer in each.tolist())
            for each in (mean, sizes)
        )
    )


KNOWS = {"profile": replace(NEEDED, queries=centres(1)), "pin_prompt": False}
OTHERS = {**KNOWS, "profile": replace(NEEDED, queries=centres(2))}
PINNED = {**KNOWS, "pin_prompt": True}
TOLD = {"capacity": 30, "buffer": 4}
GUIDED = {**KNOWS, **TOLD}
CASES: list[tuple[str, float | None, tuple[int, ...], dict[str, Any]]] = [
    ("streaming_llm", 0.4, (), {}),
    ("streaming_llm", None, SPANS, {"sinks": 2, "window": 17}),
    ("h2o", 0.4, SPANS, {}),
    ("h2o", None, (), {}),
    ("h2o", None, (), {"heavy_ratio": 0.2, "recent_ratio": 0.1}),
    ("h2o", None, (), {"heavy_ratio": 0.1, "recent_ratio": 0.35}),
    ("scissorhands", 0.5, (), {}),
    ("scissorhands", 0.5, SPANS, {"window": 9, "recent": 3, "drop": 0.2, "rise": 0.5}),
    ("scissorhands", None, (), {"budget_ratio": 0.3, "recent": 3, "rise": 0.0}),
    ("snapkv", 0.4, (), {"window": 8}),
    ("snapkv", None, SPANS, {"window": 12, "kernel": 3, "capacity": 20, "pooling": "max"}),
    ("snapkv", 0.3, (), {"window": 1, "kernel": 1}),
    ("snapkv", 0.4, (), {"window": 8, "adaptive": True}),
    ("snapkv", 0.3, SPANS, {"window": 4, "adaptive": True, "safeguard": 0.5, "kernel": 3}),
    ("pyramidkv", 0.5, (), {"adaptive": True, "safeguard": 0.0}),
    ("duo", 0.5, (), FEW),
    ("duo", 0.3, SPANS, {**FEW, "stride": 3}),
    ("duo", 0.6, SPANS, {**FEW, "spare": 0.0}),
    ("duo", 0.5, (), {**FEW, "spare": 0.4, "min_context": 100, "stride": 1}),
    ("pyramidkv", 0.5, (), {}),
    ("pyramidkv", None, SPANS, {"capacity": 30, "beta": 2.0, "pooling": "max"}),
    ("tova", 0.5, (), {}),
    ("tova", None, SPANS, {"capacity": 20}),
    ("chunkkv", 0.5, (), {"window": 8}),
    ("chunkkv", None, SPANS, {"window": 5, "chunk_length": 7, "retain_ratio": 0.4}),
    ("keydiff", 0.5, (), {}),
    ("keydiff", None, SPANS, {"capacity": 20}),
    ("expected_attention", 0.5, (), {}),
    ("expected_attention", None, SPANS, {"retain_ratio": 0.3, "ahead": 40, "epsilon": 0.0}),
    ("expected_attention", 0.4, (), {"adaptive": False, "sinks": 0}),
    ("rkv", 0.4, (), {"buffer": 4}),
    ("rkv", 0.6, (), {"buffer": 3, "window": 24}),
    (
        "rkv",
        None,
        SPANS,
        {
            "capacity": 20,
            "buffer": 7,
            "window": 3,
            "kernel": 3,
            "mix": 0.6,
            "threshold": 0.2,
        },
    ),
    ("rkv", 0.3, (), {"buffer": 1, "window": 1, "kernel": 1, "mix": 0.0}),
    ("rkv", 0.3, SPANS, {"buffer": 9, "mix": 1.0, "threshold": 1.0}),
    ("triattention", 0.4, (), {**KNOWS, "buffer": 4}),
    ("triattention", 0.5, (), {**OTHERS, "buffer": 1}),
    ("triattention", None, SPANS, {**KNOWS, "capacity": 20, "buffer": 7, "offset_max": 100}),
    ("kvzip", 0.4, (), ZIPPED),
    ("kvzip", 0.3, SPANS, {**ZIPPED, "sinks": 0, "chunk_length": 2048}),
    ("kvzip", 0.2, (), {"min_text": 8, "sinks": 1, "chunk_length": 7}),
    ("fastkv", None, (), {"propagate_ratio": 0.4, "retain_ratio": 0.3}),
    ("fastkv", 0.4, SPANS, {"layer": 0, "window": 4}),
    ("fastkv", 0.5, (), {"layer": 2, "kernel": 3, "pooling": "max"}),
    ("pyramid", 0.4, (), SHORT),
    ("pyramid", None, SPANS, {**SHORT, "sharpness": 1.0}),
    ("pyramid", 0.4, SPANS, {**SHORT, **EARLY}),
    ("pyramid", 0.3, (), {**SHORT, "start_layer": 0, "propagate_ratio": 0.45, "kernel": 1}),
    (
        "pyramid",
        0.35,
        (),
        {
            **SHORT,
            "kernel": 1,
            "sinks": 0,
            "recent": 1,
            "window": 5,
            "min_context": 1,
            "safeguard": 0.0,
        },
    ),
    ("pyramid", 0.4, (), {**SHORT, "safeguard": 1.0, "window": 20}),
    ("pyramid", 0.33, SPANS, {**SHORT, "safeguard": 0.7, "sharpness": 4.0}),
    ("pyramid", 0.8, (), {**SHORT, "stride": 3}),
    ("pyramid", 0.3, (), {**SHORT, "profile": LATE, "kernel": 31}),
    ("pyramid", 0.6, SPANS, {**SHORT, "profile": LATE, "stride": 1}),
    ("pyramid", 0.5, (), {**SHORT, "profile": LATE, "start_layer": 1}),
    ("pyramid", 0.4, (), {**SHORT, "profile": KNOWN}),
    ("pyramid", 0.5, (), {**SHORT, "profile": KNOWN, "propagate_ratio": 0.3}),
    ("pyramid", 0.5, SPANS, {**SHORT, "profile": KNOWN, "start_layer": 0}),
    ("pyramid", 0.3, (), {**SHORT, "window": 1, "recent": 9, "sinks": 1}),
    ("pyramid", 0.3, (), {**SHORT, "min_context": 100}),
    ("pyramid", 0.2, (), {**SHORT, "min_context": 90, "start_layer": 2, "propagate_ratio": 0.3}),
    ("pyramid", 0.5, SPANS, {**SHORT, "start_layer": 1, "propagate_ratio": 0.1, "window": 20}),
    ("pyramid", 0.8, (), {**SHORT, **EARLY}),
    ("pyramid", 0.9, SPANS, {**SHORT, "profile": KNOWN}),
    ("pyramid", 0.7, (), {**SHORT, "profile": IDLE, "sharpness": 8}),
    ("pyramid", 0.2, (), {**SHORT, "recent": 32, "stride": 5}),
]


class Verdict(NamedTuple):
    """What the judge found, as the engine's trace would say it."""

    prefill: list[list[list[int]]]
    kept: list[list[list[int]]]
    lengths: list[list[list[int]]]
    tokens: list[int]
    prefill_logits: Tensor
    final_logits: Tensor


@cache
def model() -> Any:
    return exact_llama()


def engine(
    method: str, keep: float | None, chunk: int, kv_dtype: str = "auto", **options: Any
) -> LLM:
    return LLM(
        model(),
        policy=make_policy(method, keep, **options),
        kv_memory="4MiB",
        page_size=4,
        prefill_chunk=chunk,
        kv_dtype=kv_dtype,
    )


def judged(judge: Judge, prompt: list[int], tokens: list[int]) -> Verdict:
    before = logits = judge.read(prompt)
    prefill, lengths, chosen = judge.positions(), [], []
    for token in tokens:
        chosen.append(int(logits.argmax()))
        logits = judge.decode(token)
        lengths.append(judge.lengths())
    return Verdict(prefill, judge.positions(), lengths, chosen, before, logits)


def as_lists(positions: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[head.tolist() for head in layer] for layer in positions]


def check(trace: Trace, verdict: Verdict) -> None:
    assert as_lists(trace.prefill_positions) == verdict.prefill
    assert trace.kept_len_by_step == verdict.lengths
    assert as_lists(trace.kept_positions) == verdict.kept
    assert trace.token_ids == verdict.tokens
    for logits, expected in (
        (trace.prefill_logits, verdict.prefill_logits),
        (trace.final_logits, verdict.final_logits),
    ):
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(("method", "keep", "protect", "options"), CASES)
def test_method_equals_its_judge(
    method: str, keep: float | None, protect: tuple[int, ...], options: dict[str, Any]
) -> None:
    """Two prompts, one taken in whole and in chunks, then generation."""
    for seed, (length, chunks) in enumerate(((80, (1024, 13)), (55, (13,)))):
        prompt, verdict = random_prompt(seed, length), None
        for chunk in chunks:
            llm = engine(method, keep, chunk, **options)
            spans = [(each, each + 1) for each in protect]
            trace = llm.trace(prompt, max_tokens=NEW, protect=spans)
            if verdict is None:
                judge = Judge(model(), method, keep, protect, **options)
                verdict = judged(judge, prompt, trace.token_ids)
            check(trace, verdict)
            llm.engine.check()
        assert verdict is not None
        shorter = [min(map(len, layer)) < length for layer in verdict.prefill[1:]]
        some = any if method in BY_HEAD else all
        assert some(shorter), "nothing was dropped"
        assert all(set(protect) <= set(head) for layer in verdict.kept for head in layer)
        differ = any(layer[0] != layer[1] for layer in verdict.kept)
        assert differ == (method in PER_HEAD), "heads differ where the method chooses per head"


@pytest.mark.parametrize(
    ("kv_dtype", "method", "keep", "protect", "options"),
    [(kv_dtype, *case) for kv_dtype, case in zip(cycle(BITS), CASES, strict=False)],
)
def test_method_equals_its_judge_in_few_bits(
    kv_dtype: str,
    method: str,
    keep: float | None,
    protect: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    """Rules see keys, values and attention as they are stored: not an entry more or less."""
    prompt, spans = random_prompt(0, 80), [(each, each + 1) for each in protect]
    llm = engine(method, keep, 13, kv_dtype, **options)
    trace = llm.trace(prompt, max_tokens=NEW, protect=spans)
    judge = Judge(model(), method, keep, protect, kv_dtype, **options)
    check(trace, judged(judge, prompt, trace.token_ids))
    llm.engine.check()


@pytest.mark.parametrize(
    ("method", "options", "broken"),
    [
        ("streaming_llm", {"sinks": 2, "window": 17}, {"sinks": 3, "window": 16}),
        ("h2o", {}, {"heavy_ratio": 0.05, "recent_ratio": 0.15}),
        ("scissorhands", {"window": 20, "recent": 3}, {"window": 19, "recent": 3}),
        ("snapkv", {"window": 8, "capacity": 30}, {"window": 7, "capacity": 30}),
        ("snapkv", {"window": 8, "capacity": 30, "adaptive": True}, {"window": 8, "capacity": 30}),
        ("pyramidkv", {"capacity": 30}, {"capacity": 30, "kernel": 5}),
        ("tova", {"capacity": 20}, {"capacity": 21}),
        (
            "chunkkv",
            {"window": 8, "retain_ratio": 0.4},
            {"window": 8, "retain_ratio": 0.4, "chunk_length": 9},
        ),
        ("chunkkv", {"window": 8, "retain_ratio": 0.4}, {"window": 9, "retain_ratio": 0.4}),
        ("keydiff", {"capacity": 20}, {"capacity": 19}),
        ("expected_attention", {}, {"ahead": 400}),
        ("expected_attention", {}, {"epsilon": 0.01}),
        ("expected_attention", {}, {"adaptive": False}),
        ("rkv", TOLD, {**TOLD, "capacity": 29}),
        ("rkv", TOLD, {**TOLD, "buffer": 5}),
        ("rkv", TOLD, {**TOLD, "window": 7}),
        ("rkv", TOLD, {**TOLD, "kernel": 5}),
        ("rkv", TOLD, {**TOLD, "mix": 0.2}),
        ("rkv", TOLD, {**TOLD, "threshold": 0.6}),
        ("triattention", GUIDED, {**GUIDED, "capacity": 29}),
        ("triattention", GUIDED, {**GUIDED, "buffer": 5}),
        ("triattention", GUIDED, {**GUIDED, "offset_max": 32768}),
        ("triattention", GUIDED, {**GUIDED, **OTHERS}),
        ("triattention", GUIDED, {**GUIDED, **PINNED}),
        ("triattention", {**GUIDED, **PINNED, "capacity": 9}, {**PINNED, **TOLD, "capacity": 8}),
        ("kvzip", ZIPPED, {**ZIPPED, "question": (5, 6, 8)}),
        ("kvzip", ZIPPED, {**ZIPPED, "question_from": (8,)}),
        ("kvzip", ZIPPED, {**ZIPPED, "chunk_length": 31}),
        ("kvzip", {**ZIPPED, "sinks": 12}, {**ZIPPED, "sinks": 13}),
        ("fastkv", {"retain_ratio": 0.3}, {"retain_ratio": 0.3, "layer": 2}),
        ("pyramid", SHORT, {**SHORT, "kernel": 5}),
        ("pyramid", SHORT, {**SHORT, "window": 7}),
        ("pyramid", SHORT, {**SHORT, "recent": 6}),
        ("pyramid", SHORT, {**SHORT, "sinks": 3}),
        ("pyramid", SHORT, {**SHORT, "sharpness": 1.5}),
        ("pyramid", SHORT, {**SHORT, "safeguard": 0.5}),
        ("pyramid", {**SHORT, **EARLY}, {**SHORT, **EARLY, "start_layer": 0}),
        ("pyramid", {**SHORT, **EARLY}, {**SHORT, **EARLY, "propagate_ratio": 0.5}),
        ("pyramid", SHORT, {**SHORT, "min_context": 100}),
        ("pyramid", SHORT, {**SHORT, "profile": LATE}),
        ("pyramid", {**SHORT, "stride": 2}, {**SHORT, "stride": 1}),
    ],
)
def test_a_slightly_different_rule_is_noticed(
    method: str, options: dict[str, Any], broken: dict[str, Any]
) -> None:
    """These tests can fail: the judge of a neighbouring rule disagrees."""
    prompt = random_prompt(0, 80)
    trace = engine(method, None, 1024, **options).trace(prompt, max_tokens=NEW)
    judge = Judge(model(), method, **broken)
    judge.read(prompt)
    for token in trace.token_ids:
        judge.decode(token)
    assert as_lists(trace.kept_positions) != judge.positions()


@pytest.mark.parametrize("kv_dtype", BITS)
@pytest.mark.parametrize(("method", "options"), [("snapkv", {}), ("streaming_llm", {"window": 16})])
def test_numbers_stored_otherwise_are_noticed(
    method: str, options: dict[str, Any], kv_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of numbers that were not turned first give other logits."""
    trace = engine(method, None, 13, kv_dtype, **options).trace(random_prompt(0, 80), NEW)

    def off() -> float:
        judge = Judge(model(), method, kv_dtype=kv_dtype, **options)
        logits = judge.read(trace.prompt_token_ids)
        for token in trace.token_ids:
            logits = judge.decode(token)
        return float((trace.final_logits - logits).abs().max())

    assert off() < 1e-9
    monkeypatch.setattr(judge_model, "hadamard", lambda size: torch.eye(size, dtype=torch.float64))
    assert off() > 1e-4


def test_wrong_rotary_positions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions in the text instead of the cache: the same entries stay, but logits differ."""
    trace = engine("streaming_llm", None, 1024, window=16).trace(random_prompt(0, 80), NEW)
    monkeypatch.setattr(Judge, "_places", lambda self, held: held)
    judge = Judge(model(), "streaming_llm", window=16)
    logits = judge.read(trace.prompt_token_ids)
    for token in trace.token_ids:
        logits = judge.decode(token)
    assert as_lists(trace.kept_positions) == judge.positions()
    assert float((trace.final_logits - logits).abs().max()) > 1e-3


@pytest.mark.parametrize(("method", "options"), [("rkv", {}), ("triattention", KNOWS)])
def test_long_answers_are_cut_every_128_tokens(method: str, options: dict[str, Any]) -> None:
    """As published: a prompt below the budget, then three cuts of one layer after another."""
    options = {**options, "capacity": 60}
    trace = engine(method, None, 1024, **options).trace(random_prompt(5, 50), 400)
    judge = Judge(model(), method, **options)
    verdict = judged(judge, trace.prompt_token_ids, trace.token_ids)
    check(trace, verdict)
    counts = [heads[0] for heads in (step[0] for step in trace.kept_len_by_step)]
    assert max(counts) == 60 + 128 - 1
    assert [at for at, count in enumerate(counts) if count == 60 and at > 10] == [137, 265, 393]


@pytest.mark.parametrize(
    ("keep", "options"),
    [(0.1, {"buffer": 4}), (None, {"buffer": 1, "capacity": 6}), (None, {"capacity": 5})],
)
def test_a_pinned_prompt_stays_beside_the_budget(
    keep: float | None, options: dict[str, Any]
) -> None:
    """Whole, protected or not; of the answer the judge's entries are left, and as many as said."""
    prompt, options = random_prompt(3, 60), {**PINNED, **options}
    llm = engine("triattention", keep, 13, **options)
    trace = llm.trace(prompt, max_tokens=150, protect=[(3, 5)])
    judge = Judge(model(), "triattention", keep, (3, 4), **options)
    check(trace, judged(judge, prompt, trace.token_ids))
    budget, buffer = options.get("capacity", 6), options.get("buffer", 128)
    for heads in (head for layer in trace.kept_positions for head in layer):
        assert {*range(60)} < set(heads.tolist())
    most = [max(max(layer) for layer in step) for step in trace.kept_len_by_step]
    assert max(most) == 60 + budget + buffer - 1
    forecast = llm.policy.forecast(60, 150, llm.engine.runner.layers_for(210))
    assert forecast.kept == [60 + budget + buffer] * 4, "the newest is written before others go"
    llm.engine.check()


@pytest.mark.parametrize(
    ("method", "keep", "options"),
    [
        ("streaming_llm", 0.4, {}),
        ("h2o", 0.4, {}),
        ("scissorhands", 0.5, {"window": 12}),
        ("snapkv", 0.4, {"window": 8}),
        ("snapkv", 0.4, {"window": 8, "pooling": "max"}),
        ("pyramidkv", 0.5, {}),
        ("snapkv", 0.4, {"window": 8, "adaptive": True}),
        ("duo", 0.4, FEW),
        ("duo", 0.5, {**FEW, "spare": 0.4, "stride": 5}),
        ("tova", 0.4, {}),
        ("chunkkv", 0.5, {"window": 8}),
        ("keydiff", 0.4, {}),
        ("expected_attention", 0.5, {}),
        ("rkv", 0.4, {"buffer": 5}),
        ("rkv", 0.4, {"buffer": 3, "window": 28}),
        ("triattention", 0.4, {**KNOWS, "buffer": 5}),
        ("triattention", 0.1, {**PINNED, "buffer": 5}),
        ("triattention", None, {**PINNED, "buffer": 1, "capacity": 3}),
        ("kvzip", 0.4, ZIPPED),
        ("kvzip", 0.3, {**ZIPPED, "min_text": 28, "chunk_length": 2048}),
        ("fastkv", None, {"retain_ratio": 0.3, "propagate_ratio": 0.5}),
        ("pyramid", 0.4, SHORT),
        ("pyramid", 0.4, {**SHORT, **EARLY}),
        ("pyramid", 0.5, {**SHORT, "profile": LATE, "kernel": 1, "stride": 3}),
        ("pyramid", 0.3, {**SHORT, "window": 28, "sinks": 2, "min_context": 1}),
        ("pyramid", 0.3, {**SHORT, "min_context": 90, "sharpness": 1.0}),
    ],
)
def test_further_turns_equal_the_judge(
    method: str, keep: float | None, options: dict[str, Any]
) -> None:
    """Three turns on one compressed cache: positions after each, log-probabilities throughout."""
    llm = engine(method, keep, 13, **options)
    judge = Judge(model(), method, keep, SPANS, **options)
    request, last = None, []
    for seed, (length, new) in enumerate(((60, 8), (25, 20), (30, 20))):
        prompt = random_prompt(seed, length)
        params = SamplingParams(max_tokens=new, ignore_eos=True, logprobs=VOCAB)
        if request is None:
            spans = [(each, each + 1) for each in SPANS]
            request = llm.engine.add(prompt, params, hold=True, protect=spans)
        else:
            request = llm.engine.extend(request, prompt, params, hold=True)
        while request.finish_reason is None:
            llm.engine.step()
        logits = judge.read(last + prompt)
        for step, (token, found) in enumerate(zip(request.output, request.logprobs, strict=True)):
            expected = torch.log_softmax(logits, -1)
            top = torch.tensor([found.top[each] for each in range(VOCAB)], dtype=torch.float64)
            torch.testing.assert_close(top, expected, atol=1e-9, rtol=0)
            if step < new - 1:  # the last token is fed with the next turn
                logits = judge.decode(token)
        last = request.output[-1:]
        table, pool = request.table, llm.engine.pool
        found = [
            [head[head >= 0].sort().values for head in pool.positions(table, layer)]
            for layer in range(judge.depth)
        ]
        assert as_lists(found) == judge.positions()
    assert min(map(min, judge.lengths())) < judge.seen, "nothing was dropped"
    llm.engine.release(request)
    llm.engine.check()


@pytest.mark.parametrize(("method", "keep", "protect", "options"), CASES[::2])
def test_scored_continuation_equals_the_judge(
    method: str, keep: float | None, protect: tuple[int, ...], options: dict[str, Any]
) -> None:
    """A continuation attends to what was kept of its context, and loses nothing itself."""
    prompt, more = random_prompt(0, 60), random_prompt(1, 10)
    spans = [(each, each + 1) for each in protect]
    (score,) = engine(method, keep, 13, **options).score([prompt], [more], protect=spans)
    judge = Judge(model(), method, keep, protect, **options)
    logits = [judge.read(prompt)]
    setattr(judge, method, lambda seen, **options: None)
    logits += [judge.decode(token) for token in more[:-1]]
    expected = torch.stack(logits).log_softmax(-1)
    chosen = [float(row[token]) for row, token in zip(expected, more, strict=True)]
    assert score.logprobs == pytest.approx(chosen, abs=1e-9)
    assert score.kv.kept_len == tuple(
        tuple(each - len(more) + 1 for each in heads) for heads in judge.lengths()
    )
