"""With the whole cache, real models say what transformers says, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.english import paragraphs
from pyramidinfer.models.catalog import find_model
from pyramidinfer.types import TokenIds
from tests_real.conftest import real_prompts

PROMPTS = {"smollm2": 20, "gemma3-270m": 10}
SHORTEST, LONGEST, NEW = 20, 600, 20
#: Two tokens whose logits in transformers are nearer than this may change places: sums are taken
#: in another order here.
TIE = 1e-3
#: So many prompts may meet such a tie; more would be another model.
TIES = 2
#: Nats a token of English at most; measured: 3.13 and 3.10.
LOSS = 3.6


@dataclass
class Theirs:
    """What transformers generates from each prompt, and the logits of every step."""

    prompts: list[TokenIds]
    tokens: list[TokenIds]
    logits: list[list[torch.Tensor]]


@pytest.fixture(scope="module")
def theirs(name: str) -> Iterator[Theirs]:
    """transformers, one prompt after the other, its own end tokens in force."""
    folder = find_model(name)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = LLM(name, kv_memory="1MiB", backend="reference").tokenizer
    prompts = real_prompts(tokenizer, PROMPTS[name], SHORTEST, LONGEST)
    found = Theirs(prompts, [], [])
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW,
            output_logits=True,
            return_dict_in_generate=True,
        )
        found.tokens.append(out.sequences[0, len(prompt) :].tolist())
        found.logits.append([step[0].clone() for step in out.logits])
    yield found


@pytest.mark.parametrize("chunk", [1024, 64])
def test_full_is_transformers(name: str, theirs: Theirs, chunk: int) -> None:
    """All prompts in one batch, each taken in at once or in chunks of 64 tokens."""
    llm = LLM(name, policy="full", dtype="float32", prefill_chunk=chunk)
    lengths = [len(prompt) for prompt in theirs.prompts]
    assert min(lengths) < 90 and max(lengths) >= LONGEST  # a template has some 60
    outputs = llm.generate(theirs.prompts, SamplingParams(max_tokens=NEW, temperature=0.0))
    ties = []
    for number, output in enumerate(outputs):
        expected, logits = theirs.tokens[number], theirs.logits[number]
        if output.finish_reason == "stop":
            assert output.token_ids[-1] in llm.engine.end_ids
        if output.token_ids == expected:
            continue
        at = next(
            (i for i, (a, b) in enumerate(zip(output.token_ids, expected, strict=False)) if a != b),
            None,
        )
        assert at is not None, f"prompt {number}: {output.token_ids} is not {expected}"
        gap = float(logits[at][expected[at]] - logits[at][output.token_ids[at]])
        assert gap < TIE, (
            f"prompt {number} of {lengths[number]} tokens, token {at}: {output.token_ids[at]} "
            f"instead of {expected[at]}, whose logit is {gap:.5f} higher"
        )
        ties.append(number)
    assert len(ties) <= TIES, f"prompts {ties} met near-ties"


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_an_answer_makes_sense(name: str) -> None:
    llm = LLM(name, policy="full", kv_memory="64MiB")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = llm.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    (output,) = llm.generate([ids], SamplingParams(max_tokens=24, temperature=0.0))
    assert "Paris" in output.text and output.finish_reason == "stop"


def test_english_is_likely(name: str) -> None:
    """A model that was read wrongly has no idea of English, whatever it equals."""
    llm = LLM(name, policy="full", kv_memory="64MiB")
    texts = [llm.encode(" ".join(paragraphs()[at : at + 12]))[:300] for at in (0, 100, 200)]
    scores = llm.score([ids[:200] for ids in texts], [ids[200:] for ids in texts])
    found = [-sum(each.logprobs) / len(each.logprobs) for each in scores]
    assert sum(found) / len(found) < LOSS, found
