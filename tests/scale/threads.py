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
from pyramidinfer.models.fingerprint import measure
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.sharding import split_model
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


class QueueLink:
    """A ``Link`` between threads; commands are pickled as they are between processes."""

    broken = None

    def __init__(self, rank: int, queues: list[Queue[bytes]]) -> None:
        self.rank, self.queues = rank, queues

    def begin(self) -> None: ...

    def check(self) -> None: ...

    def tell(self, command: Any) -> None:
        for queue in self.queues[1:]:
            queue.put(pickle.dumps(command))

    def hear(self) -> Any:
        return pickle.loads(self.queues[self.rank].get(timeout=WAIT))

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
    model: Any, policy: Policy, config: EngineConfig, size: int, backend: str = "auto"
) -> Iterator[Leader]:
    """The leading engine of a model that threads share."""
    meeting, others = Meeting(size), {}
    queues: list[Queue[bytes]] = [Queue() for _ in range(size)]
    shape = ModelRunner(model, "reference").shapes[0]
    whole = copy.deepcopy(model)
    raised: list[BaseException] = []

    def make(rank: int) -> Leader | Follower:
        ranks = ThreadRanks(rank, size, meeting, others=others)
        part = copy.deepcopy(whole)
        ranks.fingerprint = measure(
            part.get_submodule("model" if hasattr(part, "model") else "gpt_neox")
        )
        split_model(part, shape, ranks)
        kind = Follower if rank else Leader
        return kind(
            QueueLink(rank, queues), part, policy, config, None, backend, own=True, ranks=ranks
        )

    def follow(rank: int) -> None:
        try:
            engine = make(rank)
            engine.follow()
        except SystemExit:
            engine.check()
        except BaseException as error:
            raised.append(error)
            meeting.barrier.abort()
            for each in others.values():
                each.barrier.abort()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for each in threads:
        each.start()
    try:
        leader = make(0)
        yield leader
        leader.close()
    except BaseException:
        meeting.barrier.abort()
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
