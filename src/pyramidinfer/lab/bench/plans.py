"""Options of each bench.  Plain values; nothing here imports torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from pyramidinfer.config import KV_DTYPES, MOST_DRAFTS, WEIGHTS, check_share
from pyramidinfer.lab.fields import (
    Backend,
    Batch,
    Batches,
    Device,
    Dtype,
    Keep,
    KvDtype,
    KvMemory,
    ManyWeights,
    Model,
    NamedModel,
    OutputLen,
    OutputTokens,
    OwnModel,
    Plan,
    Policies,
    PromptLen,
    PromptLens,
    PromptTokens,
    RankMemory,
    Repeats,
    Seed,
    Shape,
    Threads,
    Warmup,
    Weights,
    parse_specs,
    size_text,
)
from pyramidinfer.lab.samples import Subject
from pyramidinfer.options import Option, at_least, one_of, parse_words, pick

if TYPE_CHECKING:
    from pyramidinfer.policies import Policy

__all__ = [
    "DEFAULT_SHAPE",
    "AdaptersPlan",
    "FootprintPlan",
    "KernelPlan",
    "KvDtypesPlan",
    "LatencyPlan",
    "LosslessPlan",
    "MemoryPlan",
    "OffloadPlan",
    "PrefixPlan",
    "ReplicasPlan",
    "ScalePlan",
    "Setting",
    "StagesPlan",
    "StepPlan",
    "ThroughputPlan",
    "WeightsPlan",
]

DEFAULT_SHAPE = "bench-200m"
AUTO = "auto"
#: Largest number of tokens of all caches of a row of ``LosslessPlan`` together.
MOST_TOKENS = 128 * 1024
#: Default ``kv_memory`` of ``MemoryPlan``.
DEFAULT_MEMORY = "256MiB"


@dataclass(frozen=True)
class Setting(Plan):
    """Model and engine of a bench.

    ``kv_memory`` auto is what all requests of a run need together, for each policy.
    """

    model: Model = None
    shape: Shape = None
    policies: Policies = ("full", "pyramidinfer", "pyramid")
    keep: Keep = 0.45
    dtype: Dtype = AUTO
    kv_dtype: KvDtype = AUTO
    weights: Weights = AUTO
    device: Device = AUTO
    backend: Backend = AUTO
    kv_memory: KvMemory = AUTO
    threads: Threads = 0
    repeats: Repeats = 3
    warmup: Warmup = 1
    seed: Seed = 0

    def check(self) -> None:
        super().check()
        from pyramidinfer.config import parse_device

        if self.model is not None and self.shape is not None:
            raise ValueError("give --model or --shape, not both")
        check_specs(self.policies)
        for spec in self.policies:
            self.policy(spec)
        parse_device(self.device)

    def policy(self, spec: str) -> Policy:
        """``NAME`` or ``NAME:option=value,…`` → a policy, ``keep`` filled in."""
        from pyramidinfer.policies.registry import make_policy, parse_spec

        name, options = parse_spec(spec)
        keep = options.pop("keep", None if name == "full" else self.keep)
        return make_policy(name, keep, **options)

    def configuration(self) -> dict[str, Any]:
        return {**asdict(self), "shape": self.shape_name}

    @property
    def shape_name(self) -> str | None:
        return DEFAULT_SHAPE if self.model is None and self.shape is None else self.shape


def check_specs(policies: tuple[str, ...]) -> None:
    """``ValueError`` if there are none, or if one is named twice."""
    if not policies:
        raise ValueError("--policies is empty: name at least one")
    if len(set(policies)) != len(policies):
        raise ValueError(f"--policies names one twice: {', '.join(policies)}")


class _Timed(Plan):
    """A plan with a ``setting``."""

    setting: Setting

    @property
    def configuration(self) -> dict[str, Any]:
        """The options of the setting and of the plan, for a result."""
        own = {name: value for name, value in asdict(self).items() if name != "setting"}  # type: ignore[call-overload]
        own = {name: list(each) if isinstance(each, tuple) else each for name, each in own.items()}
        return {**self.setting.configuration(), **own}


@dataclass(frozen=True)
class ThroughputPlan(_Timed):
    """``batch`` requests of ``prompt_len`` random tokens, each generating ``output_len``."""

    setting: Setting
    batch: Batch = 16
    prompt_len: PromptLen = 512
    output_len: OutputLen = 64


@dataclass(frozen=True)
class LatencyPlan(_Timed):
    """Every batch size at every prompt length; requests of a batch arrive together."""

    setting: Setting
    batches: Batches = (1,)
    prompt_lens: PromptLens = (128, 512, 2048)
    output_len: Annotated[
        int, Option("Tokens that each request generates, at least 2.", check=at_least(2))
    ] = 32


@dataclass(frozen=True)
class AdaptersPlan(_Timed):
    """A batch without adapters, then with each number of ``adapters``, which its requests use in
    turns.  Adapters are random, of one ``rank``, on all linear layers.

    With one thread, times are CPU times, which do not depend on the load of the machine.
    """

    setting: Annotated[
        Setting,
        pick(without=("policies", "keep", "kv_dtype"), policies=("full",), repeats=5),
    ]
    adapters: Annotated[
        tuple[int, ...], Option("Number of LoRA adapters in the batch, a list.", check=at_least(1))
    ] = (1, 4, 16)
    rank: Annotated[int, Option("Rank of each adapter.", check=at_least(1))] = 16
    batch: Batch = 16
    prompt_len: PromptLen = 128
    output_len: OutputLen = 32


@dataclass(frozen=True)
class MemoryPlan(_Timed):
    """Twice as many equal requests as fit, so that some wait; at most ``most`` are run."""

    setting: Annotated[Setting, pick(without=("repeats", "warmup"), kv_memory=DEFAULT_MEMORY)]
    prompt_len: PromptLen = 512
    output_len: OutputLen = 32
    most: Annotated[
        int, Option("Maximum number of requests to run.", flags=("--requests",), check=at_least(1))
    ] = 64

    @property
    def shared(self) -> Setting:
        memory = self.setting.kv_memory
        return replace(self.setting, kv_memory=DEFAULT_MEMORY) if memory == AUTO else self.setting

    @property
    def configuration(self) -> dict[str, Any]:
        return {**super().configuration, "kv_memory": self.shared.kv_memory}


@dataclass(frozen=True)
class KernelPlan(Plan):
    """Attention and compaction kernels; ``storage``: smallest number of bytes of entries to cycle
    through."""

    backend: Backend = AUTO
    dtype: Dtype = "bfloat16"
    device: Device = AUTO
    batches: Batches = (1, 4, 16)
    contexts: PromptLens = (512, 1024, 2048, 4096, 8192)
    threads: Threads = 0
    repeats: Repeats = 5
    warmup: Warmup = 1
    storage: int = 256 * 2**20
    page_size: Annotated[int, Option("Tokens in a page of the cache.", check=at_least(1))] = 16

    def check(self) -> None:
        super().check()
        for context in self.contexts:
            if context < 2 * self.page_size:
                raise ValueError(f"--prompt-len {context} must be at least {2 * self.page_size}")


@dataclass(frozen=True)
class KvDtypesPlan(Plan):
    """Decode attention for each storage of entries; ``storage``: smallest number of bytes of 16-bit
    entries to cycle through."""

    kv_dtypes: Annotated[
        tuple[str, ...],
        Option("How the cache stores keys and values, in addition to 16 bits: int8, int4, fp8."),
    ] = ("int8", "int4", "fp8")
    backend: Backend = AUTO
    dtype: Dtype = "bfloat16"
    device: Device = AUTO
    batches: Batches = (1, 16)
    contexts: PromptLens = (512, 2048, 8192)
    repeats: Repeats = 7
    warmup: Warmup = 1
    storage: int = 256 * 2**20
    page_size: int = 16

    def check(self) -> None:
        super().check()
        from pyramidinfer.codec import find_codec

        for name in self.kv_dtypes:
            if find_codec(name) is None:
                raise ValueError(
                    f"--kv-dtypes {name}: every row is compared with the model's dtype; name some "
                    f"of {', '.join(KV_DTYPES[1:])}"
                )


@dataclass(frozen=True)
class LosslessPlan(Plan):
    """The full cache with and without drafts: a model with its weights on real text, or random
    weights in a ``shape`` with drafts accepted at the rate ``accept``."""

    model: Annotated[
        str | None,
        Option("Measure this model, on real text.", unset="smollm2 if no shape is given"),
    ] = None
    shape: Shape = None
    drafts: Annotated[
        tuple[str, ...],
        Option(
            "Policies that choose the entries read to draft tokens: NAME or NAME:option=value,….",
            parse=parse_specs,
            show=" ".join,
        ),
    ] = ("pyramid:keep=.1",)
    draft_tokens: Annotated[
        tuple[str, ...], Option(f"Tokens drafted in a step, a list: 0 to {MOST_DRAFTS}, or auto.")
    ] = ("1", "2", "4", AUTO)
    batches: Batches = (1, 4)
    contexts: PromptLens = (1024, 2048, 4096, 6500)
    accept: Annotated[
        float | None,
        Option(
            "With --shape: the share of drafted tokens that is accepted (simulated).",
            check=check_share,
        ),
    ] = None
    check_prompts: Annotated[
        int,
        Option(
            "With --model: also answer this many prompts of 40 to 400 tokens with and without "
            "drafts, and count the answers that differ.",
            check=at_least(0),
        ),
    ] = 0
    page_size: Annotated[int, Option("Tokens in a page of the cache.", check=at_least(1))] = 16
    output_len: OutputLen = 64
    repeats: Repeats = 3
    dtype: Dtype = "bfloat16"
    kv_dtype: KvDtype = AUTO
    device: Device = AUTO
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.model is None and self.shape is None:
            object.__setattr__(self, "model", "smollm2")

    def check(self) -> None:
        super().check()
        from pyramidinfer.policies import Lossless
        from pyramidinfer.policies.registry import parse_policy

        if self.model is not None and self.shape is not None:
            raise ValueError("give --model or --shape, one of them")
        if (self.shape is None) != (self.accept is None):
            raise ValueError(
                f"--accept {self.accept}: set it with --shape, since random weights draft no "
                f"useful tokens, and leave it out with --model, which measures it"
            )
        if self.check_prompts and self.model is None:
            raise ValueError(
                f"--check-prompts {self.check_prompts} needs --model: random weights draft nothing"
            )
        for steps in self.draft_tokens:
            if steps != AUTO and not (steps.isdecimal() and int(steps) <= MOST_DRAFTS):
                raise ValueError(f"--draft-tokens {steps}: write auto or 0 to {MOST_DRAFTS}")
        for spec in self.drafts:
            Lossless(parse_policy(spec))
        if not self.cells:
            raise ValueError(f"every batch and context has more than {MOST_TOKENS} tokens in total")

    @property
    def cells(self) -> list[tuple[int, list[int]]]:
        """Each context with its batches."""
        found = [
            (context, [batch for batch in self.batches if batch * context <= MOST_TOKENS])
            for context in self.contexts
        ]
        return [(context, batches) for context, batches in found if batches]


def counts_or_none(option: str, text: str) -> tuple[int, ...]:
    """``"1,4"`` → whole numbers; an empty text is an empty tuple."""
    try:
        return tuple(map(int, parse_words(text)))
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers, separated by commas") from None


def show_counts(counts: tuple[int, ...]) -> str:
    """Text that ``counts_or_none`` parses."""
    return ",".join(map(str, counts))


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
class WeightsPlan(Plan):
    """Text: ``samples`` passages, ``continuation`` tokens of each scored after ``context`` others.
    Speed: ``batches`` of requests of ``prompt_len`` + ``output_len`` tokens; ``()`` measures
    no speed."""

    subject: Annotated[
        Subject,
        pick(
            *("model", "text", "dtype", "backend", "kv_memory"),
            model="smollm2",
            dtype="bfloat16",
            device="cpu",
        ),
    ]
    weights: Annotated[
        tuple[str, ...],
        Option(
            "How weights are stored, in addition to the model's dtype: int8, int4, gguf; a list.",
            check=one_of(WEIGHTS[1:]),
        ),
    ] = ("int8", "int4")
    samples: Annotated[
        int, Option("Number of text passages for the perplexity.", check=at_least(1))
    ] = 20
    context: int = 256
    continuation: int = 256
    batches: Annotated[
        tuple[int, ...],
        Option(
            "Number of requests that decode together, a list; with an empty list, no times are "
            "measured.",
            flags=("--batch",),
            check=at_least(1),
            parse=counts_or_none,
            show=show_counts,
        ),
    ] = (1, 4, 16)
    prompt_len: PromptLen = 512
    output_len: OutputLen = 64
    repeats: Repeats = 5
    warmup: Warmup = 1
    seed: Seed = 0


@dataclass(frozen=True)
class StepPlan(Plan):
    """Steps of ``batches`` of requests, each with ``prompt_len`` + ``output_len`` tokens."""

    subject: Annotated[
        Subject,
        pick(
            *("model", "dtype", "backend", "kv_memory"),
            model="smollm2",
            dtype="bfloat16",
            device="cpu",
        ),
    ]
    weights: ManyWeights = ("auto", "int8", "int4")
    batches: Batches = (1, 4, 16)
    threads: Threads = 0
    prompt_len: PromptLen = 128
    output_len: OutputLen = 64
    repeats: Repeats = 3
    warmup: Warmup = 1
    seed: Seed = 0

    def check(self) -> None:
        super().check()
        if not self.weights:
            raise ValueError("--weights is empty: name at least one")
        if self.output_len < 3:
            raise ValueError(f"--output-len {self.output_len}: give at least 3")


@dataclass(frozen=True)
class FootprintPlan(Plan):
    """A server for each pair of weights and kv_memory, with its pool filled by full caches."""

    model: OwnModel = None
    weights: Annotated[
        tuple[str, ...],
        Option("How weights are stored: auto, int8, int4.", check=one_of(WEIGHTS)),
    ] = ("auto",)
    kv_memory: Annotated[
        tuple[str, ...],
        Option("Memory for the KV caches, a list.", check=size_text),
    ] = ("64MiB", "256MiB")
    prompt_len: PromptLen = 1024
    dtype: Dtype = "auto"
    threads: Threads = 0
    extras: Annotated[
        tuple[str, ...], Option("Package extras to include in the installed size, a list.")
    ] = (
        "server",
        "lab",
        "otel",
    )

    @property
    def configuration(self) -> dict[str, Any]:
        return asdict(self)


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
    dtype: Dtype = AUTO
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
    dtype: Dtype = AUTO
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
