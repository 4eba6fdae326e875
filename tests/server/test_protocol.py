"""Bodies made to cost much cost little: a million mistakes are told of by a few."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pyramidinfer.server.protocol import ChatRequest, CompletionRequest, Detokenize
from pyramidinfer.server.protocol_base import MANY

MILLION = 10**6
TURN = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [-1] * MILLION}),
        (CompletionRequest, {"prompt": ["a", *[1] * MILLION]}),
        (CompletionRequest, {"prompt": [[-1] * MILLION]}),
        (CompletionRequest, {"prompt": [[]] * MILLION}),
        (CompletionRequest, {"prompt": "a", **{f"x{i}": 1 for i in range(MILLION)}}),
        (
            CompletionRequest,
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(2000)), "")},
        ),
        (CompletionRequest, {"prompt": "a", "stop": [1] * MILLION}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * MILLION}),
        (ChatRequest, {"messages": [{}] * MILLION}),
        (ChatRequest, {"messages": [{"role": "user", "content": [1] * MILLION}]}),
        (ChatRequest, {"messages": [TURN], "modalities": [1] * MILLION}),
        (ChatRequest, {"messages": [TURN], "tools": [1] * MILLION}),
        (Detokenize, {"tokens": [-1] * MILLION}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value)[:30],
)
def test_a_million_mistakes_are_told_of_by_a_few(kind: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as refused:
        kind.model_validate(body)
    assert refused.value.error_count() <= MANY


@pytest.mark.parametrize(
    "prompt", ["a", "", ["a", "b"], [1, 2, 3], [[1, 2], [3]]], ids=["text", "", "2", "ids", "lists"]
)
def test_every_kind_of_prompt_is_taken(prompt: Any) -> None:
    assert CompletionRequest(prompt=prompt).prompt == prompt


@pytest.mark.parametrize("prompt", [None, 1, [], [None], [[]], ["a", 1], [1, "a"], [[1], 2], {}])
def test_other_prompts_are_not(prompt: Any) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest(prompt=prompt)
