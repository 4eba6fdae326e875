"""The engines that ``make bench-peers`` compares, and their options."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyramidinfer.config import nearest

__all__ = ["ENGINES", "Engine", "Workload", "chosen_engines", "parse_workloads"]

KEEP = 0.45
#: Placeholder in an engine's options for a value of one of the two tables below.
BY_WORKLOAD = "by workload"
#: Memory for a full cache of a workload and its prompts in progress.
KV_MEMORY = {"A": "640MiB", "B": "1152MiB"}
#: Entries per request after OpenVINO's eviction, by workload (multiples of its block of 32).
EVICTED = {"A": 352, "B": 1952}


@dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` prompts of ``prompt_len`` random tokens, ``new`` generated each."""

    requests: int
    prompt_len: int
    new: int


WORKLOADS = {"A": Workload(16, 512, 64), "B": Workload(4, 4096, 64)}


@dataclass(frozen=True)
class Engine:
    """environment: folder under the peers' folder, None for ours;  driver: script in the drivers'
    folder;  options: the driver's options."""

    name: str
    environment: str | None
    driver: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    note: str = ""

    @property
    def is_ours(self) -> bool:
        return self.environment is None

    def python(self, environments: Path) -> Path:
        if self.environment is None:
            return Path(sys.executable)
        return environments / self.environment / "bin" / "python"

    def options_for(self, name: str, workload: Workload) -> dict[str, Any]:
        """Options with the values that depend on the workload."""
        usual = max(128, round(KEEP * (workload.prompt_len + workload.new) / 32) * 32)
        filled = {"entries": EVICTED.get(name, usual), "kv_memory": KV_MEMORY.get(name, "1280MiB")}
        return {
            key: filled[key] if value == BY_WORKLOAD else value
            for key, value in self.options.items()
        }


def _ours(name: str, policy: str, **options: Any) -> Engine:
    return Engine(
        name, None, "drive_pyramidinfer.py", {"policy": policy, "kv_memory": BY_WORKLOAD, **options}
    )


def _press(name: str, press: str) -> Engine:
    options = {"press": press, "compression_ratio": round(1 - KEEP, 4)}
    return Engine(name, "kvpress", "drive_kvpress.py", options)


ENGINES: tuple[Engine, ...] = (
    _ours(f"ours, pyramidinfer {KEEP:g}", "pyramidinfer", keep=KEEP),
    _ours(f"ours, pyramid {KEEP:g}", "pyramid", keep=KEEP),
    _ours("ours, full", "full"),
    Engine("transformers", "transformers", "drive_transformers.py"),
    Engine("transformers, fp32", "transformers", "drive_transformers.py", dtype="float32"),
    Engine(
        "transformers, continuous", "transformers", "drive_transformers.py", {"mode": "continuous"}
    ),
    Engine("OpenVINO", "openvino", "drive_openvino.py"),
    Engine("OpenVINO, eviction", "openvino", "drive_openvino.py", {"entries": BY_WORKLOAD}),
    Engine(
        "OpenVINO, 8-bit KV",
        "openvino",
        "drive_openvino.py",
        {"cache": "u8"},
        note="its default cache",
    ),
    Engine("llama.cpp", "llamacpp", "drive_llamacpp.py", dtype="float16"),
    Engine("vLLM (CPU)", "vllm", "drive_vllm.py", note="a rebuild by a third party"),
    _press(f"kvpress, SnapKV {KEEP:g}", "SnapKVPress"),
    _press(f"kvpress, PyramidKV {KEEP:g}", "PyramidKVPress"),
    _press(f"kvpress, StreamingLLM {KEEP:g}", "StreamingLLMPress"),
)


def chosen_engines(names: Iterable[str], engines: Iterable[Engine] = ENGINES) -> list[Engine]:
    """Engines by name or by the beginning of a name (``ours`` selects all of ours); all without a
    name."""
    engines = list(engines)
    wanted = [name.strip().lower() for name in names if name.strip()]
    for name in wanted:
        if not any(each.name.lower().startswith(name) for each in engines):
            raise ValueError(
                f"--only {name!r} is no engine; {nearest(name, [each.name for each in engines])}"
            )
    return [
        each
        for each in engines
        if not wanted or any(each.name.lower().startswith(name) for name in wanted)
    ]


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
