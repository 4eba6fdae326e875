"""The stages of a model's layers (pipeline parallel), and the messages between them.

A stage is one rank, or several that split its layers (``models/ranks.py``), with a range of the
layers and their part of the cache.  All stages know every request: its lengths in all layers, its
policy's state, the progress of its prompt.  A step's batch goes through the stages in order.  The
rows of hidden states are sent with a :class:`Note` of the changes in each stage; the last stage
sends it to all others, with the logits.
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
    """Messages to and from the same rank of other stages; messages of a lane keep their order.
    Sending does not wait."""

    def send(self, stage: int, lane: int, what: Any, tensors: list[Tensor]) -> None:
        """Send anything that can be pickled, and tensors."""

    def receive(self, stage: int, lane: int) -> tuple[Any, list[Tensor]]:
        """The next message of a stage."""

    def wait(self, lane: int, left: int) -> None:
        """Wait until at most ``left`` messages are in flight, and release the others."""


#: Lanes: batches in flight, in order, and collectives of all stages.
FLIGHTS, TALK = 0, 1


@dataclass(eq=False)
class Stages:
    """One stage of a model's layers.

    layers : every stage's range;  index : of this stage;  sent : bytes of tensors that this rank
    sent to other stages, by purpose.
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
        """Layers of every stage, in the format of ``pipeline_layers``."""
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
        """Send to a stage; every tensor with its purpose."""
        assert self.wire is not None
        for name, tensor in tensors:
            self.sent[name] += tensor.nbytes
        self.wire.send(stage, lane, what, [tensor for _, tensor in tensors])

    def receive(self, stage: int, lane: int = TALK) -> tuple[Any, list[Tensor]]:
        """The next message of a stage: its content and its tensors."""
        assert self.wire is not None
        return self.wire.receive(stage, lane)

    def tell(self, what: Any, tensors: list[tuple[str, Tensor]], lane: int = TALK) -> None:
        """Send to all other stages."""
        for stage in range(self.size):
            if stage != self.index:
                self.send(stage, what, tensors, lane)

    def let_go(self, flights: int) -> None:
        """Release messages of finished steps, if this many are in flight."""
        assert self.wire is not None
        left = flights
        if self.is_last and flights:  # other stages may not know yet which steps have finished here
            left = (self.size - 1) * (flights + self.size)
        self.wire.wait(FLIGHTS, left)
        if not flights:
            self.wire.wait(TALK, 0)

    def gather(self, mine: Any) -> list[Any]:
        """Gather an object from every stage, in order; all stages must call this and get the
        same."""
        if self.size == 1:
            return [mine]
        if not self.is_first:
            self.send(0, mine, [])
            return list(self.receive(0)[0])
        found = [mine, *(self.receive(stage)[0] for stage in range(1, self.size))]
        self.tell(found, [])
        return found

    def sync_lengths(self, kept: np.ndarray) -> None:
        """Fill ``kept`` ``[layers, kv_heads]``, of which every stage knows its own layers, with the
        layers of all stages."""
        own = kept[self.own.start : self.own.stop]
        if self.size > 1:
            kept[:] = np.concatenate(self.gather(own))


# --- a model's layers -----------------------------------------------------------------------------


def check_stages(stages: int, depth: int, given: str | None = None) -> None:
    """``ValueError`` if there are fewer layers than stages, or not as many as ``given`` says."""
    if stages > depth:
        raise ValueError(
            f"pipeline_parallel_size={stages}: this model has {depth} layers; at most {depth} work"
        )
    if given is not None and (count := sum(map(int, given.split(",")))) != depth:
        raise ValueError(f"pipeline_layers={given!r} has {count} layers; this model has {depth}")


def ranges_of(counts: list[int]) -> list[range]:
    """Consecutive ranges with these numbers of layers."""
    stops = list(accumulate(counts))
    return [range(stop - count, stop) for stop, count in zip(stops, counts, strict=True)]


def share_layers(costs: list[float], stages: int, last: float = 0.0) -> list[range]:
    """Assign layers with these costs to stages, in order, so that the maximum cost is minimal.

    last : additional cost of the last stage.  Every stage gets at least one layer.
    """
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    depth = len(costs)
    best = np.full((stages + 1, depth + 1), np.inf)  # of the first stages, by number of layers
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
    """Free the weights of a loaded model, in place, that belong to other stages.

    Parts before the layers in transformers' plan of the model (``base_model_pp_plan``, or the
    family's in ``models/families.py``) belong to the first stage, parts after them and the head to
    the last one.
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
    """The progress of a prompt: the parts of ``Prefill`` and its cache that other stages need.

    left : remaining layer-tokens in this step;  newest : positions of the ring's rows;  read :
    results of its reader;  moves : whether its rows are sent, because it enters the next stage.
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
    """The changes that stages have made so far in a step.

    kept : of a decode row, the number of entries in a stage's layers if some were dropped (row,
    first layer, ``[layers, kv_heads]``);  states : of a decode row, its policy's new state;
    prompts : by number of the work, its progress.
    """

    kept: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    prompts: dict[int, Stands] = field(default_factory=dict)

    def enter(self, pool: Pool, works: list[Work], tensors: list[Tensor]) -> None:
        """Continue the prompts that have reached this stage, with their rows and positions."""
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
        """Record the progress of prompts in this stage (``begun``: the first layer of each);
        returns rows and positions of those that enter the next stage."""
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
        """Record the changes of a decode row in this context: dropped entries, the policy's
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
        """Apply the changes of all stages.  Requests that have ended in the meantime are
        skipped."""
        for row, first, kept in self.kept:
            if (table := decode[row].cache) is not None:
                table.kept[first : first + len(kept)] = kept
                decode[row].idle = 0  # due evictions may depend on lengths of other stages' layers
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
            if stands.layer not in stages.own:  # only their number is needed here
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


#: Prefix of names of state that each stage keeps for its own layers.
HERE = "streaming."


def told(state: State) -> State:
    """The part of a state that other stages receive."""
    return {name: value for name, value in state.items() if not name.startswith(HERE)}


def kept_here(state: State) -> State:
    """The part of a state that other stages do not receive."""
    return {name: value for name, value in state.items() if name.startswith(HERE)}
