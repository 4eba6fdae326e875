"""Bytes that a model over several ranks holds and sends, by formula: for sizes that are not at
hand.

Nothing is run.  Weights follow from the plan that splits linears and assigns layers; pages and
traffic from the lengths that a policy keeps, simulated layer by layer, token by token.
``bench scale`` compares this with runs (``docs/scaling.md``).
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch

from pyramidinfer.cache import Layout, Place
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.sharding import split_model
from pyramidinfer.models.stages import Stages, keep_stage
from pyramidinfer.policies import Policy
from pyramidinfer.types import Layers, Needs, Phase, State, View

__all__ = ["Split", "Work", "cache_bytes", "simulate", "weight_bytes", "wire_bytes"]

PAGE = 16
POSITION = 8  # bytes


class Work(NamedTuple):
    """The size of one request: prompt tokens and generated tokens."""

    prompt: int
    new: int


class Split(NamedTuple):
    """The number of ranks that split every layer, and the layers of each stage."""

    tensor: int
    layers: list[range]

    @property
    def ranks(self) -> int:
        return self.tensor * len(self.layers)


def weight_bytes(empty: Any, runner: ModelRunner, split: Split, stage: int = 0) -> int:
    """Weights of a stage's first rank; ``empty``, the model without weights, is cut to this
    stage."""
    if split.tensor > 1:
        split_model(empty, runner.shapes[0], Ranks(0, split.tensor))
    keep_stage(empty, Stages(split.layers, stage))
    different = {id(each): each for each in empty.parameters()}  # tied weights count once
    return sum(each.nbytes for each in different.values())


def cache_bytes(runner: ModelRunner, lens: list[list[int]], split: Split) -> list[int]:
    """Bytes of pages for entries ``[layers][kv_heads]`` on each rank: the ranks of the first stage,
    then of the next one."""
    specs = runner.group_specs()
    heads = Ranks(0, split.tensor).heads_by_rank(runner.kv_heads)
    places = [Place(layers, each) for layers in split.layers for each in heads]
    layout = Layout(specs, Layout.least_bytes(specs, PAGE), PAGE, places=places)
    pages = layout.pages_for(torch.tensor(lens).numpy())
    sizes = layout.layer_page_bytes
    return [int(rank @ sizes) for rank in layout.by_layer(pages)]


def simulate(
    runner: ModelRunner, policy: Policy, work: Work, split: Split
) -> tuple[list[Counter[str]], list[list[int]]]:
    """Bytes that every stage's first rank passes to collectives (``Ranks.sent``) and sends to other
    stages (``Stages.sent``) for one request, by purpose, and the entries at the end.

    ``ValueError`` for a policy that selects tokens during decode without a rule (``types.Best``),
    because its entries cannot be predicted.
    """
    layers = runner.layers_for(work.prompt + work.new)
    forecast = policy.forecast(work.prompt, 0, layers)
    size, steps = runner.dtype.itemsize, work.new - 1  # the last token is not fed
    hidden = runner.hidden_size * size
    outputs = list(forecast.reach)
    if runner.family.plain:  # the last layer outputs last tokens only
        outputs[-1] = 1
    policies, lens = _observed(runner, policy, work, layers, Ranks(0, split.tensor))
    found = []
    for stage, own in enumerate(split.layers):
        sent: Counter[str] = Counter()
        here, is_last = slice(own.start, own.stop), stage == len(split.layers) - 1
        if split.tensor > 1:
            sent["layers"] = 2 * (sum(outputs[here]) + steps * len(own)) * hidden
            sent["policy"] = sum(policies[here])
            if stage == 0:
                sent["embedding"] = (work.prompt + steps) * hidden
            if is_last:
                sent["logits"] = work.new * -(-runner.vocab_size // split.tensor) * size
        if not is_last:
            sent["rows"] = steps * hidden
            sent["prompts"] = forecast.reach[own.stop] * (hidden + POSITION)
        elif stage:
            sent["results"] = work.new * runner.vocab_size * size
        found.append(sent)
    return found, lens


def _observed(
    runner: ModelRunner, policy: Policy, work: Work, layers: Layers, ranks: Ranks
) -> tuple[list[int], list[list[int]]]:
    """Bytes gathered in each layer so that the policy sees all heads, and the entries at the
    end."""
    state, total = policy.start(layers), [0] * layers.count
    lens: list[list[int]] = []
    forecast = policy.forecast(work.prompt, 0, layers)
    kept = forecast.by_head(layers.kv_heads).tolist()
    ring = bool(policy.ring(work.prompt, work.new))
    for layer, reach in enumerate(forecast.reach):
        before, first = [reach] * layers.kv_heads, lens[layers.first] if lens else [reach]
        view = _view("prefill", layer, layers, work, reach, before, first, 0, state)
        needs = policy.needs(view)
        total[layer] += _joined(runner, needs, reach, ranks, min(needs.window, reach) or int(ring))
        lens.append(kept[layer])
        state = policy.prefilled(
            _view("prefill", layer, layers, work, 0, lens[-1], lens[layers.first], 0, state)
        )
    for step in range(1, work.new):
        lens = [[count + 1 for count in heads] for heads in lens]
        first, kept_now = list(lens[layers.first]), np.array(lens)
        room = policy.ceiling(kept_now, state, layers) + policy.slack - kept_now
        for layer in np.nonzero((room.min(1) < 0) & np.array(layers.governed))[0].tolist():
            heads = lens[layer]
            needs = policy.needs(_view("decode", layer, layers, work, 1, heads, first, step, state))
            if needs.retain is None:
                continue
            rule = needs.retain
            if rule is True or rule.safeguard is not None:
                raise ValueError(f"the entries of {policy.name!r} in decode cannot be predicted")
            total[layer] += _joined(runner, needs, max(heads), ranks, needs.window, ring=True)
            each = [rule.count] * len(heads) if isinstance(rule.count, int) else list(rule.count)
            lens[layer] = list(map(min, heads, each))
    return total, lens


def _view(
    phase: Phase,
    layer: int,
    layers: Layers,
    work: Work,
    new: int,
    heads: list[int],
    first: list[int],
    step: int,
    state: State,
) -> View:
    seen, most = work.prompt + step, max(first)
    return View(phase, layer, layers, work.prompt, new, tuple(heads), most, seen, state)


def _joined(
    runner: ModelRunner,
    needs: Needs,
    entries: int,
    ranks: Ranks,
    window: int,
    *,
    ring: bool = False,
) -> int:
    """Bytes of one eviction in a layer with ``entries`` per head.

    window : number of scored queries;  ring : whether they are stored with their log-sum-exps.
    """
    if ranks.size == 1:
        return 0
    shape, wide = runner.shapes[0], accumulate_dtype(runner.dtype).itemsize
    own = len(ranks.own_heads(runner.kv_heads))
    size = 0
    if needs.window:
        size += (own if needs.reduce.heads.startswith("kv") else 1) * entries * wide
    if ranks.copies(runner.kv_heads) > 1:  # queries of all ranks that hold the KV head
        one = shape.key_dim * runner.dtype.itemsize + (wide if ring else 0)
        size += window * shape.heads // ranks.size * one
    if needs.retain is not None:
        size += own * entries * 4  # positions
        size += (
            own
            * entries
            * wide
            * (needs.keys * shape.key_dim + needs.values * shape.value_dim + needs.column_sums)
        )
    return size


def wire_bytes(sent: Counter[str], tensor: int) -> float:
    """Bytes that a rank sends on its link: a ring of ``tensor`` ranks sends sums 2 (n - 1) / n
    times, and gathered tensors to each other rank; the next stage gets its message once."""
    summed = sent["layers"] + sent["embedding"]
    joined = sent["logits"] + sent["policy"]
    passed = sent["rows"] + sent["prompts"] + sent["results"]
    return summed * 2 * (tensor - 1) / tensor + joined * (tensor - 1) + passed
