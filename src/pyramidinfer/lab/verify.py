"""The share of the full cache's quality that a setting retains on a model, in about two minutes.

The checks are retrieval with the question inside the compressed prompt and after it, chats, text
and long answers, each against the full cache on the same samples.  Shares refer to the results of
the full cache; a check on which the full cache fails does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pyramidinfer.lab.asking import Asker
from pyramidinfer.lab.checks import LONG, Bench, Check, Kind, LongAnswers, Text, Turns, jeffreys
from pyramidinfer.lab.plans import VerifyPlan
from pyramidinfer.lab.retrieval import Retrieval
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import Policy

__all__ = ["FLOOR", "ROUND", "Check", "VerifyPlan", "check_floor", "jeffreys", "judge", "verify"]

FLOOR = 0.8
#: Samples per check, or per task, in a round, which is the minimum.
ROUND = 3
ROUNDS = 8  # at most
#: Far apart, so that the rounds of neighbouring seeds share no samples.
STRIDE = 10_000


def check_floor(name: str, floor: float) -> None:
    """``ValueError`` for an invalid floor; ``name`` is the option's name."""
    if not 0 < floor <= 1:
        raise ValueError(f"{name} {floor} must be above 0 and at most 1")


def verify(
    machine: Asker,
    subject: Subject,
    policy: Policy,
    plan: VerifyPlan,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Run all checks; ``tell`` receives progress messages.

    machine : the engine of the full cache, in the model's own dtype; the policy also runs there,
    unless the subject names a ``kv_dtype`` or ``weights``.

    The first round of samples is timed, and as many more rounds run as fit into the time.
    """
    plan.check()
    if plan.length > machine.llm.engine.runner.max_positions - LONG:
        raise ValueError(
            f"--length {plan.length}: the model has {machine.llm.engine.runner.max_positions} "
            f"positions, and {LONG} are generated"
        )
    bench = Bench(machine, subject, policy, plan.length)
    kinds: list[Kind] = [Retrieval(bench), Turns(bench), Text(bench), LongAnswers(bench)]
    begun = time.monotonic()
    for number in range(ROUNDS):
        at = time.monotonic()
        for each in kinds:
            tell(f"{each.telling}, samples {number * ROUND + 1} to {(number + 1) * ROUND}")
            each.more(plan.seed * STRIDE + number, ROUND)
        now = time.monotonic()
        if (now - begun) + (now - at) > plan.seconds:  # another round would end too late
            break
    return [check for each in kinds for check in each.checks()]


def judge(checks: Sequence[Check], floor: float) -> tuple[list[Check], list[Check]]:
    """Checks that are certainly below the floor, and checks that are undecided."""
    counted = [each for each in checks if each.share is not None]
    below = [each for each in counted if each.high < floor]
    return below, [each for each in counted if each.low < floor <= each.high]
