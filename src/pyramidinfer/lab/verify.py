"""What share of the full cache's quality a setting keeps on a model: in two minutes, before users
find out.

Retrieval with the question inside the compressed prompt and after it, chats, text and long
answers, each against the full cache on the same samples.  A share is of what the full cache can
do: where it can do nothing, a check does not count.
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
#: Samples of a check, or of a task, that a round takes; so many are the least.
ROUND = 3
ROUNDS = 8  # at most
#: Far apart, so that the rounds of neighbouring seeds share no samples.
STRIDE = 10_000


def check_floor(name: str, floor: float) -> None:
    """``ValueError`` for a floor that cannot be; ``name`` is the option's."""
    if not 0 < floor <= 1:
        raise ValueError(f"{name} {floor} must be above 0 and at most 1")


def verify(
    machine: Asker,
    subject: Subject,
    policy: Policy,
    plan: VerifyPlan,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """All checks; ``tell`` hears what is being done.

    machine : the full cache's, in the model's own dtype; the policy runs there, too, unless the
    subject names a ``kv_dtype``.

    The first round of samples is timed, and as many more are taken as the time has room for.
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
        if (now - begun) + (now - at) > plan.seconds:  # one more would end too late
            break
    return [check for each in kinds for check in each.checks()]


def judge(checks: Sequence[Check], floor: float) -> tuple[list[Check], list[Check]]:
    """Checks that are surely below the floor, and those of which it cannot be told."""
    counted = [each for each in checks if each.share is not None]
    below = [each for each in counted if each.high < floor]
    return below, [each for each in counted if each.low < floor <= each.high]
