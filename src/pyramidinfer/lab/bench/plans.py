"""Options of each bench.  Plain values; nothing here imports torch."""

from __future__ import annotations

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
    OutputLen,
    OwnModel,
    Plan,
    Policies,
    PromptLen,
    PromptLens,
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
    "Setting",
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
