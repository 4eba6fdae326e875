"""``pyramidinfer verify``, and the same before a server opens its port."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyramidinfer.config import KV_DTYPES, WEIGHTS, check_choice, parse_bytes
from pyramidinfer.lab.asking import asker
from pyramidinfer.lab.plans import VerifyPlan
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.rows import AUTO
from pyramidinfer.lab.samples import Subject, forget
from pyramidinfer.lab.verify import ROUND, Check, check_floor, judge, verify
from pyramidinfer.models.loading import quiet_transformers
from pyramidinfer.policies import Policy

__all__ = ["run_verify"]


def run_verify(
    where: Subject,
    policy: Policy,
    floor: float,
    plan: VerifyPlan,
    out: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Run the checks and print them; False if one is significantly below the floor.

    A ``kv_dtype`` or ``weights`` needs an engine in addition to that of the full cache; each gets
    half of the memory.
    """
    console = console or Console()
    check_floor("--floor", floor)
    plan.check()
    check_choice("--kv-dtype", where.kv_dtype, KV_DTYPES)
    check_choice("--weights", where.weights, WEIGHTS)
    quiet_transformers()
    begun = time.monotonic()
    try:
        ours = where if where == where.plain else replace(where, kv_memory=_half(where))
        machine = asker(ours.plain)
        with console.status("loading") as status:
            checks = verify(machine, ours, policy, plan, status.update)
    finally:
        asker.cache_clear()
        forget()
    took = time.monotonic() - begun
    console.print(_table(where, policy, checks))
    below, unsure = judge(checks, floor)
    console.print(_verdict(checks, below, unsure, floor, _duration(checks, plan, took)))
    if out is not None:
        write_result(
            out,
            _configuration(where, policy, floor, plan),
            {
                "checks": [asdict(each) for each in checks],
                "seconds": took,
                "below": [each.name for each in below],
                "unsure": [each.name for each in unsure],
            },
        )
    return not below


def _configuration(
    where: Subject, policy: Policy, floor: float, plan: VerifyPlan
) -> dict[str, Any]:
    return {"subject": asdict(where), "policy": repr(policy), "floor": floor, **asdict(plan)}


def _half(where: Subject) -> str:
    return str(parse_bytes(where.kv_memory, "--kv-memory") // 2)


def _table(where: Subject, policy: Policy, checks: Sequence[Check]) -> Table:
    keep = getattr(policy, "keep", None)
    told = policy.name if keep is None else f"{policy.name}, keep {keep:g}"
    told += "" if where.kv_dtype == AUTO else f", {where.kv_dtype}"
    told += "" if where.weights == AUTO else f", weights {where.weights}"
    table = Table(title=f"{where.model}: {told} against the full cache")
    table.add_column("check", overflow="fold")
    table.add_column("full cache", overflow="fold")
    table.add_column("this", overflow="fold")
    for name in ("KV kept", "computed", "share kept [95 %]", "samples"):
        table.add_column(name, justify="right")
    for each in checks:
        share = (
            "the full cache cannot do it here"
            if each.share is None
            else (f"{each.share:.2f} [{each.low:.2f}, {each.high:.2f}]")
        )
        kept, computed = (
            "–" if found is None else f"{found:.0%}"
            for found in (each.kv_share, each.computed_share)
        )
        table.add_row(
            each.name, each.full, each.mine, kept, computed, share, str(each.samples or "–")
        )
    return table


def _duration(checks: Sequence[Check], plan: VerifyPlan, took: float) -> str:
    """Time of the run, and the reason if it took longer than asked."""
    fewest = min((each.samples for each in checks if each.share is not None), default=ROUND)
    if took <= plan.seconds or fewest > ROUND:
        return f"({took:.0f} s)"
    return f"({took:.0f} s: the smallest number of samples, {ROUND} per check, takes this long)"


def _verdict(
    checks: Sequence[Check],
    below: Sequence[Check],
    unsure: Sequence[Check],
    floor: float,
    took: str,
) -> str:
    if all(each.share is None for each in checks):
        return f"no result: the model fails every check even with the full cache {took}"
    if below:
        names = "; ".join(each.name for each in below)
        return f"[bold]does not hold[/bold]: below {floor:g} of the full cache: {names} {took}"
    if unsure:
        names = "; ".join(each.name for each in unsure)
        return f"not enough samples to tell whether {floor:g} is kept: {names} {took}"
    return f"[bold]holds[/bold]: every check keeps {floor:g} of the full cache {took}"
