"""Options of each study.  Plain values; nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pyramidinfer.lab.fields import (
    Context,
    Keeps,
    KvDtypes,
    ManyWeights,
    Plan,
    Samples,
    Seed,
    Specs,
    share,
)
from pyramidinfer.lab.samples import Subject
from pyramidinfer.options import Option, at_least, is_number, one_of, pick, positive

__all__ = [
    "PROTOCOLS",
    "CodecsPlan",
    "Grid",
    "HeadsPlan",
    "IcrPlan",
    "LongPlan",
    "MapPlan",
    "RacPlan",
    "RulerPlan",
    "Task",
    "TextPlan",
    "TurnsPlan",
    "VerifyPlan",
    "Ways",
    "own_keep",
]

AUTO = "auto"
#: The question is part of the compressed prompt, or comes after it.
PROTOCOLS = ("inside", "after")
#: Smallest number of questions and of passages of a cell of ``Grid``.
LEAST = 5

#: The cell that all others are compared with.
REFERENCE: dict[str, Any] = {"policy": "full", "keep": 1.0, "kv_dtype": AUTO, "weights": AUTO}

ON = ("model", "text", "dtype", "device", "kv_memory")
Here = Annotated[Subject, pick(*ON)]
Large = Annotated[Subject, pick(*ON, kv_memory="1GiB")]
Chats = Annotated[Subject, pick("model", "dtype", "device", "kv_memory", kv_memory="2GiB")]


def short_enough(least: int) -> Any:
    """The check of an option: at least this many tokens."""

    def check(name: str, value: object) -> None:
        if not (isinstance(value, int) and value >= least):
            raise ValueError(f"{name} {value} is too short; give at least {least} tokens")

    return check


Continuation = Annotated[
    int, Option("Maximum number of tokens scored after the context.", check=at_least(1))
]


@dataclass(frozen=True)
class IcrPlan(Plan):
    """One layer is pruned at a time, the others keep everything; ``layers`` None: all layers."""

    subject: Here
    context: Annotated[int, Option("Tokens of context.", check=at_least(20))] = 1000
    continuation: Continuation = 64
    samples: Samples = 24
    seed: Seed = 0
    shares: Annotated[
        tuple[float, ...],
        Option("Shares of the pruned layer's entries to keep, in (0, 1].", check=share),
    ] = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    layers: Annotated[
        tuple[int, ...] | None, Option("Layers to prune, one at a time.", unset="all")
    ] = None

    def __post_init__(self) -> None:
        self.check()


@dataclass(frozen=True)
class RacPlan(Plan):
    """``samples`` texts; ``bins``: equal parts of the distances below 30 %."""

    subject: Here
    context: Context = 1000
    samples: Samples = 16
    seed: Seed = 0
    tops: Annotated[
        tuple[float, ...],
        Option(
            "Shares of the context, taken from its most attended tokens, to compare.",
            flags=("--top",),
            check=share,
        ),
    ] = (0.8, 0.2)
    bins: Annotated[
        int,
        Option(
            "Number of bins for the distance from the end of the text (0 to 30 % of it).",
            check=at_least(1),
        ),
    ] = 10

    def __post_init__(self) -> None:
        self.check()
        if self.context < 4 * self.bins:
            raise ValueError(
                f"--context {self.context} is too short for {self.bins} bins of distance: give at "
                f"least {4 * self.bins}"
            )


@dataclass(frozen=True)
class MapPlan(Plan):
    """One prompt: a text, or None for a generated question with ``context`` tokens."""

    subject: Annotated[Subject, pick("model", "dtype", "device", "kv_memory")]
    prompt: str | None = None
    context: Annotated[int, Option("Tokens of the prompt that is generated if none is given.")] = (
        1000
    )
    max_tokens: Annotated[int, Option("Tokens to generate after the prompt.")] = 11
    seed: Seed = 0


@dataclass(frozen=True)
class Grid(Plan):
    """Each policy (``NAME`` or ``NAME:option=value,…``; None: every one) at each keep and context
    length, with keys and values in each of ``kv_dtypes``, and with each of ``weights``.

    Longer contexts get proportionally fewer samples, so that all lengths cost the same (at least
    ``LEAST``, or as many as at the shortest).  ``long_samples``: questions that generate enough
    tokens to compare answers.
    """

    subject: Here
    policies: Specs = None  # type: ignore[assignment]  # never None once it is made
    keeps: Keeps = (1.0, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1)
    contexts: Annotated[
        tuple[int, ...], Option("Context lengths to measure, in tokens.", check=short_enough(60))
    ] = (1000, 3000)
    samples: Annotated[
        int,
        Option(
            "Number of questions at the shortest context; longer contexts get fewer.",
            check=at_least(1),
        ),
    ] = 40
    passages: Annotated[
        float, Option("Number of text passages, as a share of the number of questions; at least 5.")
    ] = 0.5
    long_samples: int = 8
    continuation: int = 64
    seed: Seed = 0
    kv_dtypes: KvDtypes = (AUTO,)
    weights: ManyWeights = (AUTO,)

    def __post_init__(self) -> None:
        _fill_policies(self)

    def questions_at(self, context: int) -> int:
        """Number of questions at a context length."""
        fair = round(self.samples * min(self.contexts) / context)
        return max(fair, min(LEAST, self.samples))

    def passages_at(self, context: int) -> int:
        """Number of passages at a context length."""
        questions = self.questions_at(context)
        return max(round(self.passages * questions), min(LEAST, questions))

    def cells(self) -> list[dict[str, Any]]:
        """One dict per cell; the full cache is measured at keep 1 only."""
        from pyramidinfer.policies.registry import parse_policy

        _check_lists(self, "policies", "kv_dtypes", "weights")
        self.check()
        for spec in self.policies:
            parse_policy(spec, None if spec == "full" else 1.0)
        if not (is_number(self.passages) and self.passages >= 0):
            raise ValueError(f"--passages {self.passages} must be at least 0")
        return [
            {"policy": spec, "keep": keep, **stored, "context": context}
            for context in self.contexts
            for stored in _stored(self)
            for spec in self.policies
            for keep in ((1.0,) if spec == "full" else self.keeps)
        ]


def _fill_policies(plan: Any) -> None:
    """Every policy, if none was named."""
    if plan.policies is None:
        from pyramidinfer.policies import POLICIES

        object.__setattr__(plan, "policies", tuple(POLICIES))


def _stored(plan: Any) -> list[dict[str, str]]:
    """How cache and weights are stored: each needs its own engine."""
    return [
        {"kv_dtype": kv_dtype, "weights": weights}
        for weights in plan.weights
        for kv_dtype in plan.kv_dtypes
    ]


def _check_lists(plan: Any, *names: str) -> None:
    for name in names:
        if not getattr(plan, name):
            raise ValueError(f"--{name.replace('_', '-')} is empty: name at least one")


def own_keep(spec: str) -> float | None:
    """The ``keep`` that a policy's spec names itself; ``ValueError`` if that is no number."""
    found = re.search(r"[:,]keep=([^,]*)", spec)
    if found is None:
        return None
    try:
        return float(found[1])
    except ValueError:
        raise ValueError(
            f"{spec!r}: keep={found[1]} is no number; give a share in (0, 1]"
        ) from None


@dataclass(frozen=True)
class Ways(Plan):
    """On a model, each policy (``NAME`` or ``NAME:option=value,…``; None: every one) at each keep,
    or, if it names a ``keep``, at that only; all of them with keys and values in each of
    ``kv_dtypes``, and with each of ``weights``.  The full cache, everything in the model's dtype,
    is always measured first."""

    policies: Specs = None  # type: ignore[assignment]  # never None once it is made
    keeps: Keeps = (0.45, 0.3, 0.15)
    subject: Large = field(default_factory=Subject)
    samples: Annotated[
        int,
        Option(
            "Number of samples at the shortest length; longer lengths get fewer.", check=at_least(1)
        ),
    ] = 20
    seed: Seed = 0
    kv_dtypes: KvDtypes = field(default=(AUTO,), kw_only=True)
    weights: ManyWeights = field(default=(AUTO,), kw_only=True)

    def __post_init__(self) -> None:
        _fill_policies(self)

    def check(self) -> None:
        from pyramidinfer.policies.registry import parse_policy

        _check_lists(self, "policies", "keeps", "kv_dtypes", "weights")
        for spec in self.policies:
            parse_policy(spec, None if spec == "full" or own_keep(spec) is not None else 1.0)
        super().check()

    def cells(self) -> list[dict[str, Any]]:
        """``{"policy": …, "keep": …, "kv_dtype": …, "weights": …}`` of each, the reference
        first."""
        return [REFERENCE, *self.others()]

    def others(self) -> list[dict[str, Any]]:
        """All cells but the reference, grouped by engine."""
        return [
            {"policy": spec, "keep": keep, **stored}
            for stored in _stored(self)
            for spec in self.policies
            for keep in self._keeps(spec)
            if {"policy": spec, "keep": keep, **stored} != REFERENCE
        ]

    def _keeps(self, spec: str) -> tuple[float, ...]:
        own = 1.0 if spec == "full" else own_keep(spec)
        return self.keeps if own is None else (own,)

    def stored(self, cell: dict[str, Any]) -> Subject:
        """The model with a cell's kv dtype and weights."""
        return replace(self.subject, kv_dtype=cell["kv_dtype"], weights=cell["weights"])


def known_task(name: str, value: object) -> None:
    """The check of an option: one of RULER's tasks."""
    from pyramidinfer.lab.ruler.tasks import check_task

    check_task(str(value))


@dataclass(frozen=True)
class RulerPlan(Ways):
    """Each task in each protocol at each length (in tokens, including template and answer)."""

    lengths: Annotated[
        tuple[int, ...], Option("Tokens of a prompt including its answer.", check=at_least(1))
    ] = (2000,)
    tasks: Annotated[
        tuple[str, ...], Option("RULER's tasks, NAME,NAME.", unset="all thirteen", check=known_task)
    ] = None  # type: ignore[assignment]  # never None once it is made
    protocols: Annotated[
        tuple[str, ...],
        Option(
            "inside: the question is part of the compressed prompt; after: it comes after "
            "compression.",
            check=one_of(PROTOCOLS),
        ),
    ] = PROTOCOLS

    def __post_init__(self) -> None:
        super().__post_init__()
        given: tuple[str, ...] | None = self.tasks
        if given is None:
            from pyramidinfer.lab.ruler.tasks import TASKS

            object.__setattr__(self, "tasks", TASKS)

    def check(self) -> None:
        _check_lists(self, "lengths", "tasks", "protocols")
        super().check()

    def screening(self) -> list[dict[str, Any]]:
        """The full cache's cells."""
        return [
            {"length": length, **REFERENCE, "task": task}
            for length in self.lengths
            for task in self.tasks
        ]


@dataclass(frozen=True)
class TurnsPlan(Ways):
    """Chats whose first turn has about ``length`` tokens."""

    subject: Chats = field(default_factory=Subject)
    length: Annotated[int, Option("Tokens of each first turn.", check=at_least(1))] = 1000
    compress_idle: Annotated[
        bool, Option("Recompress caches between turns, as serve --compress-idle does.")
    ] = False


@dataclass(frozen=True)
class TextPlan(Ways):
    """Passages of real text at each context length; longer contexts get proportionally fewer."""

    contexts: Annotated[
        tuple[int, ...], Option("Context lengths to measure, in tokens.", check=at_least(1))
    ] = (500, 1000, 2000, 4000)

    def passages(self, context: int) -> int:
        return max(2, round(self.samples * min(self.contexts) / context))


@dataclass(frozen=True)
class LongPlan(Ways):
    """``tokens`` generated from prompts of ``context`` tokens of real text."""

    subject: Annotated[Subject, pick(*ON, kv_memory="2GiB")] = field(default_factory=Subject)
    samples: Samples = 8
    context: Context = 1000
    tokens: Annotated[
        int, Option("Number of tokens to generate; end tokens are ignored.", check=at_least(1))
    ] = 512


@dataclass(frozen=True)
class HeadsPlan(Plan):
    """A profile, and the loss when one layer keeps only the share ``pruned_to``."""

    subject: Here
    context: Annotated[int, Option("Tokens of context.", check=at_least(20))] = 1000
    continuation: Continuation = 64
    samples: Annotated[
        int,
        Option("Number of passages on which the loss by pruning is measured.", check=at_least(1)),
    ] = 4
    seed: Seed = 0
    pruned_to: Annotated[
        float,
        Option("Share of its entries that a pruned layer keeps, in (0, 1).", flags=("--share",)),
    ] = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.pruned_to < 1:
            raise ValueError(f"--share {self.pruned_to} must lie between 0 and 1")
        self.check()


@dataclass(frozen=True)
class CodecsPlan(Plan):
    """Passages of ``context`` tokens, all of them measured."""

    subject: Annotated[Subject, pick("model", "text", "dtype", "device")]
    context: Annotated[
        int, Option("Tokens of each passage; all of them are measured.", check=short_enough(60))
    ] = 1000
    samples: Annotated[int, Option("Number of passages.", check=at_least(1))] = 4
    seed: Seed = 0


@dataclass(frozen=True)
class Task(Plan):
    """Texts that ``calibrate`` measures on: texts that contain facts, and running text."""

    subject: Here
    keep: Annotated[float, Option("keep of the policy that is calibrated, in (0, 1).")] = 0.3
    context: int = 1000
    samples: int = 4
    passages: int = 3
    seed: Seed = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError(
                f"--keep {self.keep} must lie between 0 and 1, so that entries are dropped"
            )

    def quick(self) -> Task:
        """The same with a third of the work."""
        return replace(self, context=600, samples=2, passages=2)

    @property
    def parts(self) -> int:
        """Steps of the progress bar per plan: running text, and each text in both protocols."""
        return 1 + 2 * self.samples


@dataclass(frozen=True, slots=True)
class VerifyPlan(Plan):
    """Length of the prompts, and approximate time of the whole run."""

    length: Annotated[int, Option("Tokens of each prompt.", check=short_enough(300))] = 1000
    seconds: Annotated[
        float, Option("Approximate time of the run, in seconds.", check=positive)
    ] = 100.0
    seed: Seed = 0
