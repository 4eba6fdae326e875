"""``pyramidinfer doctor``: the machine's hardware, the kernels in use, and why."""

from __future__ import annotations

import json
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyramidinfer.attention import select_backend
from pyramidinfer.cli.common import human_bytes
from pyramidinfer.config import parse_device
from pyramidinfer.lab.record import machine
from pyramidinfer.native import NoCompilerError, kernels, why_not
from pyramidinfer.native.build import compile_kernels, find_compiler

__all__ = ["run_doctor"]

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def run_doctor(as_json: bool) -> None:
    """Print a report; missing parts are reported, and are no errors."""
    with Console(stderr=True).status("building the CPU kernels, once …"):
        why_not()
    found = _report()
    if as_json:
        print(json.dumps(found))
        return
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # so that long paths are not cut off
    for name, value in _rows(found):
        table.add_row(name, escape(value))
    Console(highlight=False).print(table)


def _report() -> dict[str, Any]:
    here = machine()
    return {
        "versions": {
            "pyramidinfer": _version("pyramidinfer"),
            "python": here["python"],
            "torch": here["torch"],
            "transformers": here["transformers"],
            "triton": _version("triton"),
        },
        "processor": here["processor"],
        "cores": here["cores"],
        "memory_gib": here["memory_gib"],
        "threads": here["threads"],
        "huge_pages": _huge_pages(),
        "compiler": _compiler(),
        "kernels": _kernels(),
        "backend": _backend(),
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiler() -> str | None:
    try:
        return find_compiler()
    except NoCompilerError:
        return None


def _kernels() -> dict[str, Any]:
    """The C++ kernels: their instruction set and path, or why there are none."""
    if reason := why_not():
        return {"instructions": None, "path": None, "linears": [], "reason": reason}
    made = kernels()
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    linears = [str(kind).removeprefix("torch.") for kind in kinds if made.multiplies(kind)]
    return {
        "instructions": made.instructions,
        "path": str(compile_kernels()),
        "linears": linears,
        "reason": None,
    }


def _backend() -> dict[str, str | None]:
    """The backend that ``backend="auto"`` selects on the device of ``device="auto"``, and why."""
    device = parse_device("auto")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the report has the reason
            name = select_backend("auto", device).name
    except ValueError as error:
        return {"name": None, "device": str(device), "reason": str(error)}
    reason = {
        "triton": "there is a GPU",
        "cpu": "there is no GPU, and the C++ kernels work",
        "reference": "there is no GPU, and the C++ kernels cannot be built: attention is slow",
    }.get(name, "")
    return {"name": name, "device": str(device), "reason": reason}


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    each = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory": gpu.total_memory} for gpu in each]


def _huge_pages() -> str | None:
    """``always``, ``madvise`` or ``never``; None if the system does not say."""
    try:
        return HUGE_PAGES.read_text().partition("[")[2].partition("]")[0] or None
    except OSError:
        return None


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    versions, made, backend = found["versions"], found["kernels"], found["backend"]
    rows = [(name, value or "not installed") for name, value in versions.items()]
    rows += [
        ("processor", f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB"),
        ("threads", f"{found['threads']} (OMP_NUM_THREADS sets them)"),
        ("huge pages", found["huge_pages"] or "unknown"),
        ("compiler", found["compiler"] or "none"),
    ]
    if made["reason"]:
        rows.append(("C++ kernels", f"none: {made['reason']}"))
    else:
        rows += [
            ("C++ kernels", f"built for {made['instructions']}: {made['path']}"),
            ("linears", f"{', '.join(made['linears']) or 'none'} in the kernels, others in torch"),
        ]
    for gpu in found["gpus"]:
        rows.append(("GPU", f"{gpu['name']}, {human_bytes(gpu['memory'])}"))
    if not found["gpus"]:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("backend auto", f"{backend['name'] or 'none'}: {backend['reason']}"))
    return rows
