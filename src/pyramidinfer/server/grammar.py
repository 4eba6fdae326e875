"""Answers that follow a JSON schema: masks from the library llguidance."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor

from pyramidinfer.server.protocol import ResponseFormat

__all__ = ["Grammars", "JsonConstraint", "SchemaError"]

ANY_OBJECT = {"type": "object"}
#: White space between two tokens of JSON: a blank, or a new line and its indentation.  Without a
#: bound a model that does not want to go on writes blanks until it is cut off.
WHITE_SPACE = r" |\r?\n[ \t]{0,20}"
FIRST_TOKENS = 4  # that are tried before a schema is taken


class SchemaError(ValueError):
    """A schema that cannot be followed, by what it says or for its size."""


class JsonConstraint:
    """A matcher in the state it is in; see ``engine.sampler.Constraint``."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self.matcher = matcher

    @property
    def done(self) -> bool:
        return bool(self.matcher.is_stopped())

    def allowed(self, vocab_size: int) -> Tensor:
        """Tokens that may come next, bool ``[vocab_size]``; ``SchemaError`` where there is none."""
        packed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:vocab_size].astype(bool)
        if self.matcher.is_error() or not bits.any():
            raise SchemaError(self._why("allows no token here"))
        return torch.from_numpy(bits)

    def accept(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise SchemaError(self._why(f"does not take token {token}"))

    def _why(self, what: str) -> str:
        """One line; what the library says beyond it is about its inside."""
        reason = str(self.matcher.get_error() or what).splitlines()[0]
        return f"the JSON schema cannot be followed: {reason}"

    def copy(self) -> JsonConstraint:
        return JsonConstraint(self.matcher.deep_copy())


class Grammars:
    """Builds constraints for one tokenizer; the tokenizer's tables are made once, on first use."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.end_ids = tokenizer, vocab_size, end_ids

    @cached_property
    def _tables(self) -> llguidance.LLTokenizer:
        if self.tokenizer is None:
            raise ValueError("response_format needs a tokenizer; none was loaded")
        ends = sorted(self.end_ids) or None
        try:
            return llguidance.hf.from_tokenizer(self.tokenizer, self.vocab_size, ends)
        except ValueError as error:
            raise ValueError(
                f"this model's tokenizer cannot write JSON under a grammar ({error}); "
                f"leave response_format out"
            ) from None

    def constraint(self, wanted: ResponseFormat | None, most_bytes: int) -> JsonConstraint | None:
        """For a ``response_format``; ``SchemaError`` for a schema that cannot be followed."""
        if wanted is None or wanted.type == "text":
            return None
        schema: dict[str, Any] = ANY_OBJECT
        if wanted.json_schema is not None:
            schema = wanted.json_schema.schema_
        text = json.dumps(schema)
        if len(text) > most_bytes:
            raise ValueError(
                f"the JSON schema has {len(text)} bytes; this server takes {most_bytes} at most"
            )
        tables = self._tables
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            text, defaults={"whitespace_pattern": WHITE_SPACE}
        )
        matcher = llguidance.LLMatcher(tables, grammar, log_level=0)
        if matcher.is_error():
            reason = str(matcher.get_error()).splitlines()[0]
            raise SchemaError(f"the JSON schema cannot be followed: {reason}")
        made = JsonConstraint(matcher)
        # that the vocabulary can begin it, and that what may follow is not too much to work out
        for token in made.copy().allowed(self.vocab_size).nonzero()[:FIRST_TOKENS, 0].tolist():
            made.copy().accept(token)
        return made
