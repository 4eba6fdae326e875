"""Options that benches and studies share (``options.Option``), and the checks of their plans.

Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated

from pyramidinfer.config import KV_DTYPES, WEIGHTS
from pyramidinfer.options import Option, at_least, check_options, one_of, parse_bytes

__all__ = ["Plan", "parse_specs", "share", "size_text", "split_specs"]


class Plan:
    """The options of a bench or a study: a dataclass that checks them."""

    def check(self) -> None:
        """``ValueError``, naming the option, if the plan cannot be run."""
        check_options(self, as_flags=True)
        for each in fields(self):  # type: ignore[arg-type]
            inner: object = getattr(self, each.name)
            if isinstance(inner, Plan):
                inner.check()


def split_specs(text: str) -> tuple[str, ...]:
    """``"full,snapkv"`` or ``"full snapkv:window=8,kernel=5"`` → policy specs."""
    words = text.split()
    return tuple(
        spec for word in words for spec in ([word] if ":" in word else word.split(",")) if spec
    )


def parse_specs(option: str, text: str) -> tuple[str, ...]:
    """``split_specs``, as an option's ``parse``."""
    return split_specs(text)


def size_text(name: str, value: object) -> None:
    """The check of an option: a number of bytes as text, or auto."""
    if value != "auto":
        parse_bytes(value, name)  # type: ignore[arg-type]


def share(name: str, value: object) -> None:
    """The check of an option: a share in (0, 1]."""
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError(f"{name}: {value} must be above 0 and at most 1")


Model = Annotated[
    str | None, Option("Model folder, Hugging Face hub id, name of a fetched model, or GGUF file.")
]
OwnModel = Annotated[
    str | None,
    Option(
        "Model folder, Hugging Face hub id, name of a fetched model, or GGUF file.",
        unset="the shipped model",
    ),
]
NamedModel = Annotated[str, Option("Model folder, Hugging Face hub id, or fetched model.")]
Shape = Annotated[
    str | None,
    Option(
        "Instead of a model: random weights with the layer sizes of llama2-7b, llama2-13b, "
        "llama3-8b or "
        "bench-200m.",
        unset="bench-200m if no model is given",
    ),
]
Policies = Annotated[
    tuple[str, ...],
    Option(
        "Policies to compare: NAME,NAME or 'NAME NAME:option=value,…'. The first is the "
        "reference for the others.",
        parse=parse_specs,
        show=" ".join,
    ),
]
Keep = Annotated[
    float, Option("Share of the cache that a policy keeps if its entry in --policies sets no keep.")
]
Dtype = Annotated[
    str, Option("Data type of weights and computation: auto, float32, bfloat16, float16, float64.")
]
KvDtype = Annotated[
    str,
    Option(
        "How the cache stores keys and values: auto (in --dtype), int8, fp8 or int4.",
        check=one_of(KV_DTYPES),
    ),
]
Weights = Annotated[
    str,
    Option(
        "How the weights of linear layers are stored: auto (in --dtype), int8 or int4.",
        check=one_of(WEIGHTS),
    ),
]
ManyWeights = Annotated[
    tuple[str, ...],
    Option(
        "How the weights of linear layers are stored: auto, int8, int4, gguf; a list is measured "
        "one after another.",
        check=one_of(WEIGHTS),
    ),
]
Device = Annotated[str, Option("auto (a GPU if there is one), cpu or cuda.")]
Backend = Annotated[
    str, Option("Attention kernels: auto (the fastest available), cpu, triton or reference.")
]
Threads = Annotated[int, Option("CPU threads; 0 lets torch choose the number.", check=at_least(0))]
Repeats = Annotated[
    int,
    Option("Number of measured runs of each configuration; these run in turn.", check=at_least(1)),
]
Warmup = Annotated[
    int, Option("Number of unmeasured runs before the measured ones.", check=at_least(1))
]
KvMemory = Annotated[
    str,
    Option(
        "Memory for the KV caches; auto: as much as all requests need together.", check=size_text
    ),
]
CacheMemory = Annotated[str, Option("Memory for the KV caches.")]
RankMemory = Annotated[str, Option("Memory for the KV caches of each rank.", check=size_text)]
Seed = Annotated[int, Option("Random seed, for random weights, prompts or samples.")]
Batch = Annotated[int, Option("Number of concurrent requests.", check=at_least(1))]
Batches = Annotated[
    tuple[int, ...],
    Option(
        "Number of concurrent requests; a list is measured one number after another.",
        flags=("--batch",),
        check=at_least(1),
    ),
]
PromptLen = Annotated[int, Option("Tokens of each prompt.", check=at_least(1))]
PromptLens = Annotated[
    tuple[int, ...],
    Option(
        "Tokens of each prompt; a list is measured one number after another.",
        flags=("--prompt-len",),
        check=at_least(1),
    ),
]
OutputLen = Annotated[int, Option("Tokens that each request generates.", check=at_least(1))]
#: Where a plan's field has another name.
PromptTokens = Annotated[
    int, Option("Tokens of each prompt.", flags=("--prompt-len",), check=at_least(1))
]
OutputTokens = Annotated[
    int, Option("Tokens that each request generates.", flags=("--output-len",), check=at_least(1))
]
Text = Annotated[
    str | None,
    Option(
        "UTF-8 text file from which samples are taken.",
        unset="English text; for the shipped model, text of its synthetic language",
    ),
]
Samples = Annotated[int, Option("Number of samples for each result.", check=at_least(1))]
Context = Annotated[int, Option("Tokens of context in each sample.", check=at_least(1))]
Specs = Annotated[
    tuple[str, ...],
    Option(
        "Policies to measure: NAME,NAME or 'NAME NAME:option=value,…'.",
        parse=parse_specs,
        show=" ".join,
    ),
]
Keeps = Annotated[
    tuple[float, ...],
    Option("Values of keep to measure each policy at, in (0, 1].", check=share),
]
KvDtypes = Annotated[
    tuple[str, ...],
    Option(
        "How the cache stores keys and values: auto, int8, int4, fp8; a list is measured one "
        "after another.",
        check=one_of(KV_DTYPES),
    ),
]
