"""RULER's thirteen tasks (Hsieh et al. 2024, arXiv 2404.06654), made without a download.

Needles in haystacks, variable tracing and counting words are RULER's own, after its definitions
(NVIDIA/RULER).  Its two tasks of question answering use SQuAD and HotpotQA; ours are of the same
form on invented facts, and have names of their own (``qa_facts_1``, ``qa_facts_2``).
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

#: Task, generator of random numbers, length and haystack to a sample of any size.
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
    """``ValueError`` for a task that there is not, with the name that is nearest to it."""
    if name in MAKERS:
        return
    near = difflib.get_close_matches(name, TASKS, 1, 0.4)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"there is no task {name!r}: {meant}Tasks are {', '.join(TASKS)}")


def make_samples(
    task: str,
    count: int,
    length: int,
    seed: int,
    count_tokens: Callable[[str], int],
    text: Haystack,
) -> list[Sample]:
    """Samples of a task, each as long as goes into ``length`` tokens, those of the answer included.

    The i-th is the same for the same task, length, seed and text, however many are made.
    """
    check_task(task)
    if count < 1:
        raise ValueError(f"{count} samples are wanted: choose 1 or more --samples")
    found = []
    for i in range(count):
        rng = random.Random(f"{task} {length} {seed} {i}")
        try:
            found.append(fill(MAKERS[task](task, rng, length, text), length, count_tokens))
        except TooShort as error:
            raise ValueError(
                f"task {task} needs at least {error.needed} tokens; {length} are given: choose "
                "longer --lengths"
            ) from None
    return found
