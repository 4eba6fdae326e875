"""The generated language, its tokenizer, and the training script on a tiny recipe."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.lab import documents
from pyramidinfer.lab.recall import make_questions
from pyramidinfer.lab.tokenizer import build_tokenizer
from pyramidinfer.lab.train import LOG, Recipe, Sampler, train

TINY = Recipe(
    width=16,
    layers=4,
    heads=2,
    kv_heads=1,
    mlp=16,
    context=128,
    grow_to=128,
    base_layers=2,
    exits=(1, 2, 3),
    step_tokens=256,
    max_stage_tokens=1024,
    mixed_tokens=512,
    finish_tokens=512,
    mixed_step_tokens=256,
    mixed_lengths=(64, 128),
)


def test_every_generated_word_is_a_token() -> None:
    tokenizer = build_tokenizer(4096)
    for question in make_questions(1, 20, 400):
        ids = tokenizer(question.prompt)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert len(ids) == 400
        start, stop = question.needle
        assert tokenizer.decode(ids[start:stop]) == question.answer


def test_chat_template_gives_the_trained_format() -> None:
    tokenizer = build_tokenizer(4096)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is the map ?"}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert tokenizer.decode(ids) == "<bos> <user> Where is the map ? <end> <assistant>"
    assert ids == tokenizer("<user> Where is the map ? <end> <assistant>")["input_ids"]


def test_documents_are_as_long_as_asked_and_hold_their_facts() -> None:
    for seed in range(20):
        document = documents.document(random.Random(seed), 300, 7)
        assert len(document.words) == 300
        for fact, start in zip(document.facts, document.starts, strict=True):
            assert document.words[start : start + 10] == fact.words()
        assert len({fact.last for fact in document.facts}) == 7


def test_training_examples_weigh_what_must_be_recalled() -> None:
    sampler = Sampler(TINY, 3)
    vocabulary = documents.vocabulary()
    for kind in ("copy", "pairs", "recall"):
        ids, weights, keys = sampler.batch(kind, 128, 512)
        assert ids.shape == weights.shape == keys.shape == (4, 128)
        assert (weights[keys] == 1).all()
        assert keys.any(1).all()
    words = [vocabulary[i] for i in ids[0][keys[0]].tolist()]
    assert all(word in documents.NUMBERS or word in documents.PLACES for word in words)


def test_the_script_trains_saves_and_can_finish_again(tmp_path: Path) -> None:
    """The written folder loads in transformers and in the engine; finishing again is the same."""
    whole = tmp_path / "whole"
    train(TINY, whole)
    rows = [json.loads(line) for line in (whole / LOG).read_text().splitlines()]
    assert "recipe" in rows[0]
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert model.config.num_hidden_layers == 4
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(whole)
    prompt = make_questions(1, 1, 100, facts=2)[0].prompt
    out = LLM(str(whole), policy="full", kv_memory="1MiB").generate(
        prompt, SamplingParams(max_tokens=4, ignore_eos=True)
    )[0]
    assert out.prompt_token_ids == tokenizer(prompt)["input_ids"]
    assert out.text == tokenizer.decode(out.token_ids, skip_special_tokens=True)

    # cut the log as if the finish had not begun: taking it up twice gives the same model
    (whole / LOG).write_text(
        json.dumps(rows[0])
        + "\n"
        + json.dumps(
            {
                "stage": "mixed",
                "step": 30,
                "tokens": 6000,
                "seconds": 1.0,
            }
        )
        + "\n"
    )
    again, third = tmp_path / "again", tmp_path / "third"
    train(TINY, again, resume=whole)
    train(TINY, third, resume=whole)
    first = AutoModelForCausalLM.from_pretrained(again).state_dict()
    before = model.state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(third).state_dict().items():
        assert torch.equal(value, first[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in first.items())
