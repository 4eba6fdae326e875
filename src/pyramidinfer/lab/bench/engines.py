"""The engines that ``make bench-peers`` compares, and their options.

Every engine has its bits of weights and of KV cache in its name, such as ``8/16``.  Only engines of
the same bits are compared with each other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyramidinfer.config import nearest

__all__ = [
    "ENGINES",
    "KEEP",
    "WORKLOADS",
    "Engine",
    "Workload",
    "chosen_engines",
    "parse_bits",
    "parse_workloads",
]

KEEP = 0.45
#: Placeholder in an engine's options for a value that depends on the workload.
BY_WORKLOAD = "by workload"
#: Entries per request after OpenVINO's eviction, by workload (multiples of its block of 32).
EVICTED = {"A": 352, "B": 1952}


@dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` prompts of ``prompt_len`` tokens, each with ``new`` generated tokens."""

    requests: int
    prompt_len: int
    new: int


WORKLOADS = {"A": Workload(16, 512, 64), "B": Workload(4, 4096, 64), "C": Workload(1, 512, 256)}


@dataclass(frozen=True)
class Engine:
    """environment: folder under the peers' folder, None for ours;  driver: script in the drivers'
    folder;  options: the driver's options;  weights, cache: bits;  on: names of the ``WORKLOADS``
    that it runs on (empty: all);  converts: whether the driver converts the model;
    whole: whether every entry of the cache is kept."""

    name: str
    environment: str | None
    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    weights: int = 16
    cache: int = 16
    on: str = ""
    converts: bool = False
    whole: bool = True
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.environment is None

    @property
    def bits(self) -> str:
        return f"{self.weights}/{self.cache}"

    def python(self, environments: Path) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return environments / self.environment / "bin" / "python"

    def runs_on(self, name: str) -> bool:
        """Whether it is measured on a workload; those outside ``WORKLOADS`` are for all."""
        return not self.on or name in self.on or name not in WORKLOADS

    def options_for(self, name: str, workload: Workload, kv_memory: str) -> dict[str, Any]:
        """Options with the values that depend on the workload.  kv_memory: enough for a full cache
        and its prompts in progress."""
        usual = max(128, round(KEEP * (workload.prompt_len + workload.new) / 32) * 32)
        filled = {"entries": EVICTED.get(name, usual), "kv_memory": kv_memory}
        return {
            key: filled[key] if value == BY_WORKLOAD else value
            for key, value in self.options.items()
        }


def _named(
    name: str,
    weights: int,
    cache: int,
    environment: str | None,
    options: dict[str, Any] | None = None,
    **more: Any,
) -> Engine:
    """An engine with its bits in its name; its driver is named like its environment."""
    driver = f"drive_{environment or 'pyramidinfer'}.py"
    title = f"{name} {weights}/{cache}"
    return replace(
        Engine(title, environment, driver, options or {}), weights=weights, cache=cache, **more
    )


def _ours(weights: int, cache: int, policy: str, on: str = "", **options: Any) -> Engine:
    """``full``, or another policy with ``KEEP``."""
    stored = {16: {}, 8: {"weights": "int8"}, 4: {"weights": "int4"}}[weights]
    coded = {16: {}, 8: {"kv_dtype": "int8"}}[cache]
    budget = {} if policy == "full" else {"keep": KEEP}
    title = "ours, full" if policy == "full" else f"ours, {policy} {KEEP:g}"
    if "gguf" in options:
        title += f", {options['gguf']} file"
        stored = {"weights": "gguf"}
    given = {"policy": policy, "kv_memory": BY_WORKLOAD, **budget, **stored, **coded, **options}
    whole = policy == "full"
    return _named(title, weights, cache, None, given, on=on, whole=whole)


def _transformers() -> Engine:
    return _named("transformers", 16, 16, "transformers")


def _vllm() -> Engine:
    note = "a rebuild by a third party"
    return _named("vLLM (CPU)", 16, 16, "vllm", note=note)


def _openvino(weights: int, cache: int, evict: bool = False) -> Engine:
    """16-bit weights are stored in float16; computation is in bfloat16, as in all other engines."""
    options: dict[str, Any] = {
        "weights": {16: "fp16", 8: "int8", 4: "int4"}[weights],
        "cache": {16: "bf16", 8: "u8"}[cache],
    }
    if evict:
        options["entries"] = BY_WORKLOAD
    return _named(
        "OpenVINO, eviction" if evict else "OpenVINO",
        weights,
        cache,
        "openvino",
        options,
        converts=True,
        whole=not evict,
        on="AB" if evict else "",
    )


def _llamacpp(kind: str, weights: int, cache: int, on: str = "") -> Engine:
    options = {"type": kind, "cache": {16: "f16", 8: "q8_0"}[cache]}
    return _named(
        f"llama.cpp {kind}",
        weights,
        cache,
        "llamacpp",
        options,
        dtype="float16",
        on=on,
        converts=True,
    )


def _press(name: str, press: str) -> Engine:
    options = {"press": press, "compression_ratio": round(1 - KEEP, 4)}
    return _named(f"kvpress, {name} {KEEP:g}", 16, 16, "kvpress", options, whole=False)


#: In the order of measurement; engines that are compared are next to each other.  Only for a single
#: request: a 16-bit cache with quantized weights (of the others, only llama.cpp has this), and
#: llama.cpp's less usual types.  llama.cpp takes minutes for B, so only its fastest usual type
#: runs there.
ENGINES: tuple[Engine, ...] = (
    _transformers(),
    _ours(16, 16, "full"),
    _ours(16, 16, "pyramid"),
    _ours(16, 16, "pyramidinfer"),
    _openvino(16, 16),
    _openvino(16, 16, evict=True),
    _llamacpp("F16", 16, 16, on="C"),
    _vllm(),
    _ours(16, 8, "full"),
    _ours(16, 8, "pyramid"),
    _openvino(16, 8),
    _openvino(16, 8, evict=True),
    _ours(8, 8, "full"),
    _ours(8, 8, "pyramid"),
    _openvino(8, 8),
    _openvino(8, 8, evict=True),
    _llamacpp("Q8_0", 8, 8),
    _ours(8, 16, "full", on="C"),
    _ours(8, 16, "pyramid", on="C"),
    _llamacpp("Q8_0", 8, 16, on="C"),
    _ours(4, 8, "full"),
    _ours(4, 8, "pyramid"),
    _openvino(4, 8),
    _openvino(4, 8, evict=True),
    _llamacpp("Q4_K_M", 4, 8, on="AC"),
    _llamacpp("Q4_0", 4, 8, on="C"),
    _ours(4, 16, "full", on="C"),
    _ours(4, 16, "pyramid", on="C"),
    _ours(4, 16, "full", on="C", gguf="Q4_K_M"),
    _llamacpp("Q4_K_M", 4, 16, on="C"),
    _llamacpp("Q4_0", 4, 16, on="C"),
    _press("SnapKV", "SnapKVPress"),
)


def chosen_engines(
    names: Iterable[str], bits: Iterable[str] = (), engines: Iterable[Engine] = ENGINES
) -> list[Engine]:
    """Engines whose name begins with one of ``names`` (``ours`` selects all of ours) and whose bits
    are among ``bits`` (``8/16``: weights/cache).  An empty list selects all."""
    engines, bits = list(engines), list(bits)
    wanted = [name.strip().lower() for name in names if name.strip()]
    for name in wanted:
        if not any(each.name.lower().startswith(name) for each in engines):
            raise ValueError(
                f"--only {name!r} is no engine; {nearest(name, [each.name for each in engines])}"
            )
    found = [
        each
        for each in engines
        if not wanted or any(each.name.lower().startswith(name) for name in wanted)
        if not bits or each.bits in bits
    ]
    if not found:
        raise ValueError(f"--bits {','.join(bits)}: no engine of --only has these bits")
    return found


def parse_bits(text: str) -> list[str]:
    """``"8/8,4/16"`` (bits of weights/cache) → list; ``ValueError`` if no engine has them."""
    known = list(dict.fromkeys(each.bits for each in ENGINES))
    found = [part for part in text.replace(" ", "").split(",") if part]
    for part in found:
        if part not in known:
            raise ValueError(f"--bits {part!r}: give weights/cache, of {', '.join(known)}")
    return found


def parse_workloads(text: str) -> dict[str, Workload]:
    """``"A,B"`` or ``"T=2x16+4"`` (requests x prompt + new) → workloads by name."""
    found = {}
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\w+)=(\d+)x(\d+)\+(\d+)", part)
        if match:
            made = Workload(int(match[2]), int(match[3]), int(match[4]))
            if made.requests < 1 or made.prompt_len < 1 or made.new < 2:
                raise ValueError(f"--workloads {part!r}: give at least 1 request, 1 token, 2 new")
            found[match[1]] = made
        elif part in WORKLOADS:
            found[part] = WORKLOADS[part]
        else:
            raise ValueError(
                f"--workloads {part!r}: name one of {', '.join(WORKLOADS)}, or write "
                f"NAME=REQUESTSxPROMPT+NEW"
            )
    return found
