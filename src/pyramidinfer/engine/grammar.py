"""Structured outputs: answers that follow a JSON schema, a regular expression or a grammar.

llguidance computes the masks of allowed tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.engine.text import added_tokens
from pyramidinfer.engine.trial import survives
from pyramidinfer.types import StructuredOutputsParams, TokenIds

if TYPE_CHECKING:
    import llguidance

__all__ = ["GrammarConstraint", "GrammarError", "Grammars"]

ANY_OBJECT = '{"type": "object"}'
#: White space between two tokens of JSON: a space, or a new line and its indentation.  Without a
#: bound, a model that does not continue the answer writes spaces until it reaches the token limit.
WHITE_SPACE = r" |\r?\n[ \t]{0,20}"
FIRST_TOKENS = 4  # these are tried before a grammar is accepted
#: Characters with a special meaning in a regular expression.
SIGNS = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")
#: Token IDs in Lark's notation.
TOKEN_IDS = re.compile(r"<\[[\d,\-^*]+\]>")
#: A rule in GBNF syntax; a grammar without one is read as Lark.
GBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


class GrammarError(ValueError):
    """A grammar that is invalid, too large, or not supported by the tokenizer."""


class GrammarConstraint:
    """A matcher and its state; see ``engine.sampler.Constraint``.

    ``what``: the name of the grammar in error messages.
    """

    def __init__(
        self, matcher: llguidance.LLMatcher, tables: llguidance.LLTokenizer, what: str
    ) -> None:
        self.matcher, self.tables, self.what = matcher, tables, what
        self.pending: TokenIds = []  # the rest of a text that was tokenized again

    @property
    def done(self) -> bool:
        return bool(self.matcher.is_stopped())

    def allowed(self, vocab_size: int) -> Tensor:
        """The tokens allowed next, bool ``[vocab_size]``; ``GrammarError`` if there are none.

        If only one text can follow, it is split into tokens as the tokenizer would split it: the
        model was trained on this split, and the next turn's prompt will contain it.
        """
        forced = (self.pending or self.matcher.compute_ff_tokens())[:1]
        if forced and forced[0] < vocab_size:
            only = torch.zeros(vocab_size, dtype=torch.bool)
            only[forced[0]] = True
            return only
        packed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(packed, bitorder="little")[:vocab_size].astype(bool)
        if self.matcher.is_error() or not bits.any():
            raise self.error("allows no token here")
        return torch.from_numpy(bits)

    def accept(self, token: int) -> int:
        """Accept a token and return the token to use instead of it.  If only one text can follow,
        both are tokenized together as the tokenizer would: ``"`` and ``}}`` instead of ``"}`` if
        another brace must follow."""
        if self.pending:
            self.pending.pop(0)
            self._consume(token)
            return token
        self._consume(token)
        heads = self._cut(token, self.matcher.compute_ff_bytes())
        if heads and heads[0] != token and self.matcher.rollback(1):
            if self.matcher.validate_tokens(heads) == len(heads):
                token, *self.pending = heads
            self._consume(token)
        return token

    def _cut(self, token: int, follows: bytes) -> TokenIds:
        """Tokenize a token's text together with what follows; return the tokens that cover the
        former."""
        begun = self.tables.decode_bytes([token])
        heads: TokenIds = []
        for each in self.tables.tokenize_bytes(begun + follows) if follows else ():
            if len(self.tables.decode_bytes(heads)) >= len(begun):
                break
            heads.append(each)
        return heads if self.tables.decode_bytes(heads).startswith(begun) else []

    def _consume(self, token: int) -> None:
        if not self.matcher.consume_token(token):
            raise self.error(f"does not take token {token}")

    def error(self, why: str) -> GrammarError:
        """The error on one line, without the library's internal details."""
        return _error(self.what, self.matcher.get_error() or why)

    def copy(self) -> GrammarConstraint:
        made = GrammarConstraint(self.matcher.deep_copy(), self.tables, self.what)
        made.pending = [*self.pending]
        return made


class Grammars:
    """Builds constraints for one tokenizer; the tokenizer's tables are made once, on first use."""

    def __init__(self, tokenizer: Any, vocab_size: int, end_ids: frozenset[int]) -> None:
        self.tokenizer, self.vocab_size, self.end_ids = tokenizer, vocab_size, end_ids

    @cached_property
    def _tables(self) -> llguidance.LLTokenizer:
        if self.tokenizer is None:
            raise GrammarError("structured outputs need a tokenizer; none was loaded")
        try:
            import llguidance.hf
        except ModuleNotFoundError:
            raise GrammarError(
                "structured outputs need the package llguidance: pip install 'pyramidinfer[server]'"
            ) from None
        ends = sorted(self.end_ids) or None
        try:
            return llguidance.hf.from_tokenizer(self.tokenizer, self.vocab_size, ends)
        except ValueError as error:
            raise GrammarError(
                f"this model's tokenizer cannot write JSON, nor follow any grammar ({error}); "
                f"leave the request for structured outputs out"
            ) from None

    def constraint(self, wanted: StructuredOutputsParams) -> GrammarConstraint:
        """A constraint in its initial state; ``GrammarError`` if the grammar cannot be followed."""
        tables = self._tables
        from llguidance import LLMatcher

        try:
            what, grammar = _read(wanted)
        except GrammarError:
            raise
        except ValueError as error:  # an invalid schema, in the library's words
            raise _error("JSON schema", error) from None
        if wanted.choice is None and not wanted.json_object:  # those are built here
            _try(what, grammar)
        if wanted.think is not None:
            grammar = _behind_thoughts(grammar, wanted.think, added_tokens(self.tokenizer))
        matcher = LLMatcher(tables, grammar, log_level=0)
        if matcher.is_error():
            raise _error(what, matcher.get_error())
        made = GrammarConstraint(matcher, tables, what)
        # check that the vocabulary can begin it and that the next tokens are cheap enough to
        # compute
        for token in made.copy().allowed(self.vocab_size).nonzero()[:FIRST_TOKENS, 0].tolist():
            made.copy().accept(token)
        return made


def _read(wanted: StructuredOutputsParams) -> tuple[str, str]:
    """The name of the grammar in error messages, and the grammar as llguidance reads it."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if wanted.regex is not None:
        return "regular expression", LLMatcher.grammar_from_regex(wanted.regex)
    if wanted.choice is not None:
        choices = "|".join(SIGNS.sub(r"\\\g<0>", text) for text in wanted.choice)
        return "choice", LLMatcher.grammar_from_regex(choices)
    if wanted.grammar is None:
        schema = ANY_OBJECT if wanted.json is None else wanted.json
        return "JSON schema", LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": WHITE_SPACE}
        )
    text = wanted.grammar
    if GBNF_RULE.search(text):
        try:
            text = gbnf_to_lark(text)
        except Exception as error:  # the library also raises bare exceptions
            raise _error("grammar", error) from None
    return "grammar", LLMatcher.grammar_from_lark(text)


def _behind_thoughts(grammar: str, think: tuple[str, str], added: Mapping[str, int]) -> str:
    """A grammar of answers that may begin with thoughts between tags; the opening tag is empty if
    the prompt already contains it."""
    begin, end = think

    def put(tag: str) -> str:
        return f"<[{added[tag]}]>" if tag in added else json.dumps(tag)

    lazy = "" if end in added else "[lazy]"
    thoughts = f"({put(begin)} thoughts)?" if begin else "thoughts"
    rules = [
        f"start: {thoughts} SPACE? @answer",
        f"thoughts{lazy}: TEXT {put(end)}",
        r"TEXT: /(.|\n)*/",
        r"SPACE: /[ \n]{1,4}/",
    ]
    lark = not grammar.startswith("{")  # the library's own grammars are JSON, the others Lark
    answer = {"lark_grammar": grammar} if lark else json.loads(grammar)["grammars"][0]
    whole = [{"lark_grammar": "\n".join(rules)}, {**answer, "name": "answer"}]
    return json.dumps({"grammars": whole})


def _try(what: str, grammar: str) -> None:
    """``GrammarError`` for a grammar that would crash this process or keep it busy for ever."""
    import llguidance

    grammar = TOKEN_IDS.sub("<[1]>", grammar)  # the trial uses another vocabulary
    try:
        if survives(grammar, str(Path(llguidance.__file__).parents[1])):
            return
    except OSError as error:
        raise _error(what, f"no process to try it in could be started ({error})") from None
    raise _error(
        what,
        "it is nested too deeply, or too much work; make it simpler, and name special tokens by "
        "their ids: <[2]>",
    )


def _error(what: str, reason: object) -> GrammarError:
    """The error on one line: of several lines, the one that gives the reason."""
    lines = str(reason).splitlines() or [""]
    why = next((line for line in lines if line.startswith("error: ")), lines[0])
    if why.startswith("NoExtension"):
        why = "no answer matches it"
    return GrammarError(f"the {what} cannot be followed: {why.removeprefix('error: '):.200}")
