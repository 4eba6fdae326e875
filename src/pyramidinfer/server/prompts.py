"""Text to tokens and back: prompts, the chat template, the spelling of a token."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from pyramidinfer.engine.chat_template import ChatTemplate
from pyramidinfer.engine.text import Detokenizer, added_tokens
from pyramidinfer.server.protocol import Message, Tool
from pyramidinfer.server.thinking import Thinking
from pyramidinfer.server.tool_formats import ToolPrompt
from pyramidinfer.types import TokenIds

__all__ = ["Prompts"]

#: Character of byte-level BPE → byte.
BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


class Prompts:
    """One model's tokenizer (None: token ids only), as the API needs it.

    ``options``: template arguments of every chat; ``ValueError`` for one that the template never
    reads.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, options: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.template, self.options = ChatTemplate(tokenizer), dict(options or {})
        self.template.check_options(self.options)
        self.tool_prompt = ToolPrompt(self.template)
        self.thinking = Thinking(tokenizer, self.template)
        self._spelled: dict[int, bytes] = {}

    def encode(self, text: str, special: bool = True) -> TokenIds:
        """Token ids of a text; ``ValueError`` if there is no tokenizer or nothing to encode."""
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; none was loaded (send token ids)")
        ids: TokenIds = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids

    def chat(
        self,
        messages: Sequence[Message],
        generate: bool = True,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] = (),
    ) -> TokenIds:
        """Token ids of a conversation; ``ValueError`` if the template rejects it.

        ``options``: template arguments of a request; they override ``self.options``.
        """
        if not self.template.exists:
            raise ValueError("this model has no chat template; use /v1/completions")
        turns = self.thinking.turns([each.turn for each in messages])
        listed: Sequence[Mapping[str, Any]] = [
            each.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for each in tools
        ]
        if listed or any("tool_calls" in turn for turn in turns):
            turns, listed = self.tool_prompt.turns(turns, listed)
        return self.template.ids(turns, generate, {**self.options, **(options or {})}, listed)

    @cached_property
    def added(self) -> dict[str, int]:
        """Texts that are always one token, with their ids."""
        return added_tokens(self.tokenizer)

    @cached_property
    def special_marks(self) -> bool:
        """Whether the marks around a tool call are lost in texts without special tokens."""
        special = getattr(self.tokenizer, "all_special_tokens", ())
        format = self.tool_prompt.format
        return any(each in f"{format.begin}{format.between}{format.end}" for each in special) or (
            not format.mark
        )

    def decode(self, tokens: TokenIds, special: bool = True) -> str:
        """The text of tokens, by default with special tokens."""
        if self.tokenizer is None:
            raise ValueError("detokenizing needs a tokenizer; none was loaded")
        for token in tokens:
            if token >= self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=not special)
        return text

    def offsets(
        self,
        tokens: TokenIds,
        said: TokenIds,
        prompt: TokenIds,
        reader: Detokenizer | None = None,
        skip_special_tokens: bool = True,
    ) -> tuple[list[int], Detokenizer | None]:
        """Offsets in the text of ``tokens``, which follow ``said``, and the decoder that read them.

        ``prompt``: tokens before the text; offsets count from the text's start.
        """
        if self.tokenizer is None:
            return [0] * len(tokens), None
        reader = reader or Detokenizer(self.tokenizer, (), prompt, 0, skip_special_tokens)
        found, read = [], list(said)
        for token in tokens:
            found.append(len(reader.text))
            read.append(token)
            reader.update(read)
        return found, reader

    def spell(self, token: int) -> bytes:
        """The bytes of a token, with the space before it; they may end within a character.

        ``token_id:N`` without a tokenizer.
        """
        if token not in self._spelled:
            self._spelled[token] = self._bytes(token)
        return self._spelled[token]

    def _bytes(self, token: int) -> bytes:
        if self.tokenizer is None:
            return f"token_id:{token}".encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if token in self.tokenizer.all_special_ids:
            return piece.encode()
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(found[1])
        if self._of_bytes and all(letter in BYTES for letter in piece):
            return bytes(BYTES[letter] for letter in piece)
        return piece.replace("\u2581", " ").encode()

    @cached_property
    def _of_bytes(self) -> bool:
        """Whether tokens use the alphabet of byte-level BPE."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return backend is not None and '"ByteLevel"' in json.dumps(
            json.loads(backend.to_str())["decoder"]
        )

    @cached_property
    def longest_token(self) -> int | None:
        """Characters of the longest token; None if a token may stand for any number of them."""
        if self.tokenizer is None or not self._of_bytes:
            return None
        return max(map(len, self.tokenizer.get_vocab()), default=None)
