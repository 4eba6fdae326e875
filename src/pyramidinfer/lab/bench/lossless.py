"""``bench lossless``: the full cache with drafts compared with the full cache without drafts.

For a model with its weights, prompts are real text, and the acceptance rate of drafts is measured.
Random weights cannot draft: the cache is filled with random numbers, drafting runs at its real
cost, and each draft token is then accepted or rejected at a given rate (*simulated*).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyramidinfer.cache import Layout
from pyramidinfer.cache.mover import Slots
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.drafting import Drafter
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.english import ENGLISH, english
from pyramidinfer.engine.memory import full_bytes
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.shared import Shared
from pyramidinfer.lab.bench.plans import AUTO, MOST_TOKENS, LosslessPlan
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.bench.timing import ratios, spread
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.shapes import make_model
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import load_model
from pyramidinfer.policies import Full, Lossless, Policy
from pyramidinfer.policies.registry import parse_policy
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["LosslessPlan", "expected_speed", "run_lossless"]

#: Tokens that a measured request adds to a held one.
FED = 4


class Timed(NamedTuple):
    """Decode times of some requests, and their answers."""

    seconds: float
    outputs: list[TokenIds]
    requests: list[Request]


def expected_speed(rate: float, count: int, read: float, cache: float) -> float:
    """Speedup of memory-bound decode by ``count`` draft tokens per step: tokens per step divided by
    the bytes that drafting and verification read, relative to a step without drafts.

    rate : acceptance rate of draft tokens;  read : share of the cache that drafting reads;  cache :
    bytes of the caches divided by bytes of the weights.
    """
    tokens = sum(rate**number for number in range(count + 1))
    return tokens / (count * (1 + read * cache) / (1 + cache) + 1)


def run_lossless(plan: LosslessPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result: one row per context, batch, drafting policy
    and number of draft tokens."""
    plan.check()
    runner, text, weights = _load(plan)
    longest = max(context for context, _ in plan.cells) + FED + plan.output_len
    if longest > runner.max_positions:
        raise ValueError(f"{longest} tokens exceed the model's {runner.max_positions} positions")
    rows: list[dict[str, Any]] = []
    with progress("lossless", len(plan.cells) * len(plan.drafts)) as done:
        for context, batches in plan.cells:
            for spec in plan.drafts:
                rows += _cell(plan, runner, text, weights, context, batches, spec)
                done(f"{context} {spec}")
    text_name = "random numbers in the cache" if plan.accept is not None else ENGLISH
    result = {"backend": runner.backend.name, "weight_bytes": weights, "text": text_name}
    result["rows"] = rows
    if plan.check_prompts:
        result["checked"] = _check_answers(plan, runner, text)
    write_result(out, asdict(plan), result)
    return result


def _load(plan: LosslessPlan) -> tuple[ModelRunner, TokenIds, int]:
    """The packed model, a long text for it, and the bytes of its weights."""
    if plan.shape is not None:
        model = make_model(plan.shape, plan.dtype, plan.device, plan.seed)
        draw = np.random.default_rng(plan.seed)
        text = draw.integers(3, model.config.vocab_size, MOST_TOKENS).tolist()
    else:
        loaded = load_model(str(plan.model), AUTO, plan.dtype, plan.device)
        model, text = loaded.model, loaded.tokenizer(english())["input_ids"]
    weights = sum(each.nbytes for each in {id(p): p for p in model.parameters()}.values())
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        weights -= model.get_input_embeddings().weight.nbytes  # of which a step reads a few rows
    return ModelRunner(model, AUTO, EngineConfig().prefill_chunk, own=True), text, weights


def _cell(
    plan: LosslessPlan,
    runner: ModelRunner,
    text: TokenIds,
    weights: int,
    context: int,
    batches: list[int],
    spec: str,
) -> list[dict[str, Any]]:
    """Rows of one context and drafting policy: every batch and number of draft tokens."""
    most = max(batches)
    starts = np.linspace(0, max(0, len(text) - context - FED), most).astype(int).tolist()
    prompts = [text[start : start + context + FED] for start in starts]
    full, mine = (_engine(plan, runner, each, context, most) for each in (Full(), _draft(spec)))
    held = [_hold(plan, each, prompts, context) for each in (full, mine)]
    rows = []
    for batch in batches:
        truth = _timed(plan, full, held[0][:batch], prompts)
        works: dict[str, Callable[[], Timed]] = {
            "full": partial(_timed, plan, full, held[0][:batch], prompts)
        }
        drafters = {steps: _drafter(plan, mine.shared, steps, truth) for steps in plan.draft_tokens}
        found: dict[str, list[Timed]] = {name: [] for name in ("full", *drafters)}
        for steps, drafter in drafters.items():

            def work(drafter: Drafter = drafter, n: int = batch) -> Timed:
                mine.drafter = mine.committer.drafter = drafter
                return _timed(plan, mine, held[1][:n], prompts)

            works[steps] = work
            work()  # learns which drafts pay, and warms up memory
        for _ in range(plan.repeats):
            for name, run in works.items():
                found[name].append(run())
        for steps in plan.draft_tokens:
            row = {"context": context, "batch": batch, "drafts": spec, "draft_tokens": steps}
            rows.append(row | _row(plan, runner, weights, context, batch, found, steps, truth))
    for engine, requests in zip((full, mine), held, strict=True):
        for request in requests:
            engine.release(request)
    return rows


def _row(
    plan: LosslessPlan,
    runner: ModelRunner,
    weights: int,
    context: int,
    batch: int,
    found: dict[str, list[Timed]],
    steps: str,
    truth: Timed,
) -> dict[str, Any]:
    runs, base = found[steps], found["full"]
    assert all(run.outputs == truth.outputs for run in (*runs, *base)), "the answers differ"
    seconds = {name: [run.seconds for run in found[name]] for name in ("full", steps)}
    told = [each.drafting for run in runs for each in run.requests if each.drafting]
    drafted, accepted, verified = (
        sum(getattr(each, name) for each in told)
        for name in ("drafted", "accepted", "verifications")
    )
    tokens = batch * (plan.output_len - 1)
    page = plan.page_size
    shares = [
        each.draft_view.share(len(each.text) - 1, page)
        for run in runs
        for each in run.requests
        if each.draft_view is not None
    ]
    read = float(np.mean(shares)) if shares else 1.0
    entry = full_bytes(_layout(plan, runner), runner, context)
    mean = drafted / verified if verified else 0.0
    rate = _rate_of(accepted / verified, mean) if verified and mean else 0.0
    cache = batch * entry / weights
    return {
        "tokens_per_second": spread([tokens / each for each in seconds[steps]]),
        "full_tokens_per_second": spread([tokens / each for each in seconds["full"]]),
        "speedup": ratios(seconds["full"], seconds[steps]),
        "cache_over_weights": cache,
        "read_share": read,
        "drafted": drafted,
        "accepted": accepted,
        "verifications": verified,
        "rate": rate,
        "expected": expected_speed(rate, round(mean), read, cache) if mean else 1.0,
        "simulated": plan.accept is not None,
    }


def _rate_of(accepted: float, count: float) -> float:
    """The acceptance rate of a draft token at which this many of ``count`` are accepted on
    average."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        whole = int(count)
        tokens = sum(middle**number for number in range(1, whole + 1))
        tokens += (count - whole) * middle ** (whole + 1)
        low, high = (middle, high) if tokens < accepted else (low, middle)
    return low


def _check_answers(plan: LosslessPlan, runner: ModelRunner, text: TokenIds) -> dict[str, int]:
    """Answer prompts of 40 to 400 tokens with and without drafts, many in a batch; returns how many
    answers differ, and how many tokens were drafted and accepted."""
    count, longest = plan.check_prompts, 400
    starts = np.linspace(0, len(text) - longest, count).astype(int).tolist()
    prompts = [
        text[start : start + 40 + number * 37 % (longest - 39)]
        for number, start in enumerate(starts)
    ]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    answers = []
    for policy, steps in ((Full(), None), (_draft(plan.drafts[0]), 3)):
        config = EngineConfig(
            kv_dtype=plan.kv_dtype, page_size=plan.page_size, draft_tokens=steps, reuse_share=0.0
        )
        engine = Engine(runner, policy, config)
        requests = [engine.add(prompt, params) for prompt in prompts]
        while not all(each.ended for each in requests):
            engine.step()
        answers.append([each.output for each in requests])
    differ = sum(one != other for one, other in zip(*answers, strict=True))
    drafter = engine.drafter
    return {
        "prompts": count,
        "different": differ,
        "drafted": drafter.drafted,
        "accepted": drafter.accepted,
    }


# --- engines and what they hold ------------------------------------------------------------------


def _draft(spec: str) -> Policy:
    return Lossless(parse_policy(spec))


def _layout(plan: LosslessPlan, runner: ModelRunner) -> Layout:
    return Layout.smallest(runner.group_specs(), plan.page_size)


def _engine(
    plan: LosslessPlan, runner: ModelRunner, policy: Policy, context: int, count: int
) -> Engine:
    """An engine with room for held requests and for requests that continue on copies of their
    caches."""
    layout = _layout(plan, runner)
    size = full_bytes(layout, runner, context + FED + plan.output_len + 64)
    transient = 4 * context * runner.hidden_size * runner.dtype.itemsize
    config = EngineConfig(
        kv_memory=int(2.2 * count * size) + transient + layout.budget + 2**26,
        kv_dtype=plan.kv_dtype,
        page_size=plan.page_size,
        max_requests=2 * count + 1,
        reuse_share=0.0,
    )
    return Engine(runner, policy, config)


def _hold(
    plan: LosslessPlan, engine: Engine, prompts: list[TokenIds], context: int
) -> list[Request]:
    """A request for each prompt, all of whose tokens but the last few are in its cache."""
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    there = context if plan.accept is None else min(64, context)
    held = [engine.add(prompt[:there], params, hold=True) for prompt in prompts]
    while not all(each.ended for each in held):
        engine.step()
    for number, request in enumerate(held):
        request.output.clear()
        if plan.accept is not None:
            _fill(engine, request, prompts[number][:context], plan.seed + number)
    return held


def _fill(engine: Engine, request: Request, text: TokenIds, seed: int) -> None:
    """Fill a held cache with random entries, as if the whole text had been prefilled."""
    pool, table = engine.pool, request.table
    generator = torch.Generator(pool.device).manual_seed(seed)
    heads, context = pool.kv_heads, len(text)
    for layer in pool.own_layers:
        first = pool.lens(table)[layer].copy()
        pool.claim(table, layer, first, np.full(heads, context))
        group, places = pool.group(layer), np.arange(int(first[0]), context)
        pages = torch.from_numpy(table.pages[layer][:, places // pool.page_size].T.copy()).long()
        offsets = torch.from_numpy(places % pool.page_size)[:, None].expand(-1, heads)
        sizes = ((len(places), heads, each) for each in (group.spec.key_dim, group.spec.value_dim))
        keys, values = (
            torch.randn(*size, generator=generator, device=pool.device).to(group.spec.dtype)
            for size in sizes
        )
        slots = Slots(pages.to(pool.device), offsets.to(pool.device))
        pool.write(layer, slots, keys, values, torch.from_numpy(places).to(pool.device))
        table.kept[layer] = context
    table.seen_len, request.prompt = context, list(text)
    engine.ledger.reserve(request, engine.ledger.held(table))


def _timed(
    plan: LosslessPlan, engine: Engine, held: list[Request], prompts: list[TokenIds]
) -> Timed:
    """Continue held requests on copies of their caches, and time the decode steps after all
    requests have their first token."""
    params = SamplingParams(max_tokens=plan.output_len, ignore_eos=True)
    turns = [
        engine.branch(each, prompt[len(each.prompt) :], params)
        for each, prompt in zip(held, prompts, strict=False)
    ]
    start = 0.0
    for _ in engine.steps(turns):
        if not start and all(each.output for each in turns):
            assert all(len(each.output) == 1 for each in turns)
            start = time.perf_counter()
    return Timed(time.perf_counter() - start, [each.output for each in turns], turns)


# --- guesses that are right at a given rate ------------------------------------------------------


def _drafter(plan: LosslessPlan, shared: Shared, steps: str, truth: Timed) -> Drafter:
    count = None if steps == AUTO else int(steps)
    if plan.accept is None:
        return Drafter(shared, count)
    return Simulated(shared, count, plan.accept, plan.seed, truth)


class Simulated(Drafter):
    """Drafts with the model, and then makes each draft token right at a given rate.

    truth : the answers of the full cache; prompts identify requests.
    """

    def __init__(
        self, shared: Shared, steps: int | None, accept: float, seed: int, truth: Timed
    ) -> None:
        super().__init__(shared, steps)
        self._accept, self._draw = accept, np.random.default_rng(seed)
        pairs = zip(truth.requests, truth.outputs, strict=True)
        self._truth = {tuple(each.prompt): output for each, output in pairs}

    def _look_up(self, request: Request, room: int) -> TokenIds:
        return []

    def _guess(self, rooms: dict[Request, int], is_trial: bool = False) -> dict[Request, TokenIds]:
        made = super()._guess(rooms, is_trial)
        for request, tokens in made.items():
            right = self._truth[tuple(request.prompt)][len(request.output) :]
            drawn = self._draw.random(len(tokens)) < self._accept
            made[request] = [
                token if is_right else (token + 1) % self.shared.runner.vocab_size
                for token, is_right in zip(right, drawn, strict=False)
            ]
        return made
