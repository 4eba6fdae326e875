"""``bench footprint``: memory of a serving process in addition to ``kv_memory``, and the size of
installed packages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import pyramidinfer
from pyramidinfer.lab.bench.plans import FootprintPlan
from pyramidinfer.lab.bench.served import Served, serving
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.record import write_result
from pyramidinfer.options import parse_bytes

__all__ = ["installed_bytes", "memory_of", "run_footprint"]

#: Text of prompts; each prompt begins with a different number, so that none reuses a cache.
TEXT = "The old baker walked to the market . "
#: Share of pages in use from which the pool counts as filled.
FILLED = 0.9


def run_footprint(plan: FootprintPlan, out: Path) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    cases = [(weights, memory) for weights in plan.weights for memory in plan.kv_memory]
    rows = []
    with progress("footprint", len(cases)) as done:
        for weights, memory in cases:
            rows.append(_measure(plan, weights, memory))
            done(f"{weights} {memory}")
    sizes = installed_bytes(plan.extras)
    result = {"rows": rows, "installed": sizes, "installed_bytes": sum(sizes.values())}
    write_result(out, plan.configuration, result)
    return result


def _measure(plan: FootprintPlan, weights: str, memory: str) -> dict[str, Any]:
    """A server of full caches that are all held, until its pool is full."""
    words = [*([plan.model] if plan.model else []), "--port", "0", "--no-page"]
    words += ["--policy", "full", "--reuse-share", "1", "--kv-memory", memory]
    words += ["--weights", weights, "--dtype", plan.dtype]
    with serving({"it": words}, plan.threads) as servers:
        server = servers["it"]
        ready = memory_of(server.pid)
        share = _fill(server, plan.prompt_len)
        full = memory_of(server.pid)
        weight_bytes = server.model()["weight_bytes"]
    budget = parse_bytes(memory)
    return {
        "weights": weights,
        "kv_memory": budget,
        "weight_bytes": weight_bytes,
        "pages_used": share,
        "resident_ready": ready["VmRSS"],
        "resident_full": full["VmRSS"],
        "anonymous_full": full["RssAnon"],
        "peak": full["VmHWM"],
        "beside": full["VmRSS"] - weight_bytes - budget,
        "peak_beside": full["VmHWM"] - weight_bytes - budget,
    }


def _fill(server: Served, length: int) -> float:
    """Send prompts until the pool is full; returns the share of its pages in use."""
    count = server.post("/tokenize", {"prompt": TEXT}).json()["count"]
    text, share, number = TEXT * max(1, length // count), 0.0, 0
    while share < FILLED:
        body = {"prompt": f"{number} . {text}", "max_tokens": 1, "ignore_eos": True}
        answer = server.post("/v1/completions", body)
        if answer.status_code != 200:
            raise ValueError(f"the server refuses a prompt of {length} tokens: {answer.text:.200}")
        now = server.idle()
        before, number = share, number + 1
        share = now["pyramidinfer:pool_pages_in_use"] / now["pyramidinfer:pool_pages"]
        if share <= before:  # new caches evict old ones
            break
    return share


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by the kernel's names: ``VmRSS`` resident, ``RssAnon`` the part of it not backed by
    files, ``VmHWM`` the peak.  ``OSError`` on systems without them (Linux has them)."""
    found = re.findall(
        r"^(VmRSS|RssAnon|VmHWM):\s+(\d+) kB$",
        Path(f"/proc/{pid}/status").read_text(),
        flags=re.MULTILINE,
    )
    return {name: int(size) * 1024 for name, size in found}


def installed_bytes(extras: tuple[str, ...]) -> dict[str, int]:
    """Bytes of each installed package that ``pyramidinfer[extras]`` needs, the largest first: the
    size that an image adds to its base."""
    sizes = {each.name: _size(each) for each in _needed("pyramidinfer", extras)}
    own = Path(pyramidinfer.__file__).parent
    sizes["pyramidinfer"] = sum(each.stat().st_size for each in own.rglob("*") if each.is_file())
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def _needed(name: str, extras: tuple[str, ...]) -> Iterator[Distribution]:
    """The direct and indirect requirements of a package; each once."""
    seen: dict[str, set[str]] = {}
    queue = [(name, set(extras))]
    while queue:
        name, wanted = queue.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in seen and wanted <= seen[name]:
            continue
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        if name not in seen:
            yield found
        seen.setdefault(name, set()).update(wanted)
        for line in found.requires or ():
            asked = Requirement(line)
            cases = [{"extra": extra} for extra in (*wanted, "")]
            if asked.marker is None or any(asked.marker.evaluate(case) for case in cases):
                queue.append((asked.name, set(asked.extras)))


def _size(package: Distribution) -> int:
    paths = [Path(str(package.locate_file(each))) for each in package.files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())
