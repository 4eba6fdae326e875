"""A tiny random model whose tokenizer knows the words of the real text, with a chat template."""

from __future__ import annotations

from pathlib import Path

from tests.lab.test_samples import WORDS, other_tokenizer
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}module {{ m['content'] }} object {% endfor %}"
    "{% if add_generation_prompt %}{{ 'returns ' }}{% endif %}"
)


def save(folder: Path, chats: bool = True) -> str:
    """Write model and tokenizer; returns the folder."""
    model = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=2048)
    model.save_pretrained(folder)
    tokenizer = other_tokenizer()
    if chats:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)
