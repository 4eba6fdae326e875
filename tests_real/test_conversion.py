"""Fetched models are what transformers reads from the same GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pyramidinfer.engine.english import paragraphs
from pyramidinfer.models.catalog import CATALOG, find_model
from pyramidinfer.models.gguf_file import Header, read_header
from pyramidinfer.models.loading import end_ids, load_config

TEXTS = [
    "The archive is in room 472.",
    "It's  «naïve»: 日本語, 🙂 – ≠ \u200b.",
    "\tdef f(x):\n\t\tpass",
    " a  b   c\n\n\nd \n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<start_of_turn>Hi<end_of_turn>",
    "<eos> <bos><pad><unk> <|endoftext|>",
    "e\u0301 é I'LL they've",
    "x" * 200,
    "\r\n \u00a0\ufeff",
]
#: Where SmolLM's own way of splitting text and transformers' reading of it differ.
BEFORE_DIGITS = "one\n\n1. two\n  2 ½"


@pytest.fixture(scope="module")
def both(name: str, gguf_file: Path) -> tuple[Any, Any]:
    """The converted tokenizer, and transformers' own."""
    theirs = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    return AutoTokenizer.from_pretrained(find_model(name)), theirs


def test_weights_and_ends_are_transformers(name: str, gguf_file: Path) -> None:
    ours: Any = AutoModelForCausalLM.from_pretrained(find_model(name))
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert mine.keys() == other.keys() and len(mine) > 200
    for key, value in mine.items():
        assert value.dtype == torch.float32 and torch.equal(value, other[key]), key
    table = ours.get_input_embeddings().weight
    assert ours.get_output_embeddings().weight.data_ptr() == table.data_ptr()  # tied
    ids = torch.arange(100, 140)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert end_ids(ours) == end_ids(theirs) == {read_header(gguf_file).metadata[EOS]}
    for what in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours.generation_config, what) == getattr(theirs.generation_config, what)


EOS = "tokenizer.ggml.eos_token_id"


def test_tokens_are_transformers(name: str, both: tuple[Any, Any], gguf_file: Path) -> None:
    ours, theirs = both
    starts = bool(read_header(gguf_file).metadata["tokenizer.ggml.add_bos_token"])
    for text in (*TEXTS, *paragraphs()[:200]):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        bare = ours(text, add_special_tokens=False)["input_ids"]
        assert bare == theirs(text, add_special_tokens=False)["input_ids"], text
        assert (ids[0] == ours.bos_token_id) >= starts and len(ids) == len(bare) + starts
        for options in ({}, {"skip_special_tokens": True}):
            assert ours.decode(ids, **options) == theirs.decode(ids, **options)
    assert ours.get_vocab() == theirs.get_vocab() and len(ours) == len(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.all_special_ids == theirs.all_special_ids


def test_the_template_is_the_files(name: str, both: tuple[Any, Any], gguf_file: Path) -> None:
    ours, theirs = both
    template = read_header(gguf_file).metadata.get("tokenizer.chat_template")
    assert ours.chat_template == theirs.chat_template == template
    assert (template is not None) == (name == "smollm2")
    if template is None:
        return
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello, you."},
        {"role": "user", "content": "Bye"},
    ]
    for shown in (turns, [{"role": "system", "content": "Be brief."}, *turns]):
        mine, other = (
            each.apply_chat_template(shown, add_generation_prompt=True, return_dict=False)
            for each in both
        )
        assert mine == other and ours.eos_token_id in mine


@pytest.mark.parametrize("name", ["smollm2"], indirect=True)
def test_smollm2_takes_digits_alone(name: str, both: tuple[Any, Any]) -> None:
    """As its model card's tokenizer does; transformers falls back on GPT-2's way of splitting."""
    found = [each.convert_ids_to_tokens(each(BEFORE_DIGITS)["input_ids"]) for each in both]
    assert found[0] == ["one", "ĊĊ", "1", ".", "Ġtwo", "ĊĠĠ", "2", "Ġ", "Â½"]
    assert found[1] != found[0]  # once transformers knows the name, the mend can go


def test_the_config_says_what_the_file_says(name: str, gguf_file: Path) -> None:
    header, config = read_header(gguf_file), load_config(name)
    for key, found in (
        ("block_count", config.num_hidden_layers),
        ("embedding_length", config.hidden_size),
        ("context_length", config.max_position_embeddings),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads),
        ("attention.layer_norm_rms_epsilon", config.rms_norm_eps),
    ):
        assert header.get(key) == found, key
    assert config.tie_word_embeddings
    {"smollm2": _check_smollm2, "gemma3-270m": _check_gemma}[name](header, config)
    origin = json.loads((Path(find_model(name)) / "converted_from.json").read_text())
    assert (origin["file"], origin["sha256"]) == (gguf_file.name, CATALOG[name].sha256)


def _check_smollm2(header: Header, config: Any) -> None:
    assert config.model_type == "llama" and config.head_dim == header.get("rope.dimension_count")
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 100_000.0}


def _check_gemma(header: Header, config: Any) -> None:
    """Three things that no file says are Gemma 3's own: which layers slide, the frequencies of
    those, and what queries are scaled by."""
    assert config.model_type == "gemma3_text"
    assert config.head_dim == config.query_pre_attn_scalar == header.get("attention.key_length")
    assert config.sliding_window == header.get("attention.sliding_window") == 512
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    assert config.layer_types == kinds * 3
    rope = {kind: each["rope_theta"] for kind, each in config.rope_parameters.items()}
    assert rope == {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    assert config.final_logit_softcapping is None and config.attn_logit_softcapping is None
