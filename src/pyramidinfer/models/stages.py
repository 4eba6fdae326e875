"""The stages that a model's layers are dealt to (pipeline parallel), and what goes between them.

A stage is one rank, or several that split its layers (``models/ranks.py``), with a range of the
layers and their part of the cache.  All stages know every request: its lengths in all layers, its
policy's state, where its prompt stands.  A step's batch goes through the stages in order.  With the
rows of hidden states goes a :class:`Note` of what each stage has changed; the last stage tells it
to all others, beside the logits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pyramidinfer.cache import Pool
from pyramidinfer.models.batch import Prefill, Sequence, Work
from pyramidinfer.models.families import find_family
from pyramidinfer.types import State

__all__ = [
    "Note",
    "Stages",
    "Wire",
    "check_stages",
    "keep_stage",
    "ranges_of",
    "share_layers",
]


class Wire(Protocol):
    """Messages to and from the same rank of other stages, those of a lane in order.  Sending does
    not wait."""

    def send(self, stage: int, lane: int, what: Any, tensors: list[Tensor]) -> None:
        """Send anything that can be pickled, and tensors."""

    def receive(self, stage: int, lane: int) -> tuple[Any, list[Tensor]]:
        """The next message of a stage."""

    def wait(self, lane: int, left: int) -> None:
        """Wait until no more than so many messages are on their way, and let the others go."""


#: Batches that are on their way, one behind the other, and what all stages wait for together.
FLIGHTS, TALK = 0, 1


@dataclass(eq=False)
class Stages:
    """One stage of those that have a model's layers.

    layers : every stage's range;  index : which one this is;  sent : bytes of tensors that this
    rank sent to other stages, by what for.
    """

    layers: list[range]
    index: int = 0
    wire: Wire | None = None
    sent: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        return len(self.layers)

    @property
    def own(self) -> range:
        """The layers of this stage."""
        return self.layers[self.index]

    @property
    def words(self) -> str:
        """Layers of every stage, as ``pipeline_layers`` is written."""
        return ",".join(str(len(each)) for each in self.layers)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    def send(
        self, stage: int, what: Any, tensors: list[tuple[str, Tensor]], lane: int = TALK
    ) -> None:
        """Send to a stage; every tensor with what it is for."""
        assert self.wire is not None
        for name, tensor in tensors:
            self.sent[name] += tensor.nbytes
        self.wire.send(stage, lane, what, [tensor for _, tensor in tensors])

    def receive(self, stage: int, lane: int = TALK) -> tuple[Any, list[Tensor]]:
        """The next message of a stage: what, and its tensors."""
        assert self.wire is not None
        return self.wire.receive(stage, lane)

    def tell(self, what: Any, tensors: list[tuple[str, Tensor]], lane: int = TALK) -> None:
        """Send to all other stages."""
        for stage in range(self.size):
            if stage != self.index:
                self.send(stage, what, tensors, lane)

    def let_go(self, flights: int) -> None:
        """Keep no messages of steps that are over, where so many are on their way."""
        assert self.wire is not None
        left = flights
        if self.is_last and flights:  # others may not have heard yet of those that are over here
            left = (self.size - 1) * (flights + self.size)
        self.wire.wait(FLIGHTS, left)
        if not flights:
            self.wire.wait(TALK, 0)

    def gather(self, mine: Any) -> list[Any]:
        """What every stage has of something, in order, the same on all of them; all call this."""
        if self.size == 1:
            return [mine]
        if not self.is_first:
            self.send(0, mine, [])
            return list(self.receive(0)[0])
        found = [mine, *(self.receive(stage)[0] for stage in range(1, self.size))]
        self.tell(found, [])
        return found

    def sync_lengths(self, kept: np.ndarray) -> None:
        """Have in ``kept`` ``[layers, kv_heads]``, of which every stage knows its own layers, those
        of all stages."""
        own = kept[self.own.start : self.own.stop]
        if self.size > 1:
            kept[:] = np.concatenate(self.gather(own))


# --- a model's layers -----------------------------------------------------------------------------


def check_stages(stages: int, depth: int, given: str | None = None) -> None:
    """``ValueError`` where there are not as many layers as stages, or as many as ``given`` says."""
    if stages > depth:
        raise ValueError(
            f"pipeline_parallel_size={stages}: this model has {depth} layers; at most {depth} work"
        )
    if given is not None and (count := sum(map(int, given.split(",")))) != depth:
        raise ValueError(f"pipeline_layers={given!r} are {count} layers; this model has {depth}")


def ranges_of(counts: list[int]) -> list[range]:
    """Ranges of so many layers each, one behind the other."""
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def share_layers(costs: list[float], stages: int, last: float = 0.0) -> list[range]:
    """Deal layers with these costs to stages, in order, so that the costliest stage costs least.

    last : what the last stage has to do besides.  Every stage gets a layer at least.
    """
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    depth = len(costs)
    best = np.full((stages + 1, depth + 1), np.inf)  # of the first stages, with so many layers
    cut = np.zeros((stages + 1, depth + 1), dtype=int)
    best[0, 0] = 0.0
    for stage in range(1, stages + 1):
        extra = last if stage == stages else 0.0
        for stop in range(stage, depth + 1):
            for start in range(stage - 1, stop):
                worst = max(best[stage - 1, start], sums[stop] - sums[start] + extra)
                if worst < best[stage, stop]:
                    best[stage, stop], cut[stage, stop] = worst, start
    stops = [depth]
    for stage in range(stages, 0, -1):
        stops.append(int(cut[stage, stops[-1]]))
    return [range(start, stop) for start, stop in pairwise(stops[::-1])]


def keep_stage(model: Any, stages: Stages) -> None:
    """Free the weights of a loaded model, in place, that other stages have.

    What is in front of the layers in transformers' plan of the model (``base_model_pp_plan``, or
    the family's in ``models/families.py``) is the first stage's, what is behind them and the head
    the last one's.
    """
    family = find_family(model.config)
    body = model.get_submodule(family.body)
    plan = list(family.stages or model.config.base_model_pp_plan)
    middle = plan.index("layers")
    foreign = [
        *(body.layers[layer] for layer in range(len(body.layers)) if layer not in stages.own),
        *(getattr(body, name) for name in plan[:middle] if not stages.is_first),
        *(getattr(body, name) for name in plan[middle + 1 :] if not stages.is_last),
        *([] if stages.is_last else [model.get_output_embeddings()]),
    ]
    for module in foreign:
        for part in [] if module is None else module.modules():
            for name, weight in part.named_parameters(recurse=False):
                part.register_parameter(name, _nothing(weight))


def _nothing(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.new_empty(0), requires_grad=False)


# --- what goes along with a batch -----------------------------------------------------------------


class Stands(NamedTuple):
    """Where a prompt stands: what of ``Prefill`` and its cache other stages must know.

    left : layer-tokens that it may still do in this step;  newest : positions of the ring's rows;
    read : what its reader gave;  moves : its rows come along, since it enters the next stage.
    """

    layer: int
    done: int
    length: int
    readings: int
    computed: list[int]
    kept: np.ndarray
    state: State
    left: int
    newest: list[int] | None
    read: list[Any]
    moves: bool


@dataclass
class Note:
    """What the stages have changed so far in a step.

    kept : of a decode row, the entries in a stage's layers where some were dropped (row, first
    layer, ``[layers, kv_heads]``);  states : of a decode row, its policy's new state;  prompts :
    by number of the work, where it stands.
    """

    kept: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    prompts: dict[int, Stands] = field(default_factory=dict)

    def enter(self, pool: Pool, works: list[Work], tensors: list[Tensor]) -> None:
        """Take over the prompts that have come to this stage, with their rows and positions."""
        for index, stands in self.prompts.items():
            work = works[index]
            work.budget = stands.left
            if not stands.moves:
                continue
            prefill = work.prefill
            self._take(prefill, stands)
            prefill.hidden, prefill.positions = tensors.pop(0), tensors.pop(0)
            prefill.layer, prefill.done = stands.layer, 0
            _note_bytes(pool, prefill)

    def leave(
        self, pool: Pool, works: list[Work], begun: list[int], stages: Stages
    ) -> list[tuple[str, Tensor]]:
        """Write down where prompts stand that this stage has worked on (``begun``: the layer each
        was at); rows and positions of those that go on to the next one."""
        moving = []
        for index, (work, layer) in enumerate(zip(works, begun, strict=True)):
            if layer not in stages.own:
                continue
            prefill = work.prefill
            table = prefill.sequence.table
            moves = prefill.layer == stages.own.stop and not stages.is_last
            ring = table.ring
            newest = ring.positions[: ring.written].tolist() if ring and ring.written else None
            self.prompts[index] = Stands(
                prefill.layer,
                prefill.done,
                prefill.length,
                len(prefill.readings),
                prefill.computed,
                table.kept.copy(),
                told(table.state),
                work.budget,
                newest,
                prefill.read,
                moves,
            )
            if moves:
                assert prefill.hidden is not None
                moving += [("prompts", prefill.hidden), ("prompts", prefill.positions)]
                prefill.hidden = None
                _note_bytes(pool, prefill)
        return moving

    @contextmanager
    def watch(self, row: int, sequence: Sequence, own: range) -> Iterator[None]:
        """Write down what is changed of a decode row in this: entries dropped, the policy's
        state."""
        table, mine = sequence.table, slice(own.start, own.stop)
        if row in self.states:
            table.state = {**table.state, **self.states[row]}
        before, state = table.kept[mine].copy(), table.state
        yield
        if (table.kept[mine] != before).any():
            self.kept.append((row, own.start, table.kept[mine].copy()))
        if table.state is not state:
            self.states[row] = told(table.state)

    def apply(self, decode: list[Sequence], works: list[Work], stages: Stages) -> None:
        """Have here what all stages have changed.  Requests that have ended meanwhile are passed
        over."""
        for row, first, kept in self.kept:
            if (table := decode[row].cache) is not None:
                table.kept[first : first + len(kept)] = kept
                decode[row].idle = 0  # what is due may hang on lengths of other stages' layers
        for row, state in self.states.items():
            if (table := decode[row].cache) is not None:
                table.state = {**table.state, **state}
        for index, stands in self.prompts.items():
            prefill = works[index].prefill
            if prefill.sequence.cache is None:
                continue
            self._take(prefill, stands)
            prefill.read = stands.read
            while len(prefill.readings) > stands.readings:
                prefill.read_on()
            prefill.layer, prefill.done = stands.layer, stands.done
            if stands.layer not in stages.own:  # how many there are is all that is asked here
                prefill.positions = torch.empty(stands.length, dtype=torch.int64, device="meta")

    @staticmethod
    def _take(prefill: Prefill, stands: Stands) -> None:
        table = prefill.sequence.table
        table.kept[:], prefill.computed = stands.kept, list(stands.computed)
        table.state = {**kept_here(table.state), **stands.state}
        if table.ring is not None and stands.newest is not None and not table.ring.written:
            table.ring.begin(torch.tensor(stands.newest, device=table.ring.positions.device))


def _note_bytes(pool: Pool, prefill: Prefill) -> None:
    table = prefill.sequence.table
    table.transient_bytes = prefill.transient_bytes
    pool.note_overhead(table)


#: Names of what each stage remembers of its own layers begin so.
HERE = "streaming."


def told(state: State) -> State:
    """What other stages are told of a state."""
    return {name: value for name, value in state.items() if not name.startswith(HERE)}


def kept_here(state: State) -> State:
    """What they are not told of it."""
    return {name: value for name, value in state.items() if name.startswith(HERE)}
