"""The decode step on fixed buffers: the tokens of the layer loop, whatever the buffers held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.attention import triton_kernels
from pyramidinfer.cache import GroupSpec, Layout, Pool
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.engine import Engine
from pyramidinfer.models import ModelRunner, graphs
from pyramidinfer.models.decode import Decoding, Size
from pyramidinfer.models.graphs import DecodeGraphs, Step, round_pages, round_rows
from pyramidinfer.models.ops import TorchOps
from pyramidinfer.types import AttentionShape
from tests.engine.build import build, policy_named
from tests.tiny import random_prompt, tiny_model

if not (torch.cuda.is_available() or triton_kernels.INTERPRETED):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

LENGTHS, NEW = (5, 17, 40), (14, 6, 10)  # three requests, which end at different times


def triton_build(name: str, family: str = "llama", dtype: torch.dtype = torch.float64) -> LLM:
    """float64 goes to the reference behind the same backend, which is quick."""
    return build(name, family, dtype, backend="triton")


def answers(llm: LLM, lengths: tuple[int, ...] = LENGTHS, new: tuple[int, ...] = NEW) -> Any:
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in new]
    prompts = [random_prompt(seed, length) for seed, length in enumerate(lengths)]
    outputs = llm.generate(prompts, params)
    return [each.token_ids for each in outputs], [each.kv.kept_len for each in outputs]


def sizes(llm: LLM) -> list[Size]:
    return list(llm.engine.runner.graphs(llm.engine.pool).steps)


@pytest.fixture
def by_layer(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns fixed buffers off."""
    return lambda: monkeypatch.setattr(ModelRunner, "steps_on_buffers", False)


@pytest.mark.parametrize("name", ["full", "pyramidinfer", "pyramid", "h2o", "streaming_llm"])
def test_policies_get_what_the_layer_loop_gives_them(
    name: str, by_layer: Callable[[], None]
) -> None:
    llm = triton_build(name)
    got = answers(llm)
    assert {(size.rows, size.pages) for size in sizes(llm)} == {(4, 16), (2, 16), (1, 16)}
    by_layer()
    other = triton_build(name)
    assert got == answers(other) and not sizes(other)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "phi3", "smollm3"])
def test_families_get_what_the_layer_loop_gives_them(
    family: str, by_layer: Callable[[], None]
) -> None:
    llm = triton_build("pyramidinfer", family)
    got = answers(llm, (5, 60), (8, 12))
    assert sizes(llm)
    by_layer()
    assert got == answers(triton_build("pyramidinfer", family), (5, 60), (8, 12))


def test_with_the_kernels_themselves(by_layer: Callable[[], None]) -> None:
    llm = triton_build("h2o", dtype=torch.float32)
    got = answers(llm, (5, 9, 12), (3, 3, 3))
    assert sizes(llm) == [Size(4, 16, False, True)]
    by_layer()
    assert got == answers(triton_build("h2o", dtype=torch.float32), (5, 9, 12), (3, 3, 3))


def test_other_families_go_layer_by_layer() -> None:
    llm = triton_build("full", "gemma2")
    answers(llm, (5,), (3,))
    assert not llm.engine.runner.steps_on_buffers and not sizes(llm)


def test_growing_tables_move_to_the_next_size(by_layer: Callable[[], None]) -> None:
    llm = triton_build("full")
    got = answers(llm, (58, 5), (12, 12))  # pages of 4: the 65th entry needs a 17th page
    assert [size.pages for size in sizes(llm)] == [16, 32]
    by_layer()
    assert got == answers(triton_build("full"), (58, 5), (12, 12))


def test_a_text_beyond_the_last_position(by_layer: Callable[[], None]) -> None:
    """Streaming feeds tokens at places in the cache, not in the text."""

    def run() -> Any:
        model = tiny_model("llama", torch.float64, max_position_embeddings=48)
        llm = LLM(
            model, policy_named("streaming_llm"), kv_memory="4MiB", page_size=4, backend="triton"
        )
        return answers(llm, (20, 30), (60, 50)), sizes(llm)

    got, used = run()
    by_layer()
    assert used and got == run()[0] and len(got[0][0]) == 60


# --- rows and what they hold ---------------------------------------------------------------------


def decoding_engine(name: str, lengths: tuple[int, ...]) -> Engine:
    """An engine whose requests all decode."""
    engine = triton_build(name).engine
    for seed, length in enumerate(lengths):
        engine.add(random_prompt(seed, length), SamplingParams(max_tokens=50, ignore_eos=True))
    while engine.scheduler.waiting or engine.scheduler.prefilling or not engine.scheduler.running:
        engine.step()
    return engine


def test_spare_rows_write_to_a_page_that_nobody_owns() -> None:
    engine = decoding_engine("h2o", LENGTHS)
    engine.step()
    pool = engine.pool
    (group,) = pool.groups
    (step,) = engine.runner.graphs(pool).steps.values()
    host = step.decoding.host
    host["lengths"][:], host["tables"][:], host["pages"][:] = 9, 3, 3  # a page in use
    assert group.counts[3] == 1
    assert group.scratch == len(group.counts) == len(group.keys) - 1
    tables = [each.table for each in engine.scheduler.running if each.cache]
    before = [tensor.clone() for tensor in group.tensors()]
    kept = [table.kept.copy() for table in tables]
    engine.runner.forward(pool, engine._batch(engine.scheduler.plan()))
    written = torch.zeros_like(group.positions, dtype=torch.bool)
    for table, lengths in zip(tables, kept, strict=True):
        for layer in range(pool.layers):
            for head, length in enumerate(lengths[layer].tolist()):
                page, offset = divmod(length, pool.page_size)
                written[int(table.pages[layer, head, page]), offset] = True
    own = written.clone()
    written[group.scratch, 0] = True
    for tensor, old in zip(group.tensors(), before, strict=True):
        differs = (tensor != old) & ~(tensor.isnan() & old.isnan())
        differs = differs.any(-1) if differs.ndim == 3 else differs
        assert not (differs & ~written).any()
    assert group.keys[own].isfinite().all() and not group.keys[group.scratch, 0].eq(0).all()
    engine.pool.check()


def test_what_buffers_held_before_does_not_matter() -> None:
    """Fresh buffers against ones that held other requests, then anything at all."""
    engine = decoding_engine("pyramidinfer", (40, 33, 20, 9))
    for _ in range(2):
        engine.step()
    engine.abort(engine.scheduler.running[0])
    used, pool = engine.runner.graphs(engine.pool), engine.pool
    (step,) = used.steps.values()
    with torch.inference_mode():
        for each in step.decoding.ropes[None]:
            each.fill_(float("nan"))
        step.decoding.tokens.fill_(7)
    for name, part in step.decoding.host.items():
        part[:] = 3 if name in ("tables", "pages") else 2
    batch = engine._batch(engine.scheduler.plan())
    assert len(batch.decode) == 3
    before = [(table.kept.copy(), table) for table in (each.table for each in batch.decode)]
    logits, decoding = engine.runner.forward(pool, batch)
    assert decoding is step.decoding and decoding.queries is not None
    for kept, table in before:
        pool.retract(table, kept)
    del engine.runner._graphs[pool]
    fresh, other = engine.runner.forward(pool, batch)
    assert other is not None and other is not decoding and other.queries is not None
    assert len(used.steps) == 1 and logits.isfinite().all()
    assert torch.equal(logits, fresh)
    assert torch.equal(decoding.queries[:, :3], other.queries[:, :3])
    assert decoding.lse is not None and other.lse is not None
    assert torch.equal(decoding.lse[:, :3], other.lse[:, :3])


class Replayed:
    """What a CUDA graph is to the engine: the very call that was captured, again, with results in
    the same place."""

    replays = 0

    def __init__(self, step: Step, work: Callable[[], Tensor]) -> None:
        self.step, self.work, self.probs = step, work, dict(step.decoding.weights.by_layer)

    def replay(self) -> None:
        Replayed.replays += 1
        logits = self.work()
        assert self.step.out is not None
        self.step.out.copy_(logits)
        found = self.step.decoding.weights.by_layer
        for layer, old in self.probs.items():
            old.copy_(found[layer])
        self.step.decoding.weights.by_layer = dict(self.probs)


@pytest.mark.parametrize("name", ["pyramidinfer", "h2o"])
def test_a_captured_step_is_replayed(
    name: str, monkeypatch: pytest.MonkeyPatch, by_layer: Callable[[], None]
) -> None:
    captured: list[Size] = []

    def capture(self: DecodeGraphs, step: Step, work: Callable[[], Tensor]) -> None:
        captured.append(next(size for size, each in self.steps.items() if each is step))
        step.out, step.graph = work(), Replayed(step, work)  # type: ignore[assignment]

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(Replayed, "replays", 0)
    llm = triton_build(name)
    held = llm.engine.runner.graphs(llm.engine.pool)
    held.captures = True
    got = answers(llm, (30, 17, 40), (25, 9, 17))
    assert [size.rows for size in captured] == [4, 2, 1], "once each"
    used = [step.used for step in held.steps.values()]
    assert Replayed.replays == sum(used) - graphs.WARM_UP * len(used) > 12
    assert held.captured == 3
    by_layer()
    assert got == answers(triton_build(name), (30, 17, 40), (25, 9, 17))


class NoLook(TorchDispatchMode):
    """Refuses what would wait for a GPU or bring a list of numbers from the host to it."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(word in str(func) for word in self.REFUSED), func
        assert "lift_fresh" not in str(func) or args[0].ndim == 0, "torch.tensor of a list"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pyramidinfer", "h2o"])
def test_nothing_in_a_step_looks_at_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = decoding_engine(name, LENGTHS)
    run = engine.runner._decode
    seen = []

    def watched(*values: Any) -> Any:
        with NoLook():
            seen.append(1)
            return run(*values)

    monkeypatch.setattr(engine.runner, "_decode", watched)
    engine.step()
    assert seen
    for looks in (lambda: int(torch.ones(1).sum()), lambda: torch.tensor([1])):
        with NoLook(), pytest.raises(AssertionError):
            looks()


# --- sizes and parts -----------------------------------------------------------------------------


def test_sizes_are_few_and_large_enough() -> None:
    assert [round_rows(count) for count in (1, 2, 3, 5, 8, 9, 32, 33, 64, 65, 150)] == [
        1,
        2,
        4,
        8,
        8,
        16,
        32,
        40,
        64,
        80,
        160,
    ]
    for count in range(1, 600):
        assert count <= round_rows(count) <= max(count + 7, 1.25 * count)
        assert count <= round_pages(count) < max(graphs.LEAST_PAGES + 1, 2 * count)
    assert len({round_rows(count) for count in range(1, 513)}) < 26


def test_sizes_not_used_for_long_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST", 2)
    llm = triton_build("full")
    answers(llm)
    assert [size.rows for size in sizes(llm)] == [2, 1]


def test_parts_of_a_buffer_begin_where_kernels_like_it() -> None:
    """Triton compiles anew for pointers that are not multiples of 16 bytes."""
    spec = GroupSpec((0, 1, 2, 3, 4), 2, 8, 8, torch.float32)
    pool, shape = Pool(Layout([spec], 1 << 20)), AttentionShape(4, 2, 8, 8, None)
    made = Decoding(Size(3, 16, False, False), pool, shape, torch.empty(0), "replayed")
    plan = made.plan
    for part in (plan.tables, plan.lengths, plan.positions, made.pages, made.offsets, made.places):
        assert part.data_ptr() % 16 == 0 and part.is_contiguous()
    plan.lengths.zero_()
    made.host["lengths"][:] = 9
    assert not plan.lengths.any(), "the host's side is a copy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norm_rounds_before_the_weight(dtype: torch.dtype) -> None:
    """As transformers does: a norm that rounds once at the end differs in 16 bits."""
    x, weight = (torch.randn(40, 96).to(dtype), torch.randn(96).to(dtype))

    def plain(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(dtype, torch.float32))
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    got = TorchOps().norm(x, weight, 1e-6)
    if dtype == torch.bfloat16:
        assert torch.equal(got, plain(x))
        once = torch.nn.functional.rms_norm(x, (96,), weight, 1e-6)
        assert not torch.equal(got, once)
    torch.testing.assert_close(got, plain(x))


# --- one runner, several engines ----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_engines_share_a_model_runner(backend: str) -> None:
    dtype = torch.float64 if backend == "triton" else torch.float32
    runner = ModelRunner(tiny_model("llama", dtype), backend, own=True)
    config = EngineConfig(kv_memory="4MiB", page_size=4)
    engines = [Engine(runner, policy_named(name), config) for name in ("full", "h2o")]
    assert engines[0].runner is engines[1].runner
    prompt, params = random_prompt(1, 20), SamplingParams(max_tokens=8)
    running = [engine.add(prompt, params) for engine in engines]
    while any(request.finish_reason is None for request in running):  # in turns
        for engine in engines:
            if not engine.scheduler.idle:
                engine.step()
    for name, request in zip(("full", "h2o"), running, strict=True):
        alone = build(name, dtype=dtype, backend=backend).generate([prompt], params)[0]
        assert request.output == alone.token_ids and engines[0].end_ids == {2}
