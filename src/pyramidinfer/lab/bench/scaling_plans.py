"""Options of the benches of several ranks, of replicas, and of caches beyond a request."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from pyramidinfer.lab.fields import (
    Dtype,
    NamedModel,
    OutputTokens,
    OwnModel,
    Plan,
    Policies,
    PromptTokens,
    RankMemory,
    Repeats,
    Threads,
    size_text,
)
from pyramidinfer.options import Option, at_least

__all__ = ["OffloadPlan", "PrefixPlan", "ReplicasPlan", "ScalePlan", "StagesPlan", "pairs_of"]


def pairs_of(option: str, text: str) -> tuple[tuple[int, int], ...]:
    """``"1x1,2x4"`` → one rank, then two in each of four stages; ``ValueError`` otherwise."""
    found = [re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", each) for each in text.split(",")]
    if None in found:
        raise ValueError(f"{option} {text!r} must be a list such as 1x1,2x1,1x2: ranks x stages")
    return tuple((int(each[1]), int(each[2])) for each in found if each is not None)


def show_pairs(pairs: tuple[tuple[int, int], ...]) -> str:
    """Text that ``pairs_of`` parses."""
    return ",".join(f"{tensor}x{stages}" for tensor, stages in pairs)


@dataclass(frozen=True)
class ScalePlan(Plan):
    """One request on each number of ranks; each rank is a process."""

    model: OwnModel = None
    sizes: Annotated[
        tuple[tuple[int, int], ...],
        Option(
            "Tensor-parallel ranks x pipeline stages to measure, a list that begins with 1x1.",
            parse=pairs_of,
            show=show_pairs,
        ),
    ] = ((1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (2, 2))
    prompt: PromptTokens = 512
    new: Annotated[
        int,
        Option("Tokens to generate, at least 2.", flags=("--output-len",), check=at_least(2)),
    ] = 16
    kv_memory: RankMemory = "64MiB"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if not self.sizes or self.sizes[0] != (1, 1):
            words = show_pairs(self.sizes)
            raise ValueError(
                f"--sizes {words}: the first must be 1x1, which the others are compared with"
            )
        self.check()

    @property
    def name(self) -> str:
        from pyramidinfer.models.catalog import find_model
        from pyramidinfer.models.loading import shipped_model

        return find_model(self.model) if self.model else shipped_model()


@dataclass(frozen=True)
class StagesPlan(Plan):
    """Requests that arrive together, on two stages; the ways of running them take turns."""

    model: NamedModel = "smollm2"
    policies: Policies = ("full", "pyramidinfer:keep=.45")
    requests: Annotated[int, Option("Number of concurrent requests.", check=at_least(1))] = 8
    prompt: PromptTokens = 1000
    new: OutputTokens = 32
    kv_memory: RankMemory = "1GiB"
    dtype: Dtype = "float32"
    repeats: Repeats = 3

    def __post_init__(self) -> None:
        self.check()

    @property
    def name(self) -> str:
        from pyramidinfer.models.catalog import find_model

        return find_model(self.model)


@dataclass(frozen=True)
class OffloadPlan(Plan):
    """Conversations of ``tokens`` tokens, until no more are held; then ``repeats`` second turns of
    ``turn`` new tokens from each place, after a first turn of ``prompt`` tokens."""

    model: NamedModel = "smollm2"
    policies: Policies = ("full", "pyramid:keep=.3")
    tokens: Annotated[
        int,
        Option(
            "Tokens of each conversation when held conversations are counted.", check=at_least(1)
        ),
    ] = 300
    kv_memory: Annotated[
        str,
        Option("--kv-memory of the engine; half of it is for held conversations.", check=size_text),
    ] = "48MiB"
    host: Annotated[str, Option("Host memory for KV caches.", check=size_text)] = "32MiB"
    disk: Annotated[str, Option("Disk space for KV caches.", check=size_text)] = "64MiB"
    prompt: Annotated[
        int, Option("Tokens of the first turn when second turns are timed.", check=at_least(1))
    ] = 600
    turn: Annotated[int, Option("New tokens of the second turn.", check=at_least(1))] = 30
    repeats: Annotated[
        int,
        Option(
            "Number of timed second turns for each place of the cache; measured in turn.",
            check=at_least(1),
        ),
    ] = 3
    dtype: Dtype = "auto"
    threads: Threads = 0

    def __post_init__(self) -> None:
        self.check()


@dataclass(frozen=True)
class PrefixPlan(Plan):
    """Chats of a system prompt and a question: one chat after another has been answered, then
    ``chats`` that arrive together while nothing is held.  A policy that drops entries compresses
    the system prompt on its own, shared or not."""

    model: NamedModel = "smollm2"
    policies: Policies = ("full", "pyramid:keep=.3")
    system: Annotated[int, Option("Tokens of the system prompt.", check=at_least(1))] = 1000
    question: Annotated[int, Option("Tokens of each question.", check=at_least(1))] = 30
    output: Annotated[int, Option("Tokens generated for each question.", check=at_least(1))] = 32
    chats: Annotated[
        int, Option("Number of chats that arrive at the same time.", check=at_least(1))
    ] = 8
    kv_memory: Annotated[
        str, Option("--kv-memory of the engine; half of it is for held caches.", check=size_text)
    ] = "1GiB"
    repeats: Annotated[
        int,
        Option(
            "Number of runs with sharing, and of runs without; these run in turn.",
            check=at_least(1),
        ),
    ] = 3
    dtype: Dtype = "auto"
    threads: Threads = 0

    def __post_init__(self) -> None:
        self.check()


@dataclass(frozen=True)
class ReplicasPlan(Plan):
    """``chats`` conversations, ``at_once`` at a time, on two replicas under Ray Serve."""

    model: OwnModel = None
    chats: Annotated[int, Option("Number of conversations.", check=at_least(2))] = 40
    turns: Annotated[int, Option("Turns in each conversation.", check=at_least(2))] = 5
    at_once: Annotated[int, Option("Number of concurrent conversations.", check=at_least(1))] = 8
    words: Annotated[int, Option("Words of each first turn.", check=at_least(20))] = 600
    new: OutputTokens = 16
    kv_memory: Annotated[str, Option("Memory for the KV caches of each replica.")] = "256MiB"
    port: Annotated[int, Option("Port that Ray Serve listens on.")] = 8017

    def __post_init__(self) -> None:
        self.check()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def opening(self, chat: int) -> str:
        """A first message that differs from that of every other chat."""
        fact = f"The harp of Ada Holt is in room {100 + chat} . "
        filler = "The storm touched the bridge . "
        return fact + filler * (self.words // 6) + "Where is the harp of Ada Holt ?"
