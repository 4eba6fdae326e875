"""``pyramidinfer calibrate``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pyramidinfer.lab.calibrate import Calibration, calibrate
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import Schedule

__all__ = ["run_calibrate"]


def run_calibrate(subject: Subject, target_kl: float, keep: float | None, out: Path, context: int,
                  samples: int, seed: int, workers: int) -> None:  # fmt: skip
    """Measure, solve, write, and say what was found."""
    task = Calibration(subject, target_kl, keep, context, samples=samples, seed=seed)
    schedule = calibrate(task, out, workers)
    console = Console()
    console.print(_table(schedule))
    deep = schedule.start_layer + 1
    going = (
        f"after layer {schedule.start_layer}, {schedule.propagate:.0%} of the prompt goes deeper"
        if deep < schedule.layers
        else "every token goes through every layer"
    )
    console.print(
        f"{going}; {schedule.keep:.1%} of the cache is kept; divergence {schedule.kl:.2g} nats a "
        f"token on passages that were not measured on"
    )
    if keep is None and schedule.kl > target_kl:
        console.print(f"[bold]the target of {target_kl:g} is not met[/bold]: ask for more")
    console.print(f"use it: pyramidinfer generate --policy pyramid --schedule {out}")


def _table(schedule: Schedule) -> Table:
    table = Table(title="divergence when one layer alone is held to a share, and its budget")
    table.add_column("layer", justify="right")
    for share in schedule.shares[:-1]:
        table.add_column(f"{share:.0%}", justify="right")
    table.add_column("budget", justify="right", style="bold")
    for layer, budget in enumerate(schedule.budgets(schedule.keep)):
        losses = [f"{loss:.1g}" for loss in schedule.loss[layer][:-1]]
        table.add_row(str(layer), *losses, f"{budget:.1%}")
    return table
