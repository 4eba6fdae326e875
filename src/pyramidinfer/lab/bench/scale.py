"""``bench scale``: a model over several ranks on this machine, held against the formula."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pyramidinfer.config import check_whole
from pyramidinfer.engine import LLM
from pyramidinfer.lab.bench.scale_plan import (
    Work,
    cache_bytes,
    simulate,
    weight_bytes,
    wire_bytes,
)
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import SHIPPED
from pyramidinfer.lab.shapes import empty_shape
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.catalog import find_model
from pyramidinfer.models.loading import empty_model, shipped_model
from pyramidinfer.policies import Policy, make_policy
from pyramidinfer.types import SamplingParams

__all__ = ["ScalePlan", "run_scale"]

#: Policies by the words of a table; others that choose while decoding cannot be simulated.
POLICIES: dict[str, tuple[str, float | None]] = {
    "full": ("full", None),
    "snapkv, keep 0.3": ("snapkv", 0.3),
    "pyramid, keep 0.3": ("pyramid", 0.3),
}
#: What nobody has at hand: a known shape, ranks, a prompt, an answer.
PAPER = ("llama3-70b", (1, 8, 64), Work(8192, 128))


@dataclass(frozen=True)
class ScalePlan:
    """One request on so many ranks, each a process.

    model : folder, hub id or fetched model; None is the shipped one;  ranks : sizes to run, the
    first of them 1.
    """

    model: str | None = None
    ranks: tuple[int, ...] = (1, 2, 4)
    prompt: int = 512
    new: int = 16
    kv_memory: str = "64MiB"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if not self.ranks or self.ranks[0] != 1:
            raise ValueError(f"--ranks {self.ranks}: the first must be 1, which others are held to")
        check_whole("--prompt-len", self.prompt, 1)
        check_whole("--output-len", self.new, 2)

    @property
    def work(self) -> Work:
        return Work(self.prompt, self.new)

    @property
    def name(self) -> str:
        return find_model(self.model) if self.model else shipped_model()


def run_scale(plan: ScalePlan, out: Path) -> dict[str, Any]:
    """Run, simulate, write ``out``, and return its result."""
    rows: list[dict[str, Any]] = []
    expected: dict[str, list[int]] = {}
    with progress("ranks", len(plan.ranks) * len(POLICIES)) as done:
        for ranks in plan.ranks:
            options: dict[str, Any] = {} if ranks == 1 else {"tensor_parallel_size": ranks}
            llm = LLM(plan.name, "pyramid", kv_memory=plan.kv_memory, dtype=plan.dtype, **options)
            try:
                for words, (name, keep) in POLICIES.items():
                    row = _measure(plan, llm, make_policy(name, keep), ranks)
                    tokens = row.pop("tokens")
                    same = expected.setdefault(words, tokens) == tokens
                    rows.append({"policy": words, "ranks": ranks, "same_tokens": same, **row})
                    done(f"{ranks} ranks, {words}")
            finally:
                llm.close()
    result = {"rows": rows, "paper": _on_paper()}
    write_result(out, {**asdict(plan), "model": plan.model or SHIPPED}, result)
    return result


def _measure(plan: ScalePlan, llm: LLM, policy: Policy, ranks: int) -> dict[str, Any]:
    """One request: what it sent, what it held at its end, and what the formula says of that."""
    engine = llm.engine
    before = Counter(engine.runner.ranks.sent)
    size = engine.runner.vocab_size
    prompt = [3 + 7 * place % (size - 3) for place in range(plan.prompt)]
    request = engine.make(
        prompt,
        SamplingParams(max_tokens=plan.new, ignore_eos=True, temperature=0.0),
        policy=policy,
        hold=True,
    )
    begun = time.monotonic()
    engine.run([request])
    seconds = time.monotonic() - begun
    held = engine.pool.budget_used
    sent = Counter(engine.runner.ranks.sent) - before
    family = psutil.Process()
    processes = [family, *family.children()]
    tokens = request.output
    engine.release(request)
    empty, _ = empty_model(plan.name, plan.dtype)
    runner = ModelRunner(empty, "reference")
    wanted, lens = simulate(runner, request.policy, plan.work, ranks)
    return {
        "tokens": tokens,
        "seconds": seconds,
        "sent": dict(sent),
        "sent_by_formula": {name: count for name, count in wanted.items() if ranks > 1},
        "cache_bytes": held,
        "weights_bytes": engine.runner.ranks.weight_bytes or weight_bytes(empty, runner, 1),
        "cache_by_formula": cache_bytes(runner, lens, ranks)[0],
        "weights_by_formula": weight_bytes(empty, runner, ranks),
        "process_bytes": [each.memory_full_info().uss for each in processes[:ranks]],
    }


def _on_paper() -> list[dict[str, Any]]:
    """What nobody ran: a larger model on more ranks."""
    shape, sizes, work = PAPER
    rows = []
    for ranks in sizes:
        for words in ("full", "snapkv, keep 0.3"):
            empty = empty_shape(shape, "bfloat16")
            runner = ModelRunner(empty, "reference")
            sent, lens = simulate(runner, make_policy(*POLICIES[words]), work, ranks)
            token = Counter(sent)
            token.subtract(
                simulate(runner, make_policy(*POLICIES[words]), work._replace(new=1), ranks)[0]
            )
            rows.append(
                {
                    "shape": shape,
                    "ranks": ranks,
                    "policy": words,
                    "prompt": work.prompt,
                    "new": work.new,
                    "weights": weight_bytes(empty, runner, ranks),
                    "cache": max(cache_bytes(runner, lens, ranks)),
                    "wire_prompt": wire_bytes(sent - token, ranks) if ranks > 1 else 0.0,
                    "wire_token": wire_bytes(token, ranks) / (work.new - 1) if ranks > 1 else 0.0,
                    "collectives_token": (2 * runner.depth + 2) if ranks > 1 else 0,
                }
            )
    return rows
