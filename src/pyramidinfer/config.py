"""The engine's options, validated once and frozen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyramidinfer.options import (
    Option,
    at_least,
    check_choice,
    check_options,
    check_share,
    check_whole,
    is_number,
    named_options,
    nearest,
    one_of,
    parse_bytes,
    positive,
)

if TYPE_CHECKING:  # it takes seconds, and --help needs none of it
    import torch

__all__ = [
    "MOST_DRAFTS",
    "EngineConfig",
    "check_choice",
    "check_share",
    "check_whole",
    "is_number",
    "named_options",
    "nearest",
    "parse_bytes",
    "parse_device",
    "parse_dtype",
    "parse_modules",
]

DTYPES = ("float64", "float32", "bfloat16", "float16")
#: How keys and values may be stored; see codec.py.
KV_DTYPES = ("auto", "int8", "int4", "fp8")
#: The most drafted tokens of a request that one step verifies.
MOST_DRAFTS = 8
#: How a linear's weights may be stored; see models/weights.py.
WEIGHTS = ("auto", "int8", "int4", "gguf")
#: Headings of ``--help``.
ENGINE = "Memory and scheduling"


def parse_modules(given: Any) -> dict[str, str]:
    """Adapters by name → folders or hub ids by name, from such a mapping or from texts:
    ``"NAME=PATH"``, or the JSON object ``{"name": …, "path": …}``."""
    pairs: list[tuple[Any, Any]] = []
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif isinstance(given, list | tuple):
        pairs = [_parse_module(each) for each in given]
    else:
        raise ValueError(f"lora_modules={given!r:.80} must be folders by name, {{'sql': 'path'}}")
    found: dict[str, str] = {}
    for name, path in pairs:
        if not (isinstance(name, str) and name and isinstance(path, str | Path) and str(path)):
            raise ValueError(f"lora_modules: {name!r:.60}={path!r:.60} must be a name and a path")
        if name in found:
            raise ValueError(f"lora_modules names {name!r} twice; every adapter needs its own name")
        found[name] = str(path)
    return found


def _parse_module(text: Any) -> tuple[str, str]:
    wrong = f'lora_modules: {text!r:.80} is neither NAME=PATH nor {{"name": …, "path": …}}'
    if not isinstance(text, str):
        raise ValueError(wrong)
    if not text.lstrip().startswith("{"):
        name, separator, path = text.partition("=")
        if not separator:
            raise ValueError(wrong)
        return name.strip(), path.strip()
    try:
        entry = json.loads(text)
    except ValueError:
        raise ValueError(wrong) from None
    if entry.keys() != {"name", "path"}:
        raise ValueError(f"{wrong}: those are its two keys")
    return entry["name"], entry["path"]


def parse_dtype(value: str | torch.dtype, checkpoint: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in; ``auto`` is the checkpoint's dtype."""
    import torch

    known: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
    value = str(value).removeprefix("torch.")
    if value == "auto":
        return checkpoint if checkpoint in known.values() and checkpoint else torch.float32
    if value not in known:
        raise ValueError(f"dtype={value!r} is unknown; {nearest(value, [*DTYPES, 'auto'])}")
    return known[value]


def parse_device(value: str | torch.device) -> torch.device:
    """``auto`` is the first CUDA device if there is one, else the CPU."""
    import torch

    if value == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={value!r} is unknown: write 'auto', 'cpu' or 'cuda'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={value!r}: no CUDA device is visible; use device='cpu'")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={value!r} is not supported: use 'auto', 'cpu' or 'cuda'")
    return device


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine's settings; each field's help text says what it means.

    ``ValueError`` for an invalid value, or for one that has no effect with the others.
    """

    kv_memory: Annotated[
        int | str,
        Option(
            "Memory for the KV caches of all requests together, on each rank. The working memory "
            "of prefill is taken from it too.",
            see="#size-the-memory",
        ),
    ] = "1GiB"
    kv_dtype: Annotated[
        str,
        Option(
            "How the cache stores keys and values: auto (in --dtype), int8 or fp8 (about half the "
            "bytes of 16 bits), or int4 (about a quarter, and less exact).",
            check=one_of(KV_DTYPES),
            see="kv_dtype.md",
        ),
    ] = "auto"
    weights: Annotated[
        str,
        Option(
            "How the weights of linear layers are stored: auto (in --dtype), int8 or int4 (about "
            "half or a third of the bytes of 16 bits, and faster steps), or gguf (as quantized in "
            "the "
            "model's GGUF file). All but auto need the C++ kernels.",
            check=one_of(WEIGHTS),
            see="weights.md",
        ),
    ] = "auto"
    lora_modules: Annotated[
        Mapping[str, str] | Sequence[str] | None,
        Option(
            "A LoRA adapter that requests may select by name as their model: NAME=PATH, or JSON "
            '{"name": …, "path": …}. Requests with different adapters run in the same batch. '
            "May be repeated.",
            repeat=True,
            see="models.md",
        ),
    ] = None
    draft_tokens: Annotated[
        int | None,
        Option(
            f"Tokens that a lossless request drafts in every step, up to {MOST_DRAFTS}; 0 switches "
            f"drafting off. It changes no answer.",
            unset="chosen for speed, from measured times",
            check=at_least(0),
            see="lossless.md",
        ),
    ] = None
    profile: Annotated[
        bool,
        Option(
            "For pyramid, duo and triattention: use a stored head profile (how much of a text each "
            "KV head needs), but do not measure a missing one. Without this option, it is measured "
            "when the model is loaded (a few seconds, once for each model).",
            flags=("--no-profile",),
            inverted=True,
            see="heads.md",
        ),
    ] = True
    tensor_parallel_size: Annotated[
        int,
        Option(
            "Tensor parallelism: number of processes that every layer is split over, each on its "
            "own device. --kv-memory is the memory of each.",
            check=at_least(1),
            see="scaling.md",
        ),
    ] = 1
    pipeline_parallel_size: Annotated[
        int,
        Option(
            "Pipeline parallelism: number of stages that the layers are divided into, each of "
            "--tensor-parallel-size processes. Use it if the number of heads is not divisible for "
            "tensor parallelism, or if the connections between devices are slow.",
            check=at_least(1),
            see="scaling.md",
        ),
    ] = 1
    pipeline_layers: Annotated[
        str | None,
        Option(
            "Number of layers of each pipeline stage, such as 16,14.",
            unset="balanced by the work that each layer has under the policy",
            see="scaling.md",
        ),
    ] = None
    rank_timeout: Annotated[
        float | None,
        Option(
            "With tensor or pipeline parallelism: if one process does not answer for this many "
            "seconds, all processes end.",
            unset="60",
            check=positive,
        ),
    ] = None
    max_requests: Annotated[
        int,
        Option(
            "Maximum number of requests that run at once. Lower it if the time between tokens "
            "matters more than throughput.",
            panel=ENGINE,
            check=at_least(1),
        ),
    ] = 64
    step_tokens: Annotated[
        int,
        Option(
            "Maximum number of tokens that one step computes. A prompt token that the policy drops "
            "between layers counts only as the share of layers that compute it. With a lower "
            "value, prompts take longer, but delay the answers in progress less.",
            panel=ENGINE,
            check=at_least(1),
        ),
    ] = 2048
    page_size: Annotated[
        int,
        Option(
            "Tokens in a page of the KV cache, for each KV head. Smaller pages waste less memory "
            "if "
            "budgets are small.",
            panel=ENGINE,
            check=at_least(1),
        ),
    ] = 16
    prefill_chunk: int = 1024
    reuse_share: Annotated[
        float,
        Option(
            "Share of --kv-memory that may hold the caches of finished requests for the next turns "
            "of their conversations, until a request needs the memory. 0 switches reuse off.",
            panel=ENGINE,
            check=check_share,
            see="#conversations",
        ),
    ] = 0.5
    share_prefixes: Annotated[
        bool,
        Option(
            "Share prefixes between API keys too. A client that measures the time to first token "
            "can then find out whether another key has sent the same prefix.",
            panel=ENGINE,
            see="#prefixes",
        ),
    ] = False
    slot_scores: Annotated[
        bool,
        Option(
            "Reserve memory for a running score of each cache entry (4 bytes per entry and KV "
            "head), so that requests may select the policy h2o.",
            panel=ENGINE,
        ),
    ] = False
    admission: Annotated[
        str,
        Option(
            "When a waiting request starts. reserve: when the most memory it can need is free, so "
            "that no request is preempted. overcommit: when the memory it is expected to need is "
            "free; use it if answers end long before max_tokens.",
            panel=ENGINE,
            check=one_of(("reserve", "overcommit")),
        ),
    ] = "reserve"
    expected_output: Annotated[
        float,
        Option(
            "With --admission overcommit: the share of its max_tokens that a request is expected "
            "to generate.",
            panel=ENGINE,
            check=check_share,
        ),
    ] = 0.5
    preempt: Annotated[
        str,
        Option(
            "With --admission overcommit: what to do with the cache of a preempted request. swap "
            "moves it to host memory; recompute frees it and computes it again later (policy full "
            "only; with others it is swapped).",
            panel=ENGINE,
            check=one_of(("swap", "recompute")),
        ),
    ] = "swap"
    elastic: Annotated[
        float | None,
        Option(
            "With --admission overcommit: before a request is preempted, lower the keep of running "
            "requests, but not below this value, in (0, 1].",
            unset="off",
            panel=ENGINE,
        ),
    ] = None
    host_kv_memory: Annotated[
        int | str | None,
        Option(
            "Host memory for KV caches that do not fit into --kv-memory.",
            unset="none; with --admission overcommit as much as --kv-memory",
            panel=ENGINE,
            see="#kv-cache-beyond-device-memory",
        ),
    ] = None
    offload_lossless: Annotated[
        bool,
        Option(
            "Keep the caches of lossless requests in --host-kv-memory. --kv-memory then holds the "
            "part that drafts read, and one layer of the rest at a time while drafts are verified. "
            "For devices that are too small for the whole cache.",
            panel=ENGINE,
            see="lossless.md",
        ),
    ] = False
    disk_kv_cache: Annotated[
        str | Path | None,
        Option(
            "Folder for the caches of conversations that do not fit into host memory. They are "
            "found "
            "again after a restart.",
            panel=ENGINE,
            see="#kv-cache-beyond-device-memory",
        ),
    ] = None
    disk_kv_memory: Annotated[
        int | str | None,
        Option("Maximum size of the files in --disk-kv-cache.", panel=ENGINE),
    ] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_memory", parse_bytes(self.kv_memory))
        for name in ("host_kv_memory", "disk_kv_memory"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_bytes(getattr(self, name), name))
        check_options(self)
        check_whole("prefill_chunk", self.prefill_chunk, 1)
        if self.rank_timeout is not None and self.ranks == 1:
            raise ValueError(
                f"rank_timeout={self.rank_timeout} has no effect on one rank; leave it out, or "
                f"set tensor_parallel_size or pipeline_parallel_size"
            )
        self._check_layers()
        object.__setattr__(self, "lora_modules", parse_modules(self.lora_modules or {}))
        for switch in ("profile", "share_prefixes", "offload_lossless"):
            if not isinstance(value := getattr(self, switch), bool):
                raise ValueError(f"{switch}={value!r} must be True or False")
        self._check_drafts()
        if self.weights != "auto" and self.ranks > 1:
            raise ValueError(
                f"weights={self.weights!r} works on one rank only: leave it out, or "
                f"tensor_parallel_size and pipeline_parallel_size"
            )
        self._check_offload()
        if self.elastic is not None:
            if not (is_number(self.elastic) and 0 < self.elastic <= 1):
                raise ValueError(f"elastic={self.elastic!r} must be above 0 and at most 1")
            if self.admission != "overcommit":
                raise ValueError(
                    f"elastic={self.elastic} needs admission='overcommit': with 'reserve' memory "
                    f"never runs out"
                )

    def _check_drafts(self) -> None:
        if self.draft_tokens is None:
            return
        if self.draft_tokens > MOST_DRAFTS:
            raise ValueError(
                f"draft_tokens={self.draft_tokens}: a step verifies at most {MOST_DRAFTS}"
            )
        if self.draft_tokens and self.admission == "overcommit" and self.page_size == 1:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} has no effect with admission='overcommit' "
                f"and page_size=1: drafts get no pages of their own then; leave one of "
                f"them out"
            )
        if self.ranks > 1:
            raise ValueError(
                f"draft_tokens={self.draft_tokens} has no effect on {self.ranks} ranks: "
                f"lossless requests need a single rank; leave it out, or tensor_parallel_size and "
                f"pipeline_parallel_size"
            )

    def _check_offload(self) -> None:
        if self.offload_lossless:
            self._check_away()
        folder, size = self.disk_kv_cache, self.disk_kv_memory
        if (folder is None) != (size is None):
            raise ValueError(
                f"disk_kv_cache={folder!r} and disk_kv_memory={size!r} must be set together: the "
                f"folder, and the size of its files"
            )
        if folder is not None and not (isinstance(folder, str | Path) and str(folder)):
            raise ValueError(f"disk_kv_cache={folder!r} must be a folder")
        if folder is not None and not self.host_budget:
            raise ValueError(
                f"disk_kv_cache={str(folder)!r} needs host_kv_memory: caches are copied through it"
            )
        if folder is not None and self.ranks > 1:
            raise ValueError(
                f"disk_kv_cache={str(folder)!r} works on one rank only: leave it out, or "
                f"tensor_parallel_size and pipeline_parallel_size"
            )
        for name in ("host_kv_memory", "disk_kv_cache"):
            unused = name == "disk_kv_cache" or self.admission == "reserve"
            unused &= not (name == "host_kv_memory" and self.offload_lossless)
            if getattr(self, name) is not None and not self.reuse_share and unused:
                raise ValueError(
                    f"{name}={getattr(self, name)!s} has no effect with reuse_share=0: no "
                    f"conversation is held then; set reuse_share or leave it out"
                )

    def _check_away(self) -> None:
        name = f"offload_lossless={self.offload_lossless}"
        if self.ranks > 1:
            raise ValueError(
                f"{name}: lossless requests need a single rank; leave it out, or "
                f"tensor_parallel_size and pipeline_parallel_size"
            )
        if not self.host_kv_memory:
            raise ValueError(f"{name} needs host_kv_memory, which holds the caches; set it")
        if self.admission == "overcommit":
            raise ValueError(
                f"{name} works with admission='reserve' only: a cache that is partly in host "
                f"memory cannot be preempted; leave out one of the two"
            )

    @property
    def adapters(self) -> dict[str, str]:
        """``lora_modules`` by name."""
        return parse_modules(self.lora_modules or {})

    def _check_layers(self) -> None:
        given, stages = self.pipeline_layers, self.pipeline_parallel_size
        if given is None:
            return
        if not (isinstance(given, str) and re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", given)):
            raise ValueError(
                f"pipeline_layers={given!r} must be the layers of each stage, such as '16,14'"
            )
        if stages == 1 or len(given.split(",")) != stages:
            raise ValueError(
                f"pipeline_layers={given!r} names {len(given.split(','))} stages, but "
                f"pipeline_parallel_size={stages}"
            )

    @property
    def ranks(self) -> int:
        """Processes that the model is split over."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def budget(self) -> int:
        """``kv_memory`` in bytes."""
        return parse_bytes(self.kv_memory)

    @property
    def host_budget(self) -> int:
        """``host_kv_memory`` in bytes."""
        if self.host_kv_memory is not None:
            return parse_bytes(self.host_kv_memory)
        return self.budget if self.admission == "overcommit" else 0

    @classmethod
    def from_options(cls, others: Iterable[str] = (), **options: Any) -> EngineConfig:
        """Build from keywords; an unknown one raises ``ValueError`` with the nearest name.

        ``others``: further names that the caller handles itself.
        """
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; {nearest(name, {*known, *others})}")
        return cls(**options)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision that attention weights are computed in: float64 for float64, else float32."""
    import torch

    return torch.float64 if dtype == torch.float64 else torch.float32
