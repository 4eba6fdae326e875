"""Ranks as threads of one process: the same engines and the same splits, with collectives that meet
in memory.  What only processes show (loading, failing, gloo) is tested with processes."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from typing import Any

import torch
from torch import Tensor

from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.ranks import Follower, Leader
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.families import find_family
from pyramidinfer.models.fingerprint import measure
from pyramidinfer.models.lora_modules import read_adapters
from pyramidinfer.models.pipeline import StageRunner
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.sharding import split_adapter, split_model
from pyramidinfer.models.stages import Stages, keep_stage, ranges_of
from pyramidinfer.policies import Policy

__all__ = ["split_engine"]

WAIT = 120.0


class Meeting:
    """Where a group's ranks exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def exchange(self, place: int, given: Any) -> list[Any]:
        self.slots[place] = given
        self.barrier.wait(WAIT)
        found = list(self.slots)
        self.barrier.wait(WAIT)
        return found


@dataclass(eq=False)
class ThreadRanks(Ranks):
    """``group`` is a ``Meeting``;  ``others``: those of ranks that share a KV head."""

    others: dict[Any, Meeting] = field(default_factory=dict)

    def share(self, kv_heads: int) -> None:
        if (copies := self.copies(kv_heads)) > 1:
            key = kv_heads, self.index // copies
            self._sharing[kv_heads] = self.others.setdefault(key, Meeting(copies))

    def _gather(self, part: Tensor, group: Meeting, what: str) -> list[Tensor]:
        self.sent[what] += part.nbytes
        size = len(group.slots)
        found = group.exchange(self.index % size, part.clone())
        assert len({(each.shape, each.dtype) for each in found}) == 1, "parts differ in shape"
        return [each.clone() for each in found]

    def _sum(self, partial: Tensor, group: Meeting, what: str) -> Tensor:
        return torch.stack(self._gather(partial, group, what)).sum(0)


class QueueWire:
    """Messages between the stages of one column of ranks; pickled and copied as they are between
    processes."""

    def __init__(self, stage: int, boxes: dict[Any, Queue[Any]], column: int) -> None:
        self.stage, self.boxes, self.column = stage, boxes, column

    def _box(self, giver: int, taker: int, lane: int) -> Queue[Any]:
        return self.boxes.setdefault((self.column, giver, taker, lane), Queue())

    def send(self, stage: int, lane: int, what: Any, tensors: list[Tensor]) -> None:
        copies = [each.clone() for each in tensors]
        self._box(self.stage, stage, lane).put((pickle.dumps(what), copies))

    def wait(self, lane: int, left: int) -> None: ...

    def receive(self, stage: int, lane: int) -> tuple[Any, list[Tensor]]:
        what, tensors = self._box(stage, self.stage, lane).get(timeout=WAIT)
        return pickle.loads(what), tensors


class QueueLink:
    """A ``Link`` between threads; commands are pickled as they are between processes."""

    broken, is_over = None, False

    def __init__(self, rank: int, queues: list[Queue[bytes]]) -> None:
        self.rank, self.queues = rank, queues

    def begin(self) -> None: ...

    def check(self) -> None: ...

    def tell(self, command: Any) -> None:
        for queue in self.queues[1:]:
            queue.put(pickle.dumps(command))

    def hear(self) -> Any:
        command = pickle.loads(self.queues[self.rank].get(timeout=WAIT))
        assert command is not None, "a process would pass it over"
        return command

    def fail(self, why: str) -> Exception:
        return RuntimeError(why)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        yield

    def close(self) -> None:
        if self.rank == 0:
            self.tell("close")


@contextmanager
def split_engine(
    model: Any,
    policy: Policy,
    config: EngineConfig,
    tensor: int,
    backend: str = "auto",
    layers: list[int] | None = None,
) -> Iterator[Leader]:
    """The leading engine of a model that threads share: stages of so many layers (None: one stage),
    each of ``tensor`` ranks."""
    runner = ModelRunner(model, "reference")
    stages, shape = ranges_of(layers or [runner.depth]), runner.shapes[0]
    meetings = [Meeting(tensor) for _ in stages]
    others: list[dict[Any, Meeting]] = [{} for _ in stages]
    boxes: dict[Any, Queue[Any]] = {}
    size = tensor * len(stages)
    queues: list[Queue[bytes]] = [Queue() for _ in range(size)]
    whole = copy.deepcopy(model)
    raised: list[BaseException] = []

    def make(rank: int) -> Leader | Follower:
        stage, index = divmod(rank, tensor)
        ranks = ThreadRanks(index, tensor, meetings[stage], others=others[stage])
        part = copy.deepcopy(whole)
        body = part.get_submodule(find_family(part.config).body)
        ranks.fingerprint = measure(body)
        like = next(part.parameters()).new_empty(0)
        adapters = read_adapters(config.adapters, body, part.config, like)
        if tensor > 1:
            split_model(part, shape, ranks)
        mine = Stages(stages, stage, QueueWire(stage, boxes, index))
        keep_stage(part, mine)
        kind = StageRunner if len(stages) > 1 else ModelRunner
        driven = kind(part, backend, config.prefill_chunk, own=True, ranks=ranks, stages=mine)
        for each in adapters.values():
            split_adapter(each, part.config, shape, ranks, mine.own)
        led = (Follower if rank else Leader)(
            *(QueueLink(rank, queues), driven, policy, config),
            adapters=driven.take_adapters(adapters),
        )
        return led

    def stop() -> None:
        for meeting in [*meetings, *(each for some in others for each in some.values())]:
            meeting.barrier.abort()

    def follow(rank: int) -> None:
        try:
            engine = make(rank)
            engine.follow()
        except SystemExit:
            engine.check()
        except BaseException as error:
            raised.append(error)
            stop()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for each in threads:
        each.start()
    try:
        leader = make(0)
        yield leader
        leader.close()
    except BaseException:
        stop()
        for queue in queues[1:]:
            queue.put(pickle.dumps("close"))
        if raised:
            raise raised[0] from None
        raise
    finally:
        for each in threads:
            each.join(WAIT)
    if raised:
        raise raised[0]
