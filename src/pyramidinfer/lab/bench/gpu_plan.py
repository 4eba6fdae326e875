"""The plan of ``make bench-gpu``: cells of work, engines, their order, and the targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from pyramidinfer.config import KV_DTYPES
from pyramidinfer.lab.bench.generate import CACHES

__all__ = ["ATTENTION_BAR", "Cell", "GPUPlan", "Run", "bars", "real_plan", "toy_plan"]

POLICIES = ("full", "pyramidinfer", "pyramid")
DYNAMIC, STATIC, COMPILED = CACHES
#: Decode attention's share of the copy bandwidth measured in the same run.
ATTENTION_BAR = 0.7


class Cell(NamedTuple):
    """``batch`` prompts of ``prompt_len`` tokens, ``output_len`` generated each.

    batch : None for the largest batch that fits in an engine's memory.
    """

    name: str
    shape: str
    batch: int | None
    prompt_len: int
    output_len: int


class Run(NamedTuple):
    """One engine on one cell; ``guess``: estimated seconds on an H200, including warm-up."""

    cell: Cell
    engine: str
    guess: float

    @property
    def is_ours(self) -> bool:
        return self.engine not in CACHES


class Attention(NamedTuple):
    """Decode attention alone, with a shape's heads, over entries stored in ``kv_dtype``."""

    heads: int
    kv_heads: int
    size: int
    batch: int
    context: int
    kv_dtype: str = "auto"


@dataclass(frozen=True)
class GPUPlan:
    """Plain values.  ``runs`` are measured in their order.

    budget_seconds : no run starts whose estimate exceeds this limit;
    memory : bytes for weights and caches, None for ``MEMORY_SHARE`` of the device's;
    reserve : bytes of ``memory`` that are left for an engine's working memory;
    most : maximum number of requests at once, if as many run as fit;  storage : bytes of entries
    that attention cycles through.
    """

    runs: tuple[Run, ...]
    attention: tuple[Attention, ...]
    device: str = "cuda"
    dtype: str = "bfloat16"
    backend: str = "auto"
    keep: float = 0.45
    repeats: int = 2
    budget_seconds: float = 560.0
    memory: int | None = None
    reserve: int = 8 * 2**30
    most: int = 512
    storage: int = 4 * 2**30
    seed: int = 0


def _runs(
    large: str, small: str, cells: dict[str, tuple[int | None, int, int]], guessed: bool
) -> tuple[Run, ...]:
    """Runs with the same weights follow each other; the least useful long runs come last."""
    guesses = {  # cell → (transformers, ours)
        "paper": (30, 20),
        "largest": (45, 60),
        "long": (35, 40),
        "longer": (30, 40),
        "single": (20, 10),
    }
    made = {
        name: Cell(name, large if name in ("paper", "largest") else small, *sizes)
        for name, sizes in cells.items()
    }

    def run(name: str, engine: str, seconds: float | None = None) -> Run:
        guess = guesses[name][engine in POLICIES] if seconds is None else seconds
        return Run(made[name], engine, guess if guessed else 0.0)

    return (
        *(run("paper", engine) for engine in (DYNAMIC, STATIC)),
        run("largest", DYNAMIC),
        *(run(name, engine) for name in ("paper", "largest") for engine in POLICIES),
        *(run(name, DYNAMIC) for name in ("single", "long")),
        *(run(name, policy) for name in ("long", "single", "longer") for policy in POLICIES),
        run("longer", DYNAMIC),
        run("single", STATIC),
        run("largest", STATIC),
        run("paper", COMPILED, 130.0),
    )


def _with_kv_dtypes(*shapes: Attention) -> tuple[Attention, ...]:
    """Each shape with every kv dtype, the model's own first."""
    return tuple(each._replace(kv_dtype=name) for each in shapes for name in KV_DTYPES)


def real_plan(**changes: Any) -> GPUPlan:
    """The paper's models and workload, and longer ones."""
    cells: dict[str, tuple[int | None, int, int]] = {
        "paper": (32, 512, 256),
        "largest": (None, 512, 256),
        "long": (64, 2048, 256),
        "longer": (16, 8192, 256),
        "single": (1, 512, 256),
    }
    attention = _with_kv_dtypes(
        Attention(40, 40, 128, 32, 768),
        Attention(32, 8, 128, 64, 2304),
        Attention(32, 8, 128, 16, 8448),
    )
    return GPUPlan(_runs("llama2-13b", "llama3-8b", cells, True), attention, **changes)


def toy_plan(**changes: Any) -> GPUPlan:
    """The same script in seconds on a CPU; its figures have no meaning."""
    cells: dict[str, tuple[int | None, int, int]] = {
        "paper": (2, 32, 4),
        "largest": (None, 32, 4),
        "long": (2, 64, 4),
        "longer": (1, 96, 4),
        "single": (1, 32, 4),
    }
    usual: dict[str, Any] = {
        "device": "cpu",
        "repeats": 1,
        "memory": 2**21,
        "reserve": 2**19,
        "most": 4,
        "storage": 2**18,
    }
    runs = _runs("toy-mha", "toy-gqa", cells, False)
    attention = _with_kv_dtypes(Attention(4, 4, 16, 2, 40), Attention(4, 2, 16, 2, 72))
    return GPUPlan(runs, attention, **{**usual, **changes})


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every ratio with its target; None if one side was not measured, and for a toy plan no verdict
    on the target."""
    speeds = {
        (row["cell"], row["engine"]): row["output_tokens_per_second"]["median"]
        for row in result["rows"]
        if "output_tokens_per_second" in row
    }
    found: list[dict[str, Any]] = []

    def compare(
        cell: str, ours: str, others: tuple[str, ...], bar: float, paper: float | None = None
    ) -> None:
        there = [other for other in others if (cell, other) in speeds]
        fastest = max(there, key=lambda other: speeds[cell, other], default=None)
        mine, ratio = speeds.get((cell, ours)), None
        if mine is not None and fastest is not None:
            ratio = mine / speeds[cell, fastest]
        found.append(
            {
                "cell": cell,
                "ours": ours,
                "against": fastest,
                "of": list(others),
                "ratio": ratio,
                "bar": bar,
                "paper": paper,
            }
        )

    for policy in POLICIES[1:]:
        compare("paper", policy, (DYNAMIC, STATIC), 4.0, 2.24)
        compare("largest", policy, (DYNAMIC, STATIC), 5.0, 2.8)
        compare("long", policy, ("full",), 1.6)
        compare("single", policy, ("full",), 1.0)
        compare("single", policy, (DYNAMIC, STATIC), 1.0)
        if ("paper", COMPILED) in speeds:  # for the record only: it takes a minute or two to start
            compare("paper", policy, (COMPILED,), 1.0)
    for row in result["attention"]:
        share = row.get("share_of_copy_bandwidth")
        found.append(
            {
                "cell": f"decode attention {row['heads']}/{row['kv_heads']}, {row['batch']} x "
                f"{row['context']}, {row['kv_dtype']}",
                "ours": row.get("backend"),
                "against": "copy",
                "of": ["copy"],
                "ratio": share,
                "bar": ATTENTION_BAR,
                "paper": None,
            }
        )
    for each in found:
        ratio = each["ratio"]
        each["met"] = None if ratio is None or result["is_toy"] else ratio >= each["bar"]
    return found
