"""``pyramidinfer verify``, and the same before a server opens its port."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pyramidinfer.lab.asking import asker
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import Subject, forget
from pyramidinfer.lab.verify import ROUND, Check, Plan, check_floor, judge, verify
from pyramidinfer.models.loading import quiet_transformers
from pyramidinfer.policies import Policy

__all__ = ["run_verify"]


def run_verify(
    where: Subject,
    policy: Policy,
    floor: float,
    plan: Plan,
    out: Path | None = None,
    console: Console | None = None,
) -> bool:
    """Run the checks and print them; False where one is surely below the floor."""
    console = console or Console()
    check_floor("--floor", floor)
    plan.check()
    quiet_transformers()
    begun = time.monotonic()
    try:
        machine = asker(where)
        with console.status("loading") as status:
            checks = verify(machine, where, policy, plan, status.update)
    finally:
        asker.cache_clear()
        forget()
    took = time.monotonic() - begun
    console.print(_table(where.model, policy, checks))
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


def _configuration(where: Subject, policy: Policy, floor: float, plan: Plan) -> dict[str, Any]:
    return {"subject": asdict(where), "policy": repr(policy), "floor": floor, **asdict(plan)}


def _table(model: str, policy: Policy, checks: Sequence[Check]) -> Table:
    keep = getattr(policy, "keep", None)
    told = policy.name if keep is None else f"{policy.name}, keep {keep:g}"
    table = Table(title=f"{model}: {told} against the full cache")
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


def _duration(checks: Sequence[Check], plan: Plan, took: float) -> str:
    """How long it took, and why it was longer than wanted."""
    fewest = min((each.samples for each in checks if each.share is not None), default=ROUND)
    if took <= plan.seconds or fewest > ROUND:
        return f"({took:.0f} s)"
    return f"({took:.0f} s: {ROUND} samples a check, the least there are, take so long)"


def _verdict(
    checks: Sequence[Check],
    below: Sequence[Check],
    unsure: Sequence[Check],
    floor: float,
    took: str,
) -> str:
    if all(each.share is None for each in checks):
        return f"nothing could be told: the full cache itself can do none of this {took}"
    if below:
        names = "; ".join(each.name for each in below)
        return f"[bold]does not hold[/bold]: below {floor:g} of the full cache: {names} {took}"
    if unsure:
        names = "; ".join(each.name for each in unsure)
        return f"not enough samples to tell whether {floor:g} is kept: {names} {took}"
    return f"[bold]holds[/bold]: every check keeps {floor:g} of the full cache {took}"
