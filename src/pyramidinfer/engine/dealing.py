"""Assignment of layers to the stages of a pipeline, by the work that a policy forecasts.

Deep layers compute fewer tokens and keep fewer under a policy that drops some, so stages with
equally many layers would not have equal work.  A layer's work is counted in multiplications for one
request of ``PROMPT`` and ``NEW`` tokens: each token that enters the layer goes through its weights
and attends to the entries kept there.  The head belongs to the last stage.
"""

from __future__ import annotations

from typing import Any

from pyramidinfer.engine.profiling import look_up
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.stages import ranges_of, share_layers
from pyramidinfer.policies import Policy
from pyramidinfer.policies.base import Facts, asks_for_profile

__all__ = ["NEW", "PROMPT", "deal_layers", "layer_work"]

#: Tokens of the request that the assignment is based on: a few pages of text, and an answer.
PROMPT, NEW = 2000, 200


def layer_work(empty: Any, runner: ModelRunner, policy: Policy) -> tuple[list[float], float]:
    """Multiplications of each layer, and of the head, for one request.

    empty : the runner's model (needs no weights);  policy : bound to it.
    """
    prompt = max(1, min(PROMPT, runner.max_positions - NEW))
    layers = runner.layers_for(prompt + NEW)
    forecast = policy.forecast(prompt, NEW, layers)
    kept = forecast.by_head(runner.kv_heads).mean(1).tolist()
    work: list[float] = []
    for layer, shape in zip(runner.body.layers, runner.shapes, strict=False):
        weights = sum(each.numel() for each in layer.parameters())
        entry = shape.heads * (shape.key_dim + shape.value_dim)  # per query and entry
        number, held = len(work), kept[len(work)]
        reach, window = forecast.reach[number], shape.window or prompt + NEW
        going_in = reach * (weights + entry * min(reach / 2, window))
        work.append(going_in + NEW * (weights + entry * min(held, window)))
    head: Any = empty.get_output_embeddings()
    return work, float((1 + NEW) * head.weight.numel())


def deal_layers(
    empty: Any, runner: ModelRunner, policy: Policy, stages: int, given: str | None
) -> list[range]:
    """Every stage's layers: as many as ``given`` says (``"16,14"``), or by the policy's forecast,
    as if all entries were kept if it needs a head profile that does not exist yet."""
    if given is not None:
        return ranges_of(list(map(int, given.split(","))))
    found = look_up(runner) if asks_for_profile(policy) else None
    if found is not None:
        policy = policy.bind(Facts(lambda: found.profile, lambda given: None, lambda: None))
    elif asks_for_profile(policy):
        policy = Policy()
    work, head = layer_work(empty, runner, policy)
    return share_layers(work, stages, head)
