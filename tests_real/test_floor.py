"""What is left of SmolLM2's answers under compression does not fall below what was measured.

One needle in 1,000 tokens of English, asked for inside the prompt or after the text's cache was
compressed.  The full cache finds every one.
"""

from __future__ import annotations

import pytest

from pyramidinfer.lab.asking import Asker, asker
from pyramidinfer.lab.ruler.grid import answer_samples, task_samples
from pyramidinfer.lab.ruler.sample import Sample
from pyramidinfer.lab.samples import Subject

SUBJECT = Subject("smollm2")
TASKS = ("niah_single_1", "niah_single_2")
SAMPLES, LENGTH, SEED = 5, 1000, 0
#: The full cache's score; measured: 1.
WHOLE = 0.8
#: Floors under scores; measured: 1 in every cell.
FLOORS = {
    ("pyramid:keep=.25", "inside"): 0.8,
    ("pyramid:keep=.25", "after"): 0.8,
    ("duo:keep=.3", "after"): 0.8,
}
#: Every setting keeps so much of the full cache's bytes at most.
KEPT = 0.35


@pytest.fixture(scope="module")
def machine() -> Asker:
    return asker(SUBJECT)


@pytest.fixture(scope="module", params=TASKS)
def samples(request: pytest.FixtureRequest, machine: Asker) -> list[Sample]:
    return task_samples(machine, SUBJECT, request.param, SAMPLES, LENGTH, SEED)


def test_the_full_cache_finds_the_needle(machine: Asker, samples: list[Sample]) -> None:
    found = answer_samples(machine, samples, "inside", machine.policy("full", None))
    assert sum(found.scores) / SAMPLES >= WHOLE, found.texts
    assert found.kv_share == pytest.approx(1.0)


@pytest.mark.parametrize(("spec", "protocol"), FLOORS)
def test_scores_stay_above_their_floor(
    machine: Asker, samples: list[Sample], spec: str, protocol: str
) -> None:
    found = answer_samples(machine, samples, protocol, machine.policy(spec, None))
    assert sum(found.scores) / SAMPLES >= FLOORS[spec, protocol], found.texts
    assert found.kv_share <= KEPT and found.prefill_share < 1
