"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), made without a download.

Needles in haystacks, variable tracing and counting words follow RULER's definitions (NVIDIA/RULER).
Its two question answering tasks use SQuAD and HotpotQA; ours have the same form with invented
facts, and their own names (``qa_facts_1``, ``qa_facts_2``).
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable

from pyramidinfer.lab.ruler.aggregate import cwe, fwe, vt
from pyramidinfer.lab.ruler.facts import qa
from pyramidinfer.lab.ruler.haystack import Haystack
from pyramidinfer.lab.ruler.needles import FORMS, niah
from pyramidinfer.lab.ruler.sample import Recipe, Sample, TooShort, fill

__all__ = ["TASKS", "Haystack", "Sample", "check_task", "make_samples"]

#: From task, random number generator, length and haystack to a sample of any size.
Maker = Callable[[str, random.Random, int, Haystack], Recipe]
MAKERS: dict[str, Maker] = {
    **dict.fromkeys(FORMS, niah),
    "vt": vt,
    "cwe": cwe,
    "fwe": fwe,
    "qa_facts_1": qa,
    "qa_facts_2": qa,
}
TASKS: tuple[str, ...] = tuple(MAKERS)


def check_task(name: str) -> None:
    """``ValueError`` with the nearest name for an unknown task."""
    if name in MAKERS:
        return
    near = difflib.get_close_matches(name, TASKS, 1, 0.4)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown task {name!r}: {meant}Tasks are {', '.join(TASKS)}")


def make_samples(
    task: str,
    count: int,
    length: int,
    seed: int,
    count_tokens: Callable[[str], int],
    text: Haystack,
) -> list[Sample]:
    """Samples of a task, each as long as fits into ``length`` tokens, including the answer.

    The i-th sample depends only on task, length, seed and text, not on ``count``.
    """
    check_task(task)
    if count < 1:
        raise ValueError(f"{count} samples requested: choose 1 or more --samples")
    found = []
    for i in range(count):
        rng = random.Random(f"{task} {length} {seed} {i}")
        try:
            found.append(fill(MAKERS[task](task, rng, length, text), length, count_tokens))
        except TooShort as error:
            raise ValueError(
                f"task {task} needs at least {error.needed} tokens; got {length}: choose "
                "longer --lengths"
            ) from None
    return found
