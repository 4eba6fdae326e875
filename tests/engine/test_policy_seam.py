"""A further method is one file: a toy H2O with running scores and different entries per head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.native import library
from pyramidinfer.policies import POLICIES, Forecast, Policy
from pyramidinfer.policies.rule import best_entries
from pyramidinfer.types import Keep, Layers, Needs, Observation, State, View
from tests.engine.build import bound_policy, build
from tests.tiny import of_layers, random_prompt, tiny_model


@dataclass(frozen=True)
class HeavyHitters(Policy):
    """The newest half of the budget and the heaviest half, per KV head."""

    name: ClassVar[str] = "toy"
    uses_scores: ClassVar[bool] = True
    evicts: ClassVar[bool] = True
    budget: int = 20

    def needs(self, view: View) -> Needs:
        over = view.kept_len > self.budget
        return Needs(column_sums=view.phase != "decode", retain=True if over else None)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        newest = seen.positions.argsort(1).argsort(1) >= seen.view.kept_len - self.budget // 2
        assert seen.slot_scores is not None
        return Keep(best_entries(seen.slot_scores, self.budget, newest | seen.protected)), state

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        kept = min(prompt_len + max_new, self.budget + 1)
        return Forecast([prompt_len] * layers.count, [kept] * layers.count)


def cut(alive: set[int], score: dict[int, float], budget: int) -> set[int]:
    """The newest half of the budget and the heaviest of the rest."""
    if len(alive) <= budget:
        return alive
    newest = set(sorted(alive)[-(budget // 2) :])
    rest = sorted(alive - newest, key=lambda column: -score[column])
    return newest | set(rest[: budget - len(newest)])


def brute_force(
    model: torch.nn.Module, prompt: list[int], tokens: list[int], budget: int
) -> list[list[set[int]]]:
    """Kept positions of layer 0 per KV head, from whole attention rows of layer 0.

    Layer 0's queries and keys do not depend on what deeper layers dropped, so a row over the
    kept columns is the full row renormalised over them.
    """
    text = prompt + tokens
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        rows = model(torch.tensor([text]), output_attentions=True).attentions[0][0].double()
    kv_heads, group = 2, rows.shape[0] // 2
    kept: list[list[set[int]]] = []
    for head in range(kv_heads):
        mine = rows[head * group : (head + 1) * group]
        alive = set(range(len(prompt)))
        score = {
            column: float(mine[:, : len(prompt), column].sum()) for column in range(len(prompt))
        }

        alive = cut(alive, score, budget)
        for step in range(len(tokens)):
            position = len(prompt) + step
            alive = alive | {position}
            score[position] = 0.0
            for row in mine[:, position]:
                total = sum(float(row[column]) for column in alive)
                for column in alive:
                    score[column] += float(row[column]) / total
            alive = cut(alive, score, budget)
        kept.append([alive])  # type: ignore[list-item]
    return kept


def test_running_scores_and_per_head_eviction_against_brute_force() -> None:
    model = tiny_model("llama", torch.float64)
    prompt = random_prompt(4, 60)
    for chunk in (1024, 13):
        llm = LLM(
            model,
            policy=HeavyHitters(),
            kv_memory="4MiB",
            page_size=4,
            prefill_chunk=chunk,
        )
        trace = llm.trace(prompt, max_tokens=30)
        expected = brute_force(model, prompt, trace.token_ids, 20)
        heads = [set(head.tolist()) for head in trace.kept_positions[0]]
        assert heads == [head[0] for head in expected]
        assert heads[0] != heads[1], "the heads of this case must differ"
        assert all(of_layers(lengths) == [20] * 4 for lengths in trace.kept_len_by_step)
        llm.engine.check()


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_reference_asks_for_no_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where it attends nor where a policy chooses: nothing is compiled, and nobody asks
    what there is."""

    def never(*_: object) -> None:
        raise AssertionError("the kernels were asked for")

    bound_policy(name, "llama", torch.float32)  # heads are measured with what is fastest
    library.kernels.cache_clear()
    monkeypatch.setattr(library, "compile_kernels", never)
    llm = build(name, dtype=torch.float32, backend="reference", slot_scores=True)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    (out,) = llm.generate([random_prompt(1, 60)], params)
    assert len(out.token_ids) == 12
