"""Text to tokens and back: prompts, the chat template, the spelling of a token."""

from __future__ import annotations

from typing import Any

from pyramidinfer.server.protocol import Message
from pyramidinfer.types import TokenIds

__all__ = ["Prompts"]


class Prompts:
    """One model's tokenizer (None: token ids only), as the API needs it."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._spelled: dict[int, str] = {}

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode(self, text: str, special: bool = True) -> TokenIds:
        """Token ids of a text; ``ValueError`` where there is no tokenizer or nothing to encode."""
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; none was loaded (give token ids)")
        ids: TokenIds = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def chat(self, messages: list[Message], generate: bool = True) -> TokenIds:
        """Token ids of a conversation; ``ValueError`` where the template does not take it."""
        if not self.has_template:
            raise ValueError("this model has no chat template; use /v1/completions")
        turns = [{"role": each.role, "content": each.text} for each in messages]
        try:
            ids: TokenIds = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=generate, tokenize=True, return_dict=False
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        return ids

    def decode(self, tokens: TokenIds, special: bool = True) -> str:
        """The text of tokens, with special ones unless told not."""
        if self.tokenizer is None:
            raise ValueError("detokenizing needs a tokenizer; none was loaded")
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not special)
        return text

    def spell(self, token: int) -> str:
        """A token alone, as text (``token_id:N`` where there is no tokenizer)."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        if token not in self._spelled:
            self._spelled[token] = str(self.tokenizer.decode([token]))
        return self._spelled[token]
