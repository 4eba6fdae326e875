"""Incremental detokenization with stop strings, and tokenization of texts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

from pyramidinfer.types import TokenIds

__all__ = ["Detokenizer", "added_tokens", "encoder_of", "head_of", "plain_ids"]

#: Number of last prompt tokens that the first tokens of an answer are decoded with.
CONTEXT = 8
#: Maximum tokens without text, or within an incomplete character, to wait for.
PATIENCE = 16


class Detokenizer:
    """The text of a growing list of tokens; each update decodes only the newest part.

    A token may complete a character begun by earlier tokens, or add a space after them, so a few
    tokens of context are decoded again each time (at first the end of the prompt, unless a special
    token separates it from the answer).  Text that ends in an incomplete character waits for the
    next token.  Stop strings count only after ``min_tokens`` tokens.  (The ``DecodeStream`` of
    tokenizers never returns an incomplete character at the end of an answer, because it cannot know
    that the answer has ended.)
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...],
        prompt: TokenIds,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.min_tokens, self.skip_special_tokens = min_tokens, skip_special_tokens
        self.text = ""
        self.stopped = False
        self.error: str | None = None
        special = set(getattr(tokenizer, "all_special_ids", ()))
        end = prompt[: -CONTEXT - 1 : -1]  # from the last token back
        self._before = list(takewhile(lambda token: token not in special, end))[::-1]
        self._context, self._read = -len(self._before), 0

    def update(self, tokens: TokenIds, *, last: bool = False) -> None:
        """Process the tokens added since the last call; ``stopped`` is set when a stop string is
        found.

        The text is cut before the stop string.  If the tokenizer raises, ``error`` is set and the
        text no longer changes, so that an error in one request does not end the others.
        """
        if self.error:
            return
        try:
            known = self._decode(self._part(tokens, self._read))
            grown = self._decode(self._part(tokens, len(tokens)))
        except Exception as error:
            self.error = f"its tokens cannot be decoded: {type(error).__name__}: {error}"
            return
        unclear = len(grown) <= len(known) or (grown.endswith("\ufffd") and not last)
        if unclear and len(tokens) - self._read < PATIENCE:
            return
        before = len(self.text)
        self.text += grown[len(known) :]
        self._context, self._read = self._read, len(tokens)
        if len(tokens) <= self.min_tokens:
            return
        cuts = [self.text.find(stop, max(0, before - len(stop) + 1)) for stop in self.stop]
        found = [cut for cut in cuts if cut >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    @property
    def stable(self) -> str:
        """The text without an ending that may be the start of a stop string."""
        held = 0
        for stop in self.stop:
            tail = self.text[-(len(stop) - 1) :] if len(stop) > 1 else ""
            at = tail.find(stop[0])
            while at >= 0 and not stop.startswith(tail[at:]):
                at = tail.find(stop[0], at + 1)
            if at >= 0:
                held = max(held, len(tail) - at)
        return self.text[: len(self.text) - held]

    def _part(self, tokens: TokenIds, end: int) -> TokenIds:
        """Tokens from the context on; tokens of the prompt's end have negative indices."""
        if self._context >= 0:
            return tokens[self._context : end]
        return self._before[self._context :] + tokens[:end]

    def _decode(self, tokens: TokenIds) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=self.skip_special_tokens)
        return text


def added_tokens(tokenizer: Any) -> dict[str, int]:
    """Texts that are always one token, such as ``<|im_end|>``, and their ids."""
    find = getattr(tokenizer, "get_added_vocab", dict)
    return {text: token for text, token in find().items() if text.strip()}


def plain_ids(tokenizer: Any, text: str) -> TokenIds:
    """Token ids of an unchanged text."""
    ids: TokenIds = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def encoder_of(tokenizer: Any) -> Callable[[str], TokenIds] | None:
    """A function that tokenizes a text without special tokens; None without a tokenizer."""
    return None if tokenizer is None else partial(plain_ids, tokenizer)


def head_of(tokenizer: Any) -> TokenIds:
    """The tokens that the tokenizer puts before every text."""
    with_head: TokenIds = tokenizer("a")["input_ids"]
    without = plain_ids(tokenizer, "a")
    at = len(with_head) - len(without)
    return with_head[:at] if with_head[at:] == without else []
