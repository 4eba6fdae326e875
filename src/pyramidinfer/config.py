"""The engine's options, validated once and frozen."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

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
]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
#: How keys and values may be stored; see codec.py.
KV_DTYPES = ("auto", "int8", "int4", "fp8")
#: Guessed tokens of a request that a step verifies, at most.
MOST_DRAFTS = 8
#: How a linear's weights may be stored; see models/weights.py.
WEIGHTS = ("auto", "int8", "int4")
UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    UNITS |= {f"{_letter}iB": 1024**_power, f"{_letter}B": 1000**_power, _letter: 1024**_power}


def nearest(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` and the choices, to end an error message with."""
    options = sorted(choices)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(choices: {', '.join(options)})"


def is_number(value: object) -> bool:
    """An int or a float that is neither a bool nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def check_share(name: str, value: object, *, least: float = 0.0) -> None:
    """``ValueError`` unless ``least`` <= value <= 1."""
    if not (is_number(value) and least <= value <= 1):  # type: ignore[operator]
        raise ValueError(f"{name}={value!r} must lie between {least:g} and 1")


def check_whole(name: str, value: object, least: int) -> None:
    """``ValueError`` unless a whole number of at least ``least``."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """``ValueError`` with the nearest choice unless ``value`` is one of them."""
    options = list(choices)
    if not isinstance(value, str) or value not in options:
        raise ValueError(f"{name}={value!r} is unknown; {nearest(str(value), options)}")


T = TypeVar("T")


def named_options(kind: type[T]) -> type[T]:
    """A dataclass whose unknown options raise ``ValueError`` with the nearest name."""
    build = kind.__init__
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]

    @functools.wraps(build)
    def init(self: T, *values: Any, **options: Any) -> None:
        for name in options:
            if name not in known:
                raise ValueError(f"{kind.__name__} has no option {name!r}; {nearest(name, known)}")
        build(self, *values, **options)

    kind.__init__ = init  # type: ignore[method-assign, assignment]
    return kind


def parse_bytes(value: int | str, name: str = "kv_memory") -> int:
    """``2147483648``, ``"2GiB"``, ``"512 MiB"``, ``"1.5GB"`` → bytes."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{name}={value!r}: give bytes, or a text such as '2GiB'")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        units = {unit.lower(): size for unit, size in UNITS.items()}
        if not match or match[2].lower() not in units:
            raise ValueError(
                f"{name}={value!r} is not a size: write bytes or a number with a unit, '2GiB'"
            )
        size = units[match[2].lower()]
        value = int(float(match[1]) * size) if "." in match[1] else int(match[1]) * size
    if value <= 0:
        raise ValueError(f"{name}={value} must be above 0 bytes")
    if value > 2**60:
        raise ValueError(f"{name}={value!s:.20} … is more than any machine has")
    return value


def parse_dtype(value: str | torch.dtype, checkpoint: torch.dtype | None) -> torch.dtype:
    """The dtype to compute in; ``auto`` is the checkpoint's own."""
    value = str(value).removeprefix("torch.")
    if value == "auto":
        return checkpoint if checkpoint in DTYPES.values() and checkpoint else torch.float32
    if value not in DTYPES:
        raise ValueError(f"dtype={value!r} is unknown; {nearest(value, [*DTYPES, 'auto'])}")
    return DTYPES[value]


def parse_device(value: str | torch.device) -> torch.device:
    """``auto`` is the first CUDA device where there is one, else the CPU."""
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
    """What the engine may use.

    kv_memory : bytes for keys, values, query rings and prefill transients of all requests.
    page_size : entries a page holds, per KV head.
    kv_dtype : how keys and values are stored: ``auto`` in the model's dtype, ``int8``, ``int4`` or
        ``fp8`` (e4m3) in so many bits, with a scale for every 64 channels (docs/kv_dtype.md).
    weights : how the weights of linears are stored: ``auto`` in the model's dtype, ``int8`` or
        ``int4`` in so many bits, made while the model is loaded (docs/weights.md).
    max_requests : requests in flight at once.
    step_tokens : work of one step in tokens through the whole model; a step's budget is this
        times the number of layers, in layer-tokens.
    prefill_chunk : tokens of a prompt that go through a layer at once.
    slot_scores : room for a running score beside each entry, so that a request may have a policy
        that keeps one (H2O) where the engine's own does not.
    reuse_share : share of kv_memory that caches of finished conversations may hold while nobody
        needs it.
    admission : ``"reserve"`` lets a request begin when the most it can need fits, so that nothing
        runs short; ``"overcommit"`` when what it is expected to need does.
    expected_output : with overcommit, the share of ``max_tokens`` a request is expected to
        generate.
    preempt : with overcommit, what becomes of the youngest request when memory runs short:
        ``"swap"`` moves its cache to host memory and back, ``"recompute"`` computes it anew where
        its policy keeps everything (others are swapped all the same).
    host_kv_memory : host memory that caches may be moved to: those of finished conversations when
        the pool has no room for them, and with overcommit those of preempted requests, to which
        conversations give way.  What all requests that have begun may need at most stays within
        kv_memory and this together.  None: with overcommit as much as kv_memory, else none.
    disk_kv_cache, disk_kv_memory : a folder, and how many bytes of files in it, for caches of
        conversations that host memory has no room for, and that outlive the process.
    draft_tokens : for lossless requests, tokens that are guessed in every step; None: as many as
        pay by what was measured so far.  It changes no answer.
    profile : measure what each KV head needs where a policy asks for that and nobody has yet
        (seconds, once a model; see docs/heads.md); with False, what is known is all there is.
    elastic : with overcommit, lower the ``keep`` of compressed requests, never below this share,
        before any is moved; None is off.
    tensor_parallel_size : ranks (processes, each on a device of its own) that split every layer's
        heads, MLP and vocabulary; ``kv_memory`` is each one's.
    pipeline_parallel_size : stages that the layers are dealt to, each of ``tensor_parallel_size``
        ranks.
    pipeline_layers : layers of each stage, ``"16,14"``; None deals them by the work that the policy
        forecasts.
    rank_timeout : seconds after which a rank that does not answer ends all of them; None is 60.
    """

    kv_memory: int | str = "1GiB"
    page_size: int = 16
    kv_dtype: str = "auto"
    weights: str = "auto"
    max_requests: int = 64
    step_tokens: int = 2048
    prefill_chunk: int = 1024
    slot_scores: bool = False
    reuse_share: float = 0.5
    admission: str = "reserve"
    expected_output: float = 0.5
    preempt: str = "swap"
    host_kv_memory: int | str | None = None
    disk_kv_cache: str | Path | None = None
    disk_kv_memory: int | str | None = None
    elastic: float | None = None
    draft_tokens: int | None = None
    profile: bool = True
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_layers: str | None = None
    rank_timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_memory", parse_bytes(self.kv_memory))
        for name in ("host_kv_memory", "disk_kv_memory"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, parse_bytes(getattr(self, name), name))
        sizes = ("page_size", "max_requests", "step_tokens", "prefill_chunk")
        for name in (*sizes, "tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        if self.rank_timeout is not None:
            if not (is_number(self.rank_timeout) and self.rank_timeout > 0):
                raise ValueError(f"rank_timeout={self.rank_timeout!r} must be above 0 seconds")
            if self.ranks == 1:
                raise ValueError(
                    f"rank_timeout={self.rank_timeout} has no effect on one rank; leave it out, or "
                    f"give tensor_parallel_size or pipeline_parallel_size"
                )
        self._check_layers()
        if not isinstance(self.profile, bool):
            raise ValueError(f"profile={self.profile!r} must be True or False")
        for share in ("reuse_share", "expected_output"):
            check_share(share, getattr(self, share))
        if self.draft_tokens is not None:
            check_whole("draft_tokens", self.draft_tokens, 0)
            if self.draft_tokens > MOST_DRAFTS:
                raise ValueError(
                    f"draft_tokens={self.draft_tokens}: a step verifies at most {MOST_DRAFTS}"
                )
            if self.draft_tokens and self.admission == "overcommit" and self.page_size == 1:
                raise ValueError(
                    f"draft_tokens={self.draft_tokens} has no effect with admission='overcommit' "
                    f"and page_size=1: guesses take no page that one token would not need; leave "
                    f"one of them out"
                )
            if self.ranks > 1:
                raise ValueError(
                    f"draft_tokens={self.draft_tokens} has no effect on {self.ranks} ranks: "
                    f"lossless works on one; leave it out, or tensor_parallel_size and "
                    f"pipeline_parallel_size"
                )
        check_choice("kv_dtype", self.kv_dtype, KV_DTYPES)
        check_choice("weights", self.weights, WEIGHTS)
        if self.weights != "auto" and self.ranks > 1:
            raise ValueError(
                f"weights={self.weights!r} works on one rank only: leave it out, or "
                f"tensor_parallel_size and pipeline_parallel_size"
            )
        check_choice("admission", self.admission, ("reserve", "overcommit"))
        check_choice("preempt", self.preempt, ("swap", "recompute"))
        self._check_offload()
        if self.elastic is not None:
            if not (is_number(self.elastic) and 0 < self.elastic <= 1):
                raise ValueError(f"elastic={self.elastic!r} must be above 0 and at most 1")
            if self.admission != "overcommit":
                raise ValueError(
                    f"elastic={self.elastic} needs admission='overcommit': with 'reserve' nothing "
                    f"runs short"
                )

    def _check_offload(self) -> None:
        folder, size = self.disk_kv_cache, self.disk_kv_memory
        if (folder is None) != (size is None):
            raise ValueError(
                f"disk_kv_cache={folder!r} and disk_kv_memory={size!r} go together: a folder, and "
                f"how much may be in it"
            )
        if folder is not None and not (isinstance(folder, str | Path) and str(folder)):
            raise ValueError(f"disk_kv_cache={folder!r} must be a folder")
        if folder is not None and not self.host_budget:
            raise ValueError(
                f"disk_kv_cache={str(folder)!r} needs host_kv_memory: caches come and go through it"
            )
        if folder is not None and self.ranks > 1:
            raise ValueError(
                f"disk_kv_cache={str(folder)!r} works on one rank only: leave it out, or "
                f"tensor_parallel_size and pipeline_parallel_size"
            )
        for name in ("host_kv_memory", "disk_kv_cache"):
            unused = name == "disk_kv_cache" or self.admission == "reserve"
            if getattr(self, name) is not None and not self.reuse_share and unused:
                raise ValueError(
                    f"{name}={getattr(self, name)!s} has no effect with reuse_share=0: no "
                    f"conversation is held then"
                )

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
                f"pipeline_layers={given!r} is for {len(given.split(','))} stages, and "
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
        """Build from keywords; an unknown one raises with the nearest name.

        ``others``: further names that the caller takes itself.
        """
        known = [each.name for each in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r}; {nearest(name, {*known, *others})}")
        return cls(**options)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision attention weights are worked out in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
