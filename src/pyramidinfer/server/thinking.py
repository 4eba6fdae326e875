"""Reasoning models: the tags around the reasoning, in prompts and in answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pyramidinfer.engine.chat_template import REASONING, ChatTemplate, Turn
from pyramidinfer.engine.text import added_tokens
from pyramidinfer.types import TokenIds

__all__ = ["Tags", "ThinkReader", "Thinking", "partly"]


class Tags(NamedTuple):
    """The tags around a model's reasoning."""

    begin: str
    end: str


#: First the tags of Qwen 3, DeepSeek R1, SmolLM3 and others, then those of Mistral's Magistral.
TAGS = (Tags("<think>", "</think>"), Tags("[THINK]", "[/THINK]"))
#: Template arguments that switch reasoning on and off.
SWITCHES = ("enable_thinking", "thinking")
TAIL = 24  # last tokens of a prompt that are searched for a tag


class Thinking:
    """The reasoning of one model, according to its chat template and its vocabulary.

    ``tags``: the tags around its reasoning; None for a model without reasoning.
    """

    def __init__(self, tokenizer: Any, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    @cached_property
    def tags(self) -> Tags | None:
        if not self.template.exists:
            return None
        known = added_tokens(self.tokenizer)
        source = self.template.source
        return next((each for each in TAGS if each.end in known or each.end in source), None)

    @cached_property
    def is_special(self) -> bool:
        """Whether a tag is a special token, which is left out of plain texts."""
        special = getattr(self.tokenizer, "all_special_tokens", ())
        return self.tags is not None and any(each in special for each in self.tags)

    def options(self, effort: str) -> dict[str, Any]:
        """Template arguments for ``reasoning_effort``; ``ValueError`` if the template has no such
        argument."""
        names = self.template.names if self.template.exists else ()
        if "reasoning_effort" in names:
            return {"reasoning_effort": effort}
        for switch in SWITCHES:
            if switch in names:
                return {switch: effort != "none"}
        raise ValueError(
            f"reasoning_effort: this model's chat template reads none of reasoning_effort, "
            f"{', '.join(SWITCHES)}, so it would have no effect; leave it out"
        )

    def turns(self, turns: Sequence[Turn]) -> list[Turn]:
        """Turns with earlier reasoning where the template expects it: in its own field, or between
        tags before the answer."""
        if self.tags is None or REASONING in self.template.source:
            return list(turns)
        begin, end = self.tags

        def one(turn: Turn) -> Turn:
            if REASONING not in turn:
                return turn
            rest = {key: value for key, value in turn.items() if key != REASONING}
            text = f"{begin}\n{turn[REASONING]}\n{end}\n\n{turn['content']}"
            return {**rest, "content": text}

        return [one(turn) for turn in turns]

    def _ends_with(self, prompt: TokenIds) -> str:
        """The tag at the end of a prompt; empty if there is none."""
        text = self.tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
        return next((tag for tag in self.tags or () if text.endswith(tag)), "")

    def reader(self, prompt: TokenIds) -> Callable[[], ThinkReader] | None:
        """Creates parsers of the reasoning in answers to this prompt."""
        tags = self.tags
        if tags is None:
            return None
        opened = self._ends_with(prompt) == tags.begin
        return lambda: ThinkReader(tags, opened)

    def before_form(self, prompt: TokenIds) -> tuple[str, str] | None:
        """Tags of the reasoning that may precede a constrained answer (the first is empty if the
        prompt ends with it); None without reasoning."""
        if self.tags is None:
            return None
        found = self._ends_with(prompt)
        if found == self.tags.end:
            return None
        return ("", self.tags.end) if found else (self.tags.begin, self.tags.end)

    def count(self, reader: ThinkReader, tokens: TokenIds) -> int:
        """The number of reasoning tokens in an answer, including the tags."""
        if reader.counted is not None:
            return reader.counted
        if not reader.has_thought:
            return 0
        if not reader.is_over:
            return len(tokens)

        def closed(length: int) -> bool:
            text: str = self.tokenizer.decode(tokens[:length], skip_special_tokens=False)
            return reader.tags.end in text

        low, high = 0, len(tokens)  # not closed, closed
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if closed(middle) else (middle, high)
        reader.counted = high
        return high


class ThinkReader:
    """Splits one answer into reasoning and the text after it.

    ``opened``: the prompt ends with the opening tag.  Reasoning can only be at the beginning; white
    space around it is dropped.
    """

    def __init__(self, tags: Tags, opened: bool) -> None:
        self.tags, self.has_thought, self.is_over = tags, opened, False
        self.counted: int | None = None  # reasoning tokens, once they are known
        self._rest = ""
        self._step = self._beginning
        self._said = False  # something other than white space

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """More reasoning, and more of the text after it; ``last``: the answer ends here."""
        self._rest += text
        thoughts = answer = ""
        while True:
            step = self._step
            more = step(last)
            if step == self._thinking:
                thoughts += more
            else:
                answer += more
            if step == self._step:
                return thoughts, answer

    def _beginning(self, last: bool) -> str:
        """Skip the opening tag, even if the prompt already ends with one."""
        text = self._rest.lstrip()
        if text.startswith(self.tags.begin):
            self._rest = text[len(self.tags.begin) :]
            self.has_thought = True
        elif not last and self.tags.begin.startswith(text):
            return ""
        self._step = self._thinking if self.has_thought else self._answer
        return ""

    def _thinking(self, last: bool) -> str:
        end = self.tags.end
        if not self._said:
            self._rest = self._rest.lstrip()
        at = self._rest.find(end)
        if at >= 0:
            text, self._rest = self._rest[:at].rstrip(), self._rest[at + len(end) :]
            self._step, self.is_over = self._gap, True
            return text
        held = 0 if last else partly(self._rest, end)
        text = self._rest[: len(self._rest) - held].rstrip()
        self._rest = "" if last else self._rest[len(text) :]
        self._said = self._said or bool(text)
        return text

    def _gap(self, last: bool) -> str:
        self._rest = self._rest.lstrip()
        if self._rest:
            self._step = self._answer
        return ""

    def _answer(self, last: bool) -> str:
        text, self._rest = self._rest, ""
        return text


def partly(text: str, mark: str) -> int:
    """The number of characters at the end of a text that are the beginning of a mark."""
    most = min(len(mark) - 1, len(text))
    return next((size for size in range(most, 0, -1) if mark.startswith(text[-size:])), 0)
