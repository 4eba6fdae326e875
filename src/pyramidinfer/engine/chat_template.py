"""A tokenizer's chat template: messages to token ids, without ignoring any part of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from pyramidinfer.engine.text import added_tokens
from pyramidinfer.types import TokenIds

__all__ = ["REASONING", "ChatTemplate", "Turn", "find_end_ids"]

#: A message: its role and texts, ``{"role": "user", "content": "…", "name": "…"}``, and of an
#: assistant ``tool_calls``, a list in OpenAI's format with ``arguments`` as objects.
Turn = dict[str, Any]
#: The field of an assistant's message with its reasoning.  A template that reads it may leave it
#: out of earlier turns.
REASONING = "reasoning_content"

#: Placeholder of a field's text in the check whether the template uses the field: plain letters
#: and digits, which filters do not change.
MARK = "mark{}end"
MARKED = re.compile(r"mark(\d+)end", re.IGNORECASE)
#: Maximum number of unused fields that are checked again with their own text.
DOUBTED = 4
#: Names that a template reads and a request cannot set.
OWN_NAMES = {"messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now"}


class Field(NamedTuple):
    """A text of a conversation: the message's index and the field."""

    turn: int
    key: str


class ChatTemplate:
    """A tokenizer's template (``exists``: whether there is one).

    Contents are passed as texts, or as one text part each if the template reads parts only.  Role
    ``developer`` becomes ``system`` if the template does not name it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def exists(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def ids(
        self,
        messages: Sequence[Turn],
        generate: bool = True,
        options: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> TokenIds:
        """Token ids of a conversation, up to the start of the model's answer if ``generate`` is
        set.

        ``options``: further names for the template (such as ``enable_thinking``);  ``tools``: in
        OpenAI's format, for a template that supports them.  ``ValueError`` if there is no
        template, it refuses the messages, or it would ignore a message, a field or an option.
        """
        if not self.exists:
            raise ValueError("this model has no chat template")
        self.check_options(options or {})
        rendering = Rendering(self, messages, generate, options or {}, tools)
        return rendering.ids()

    def text(self, messages: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The text of a finished conversation; ``ValueError`` as in ``ids``."""
        return Rendering(self, messages, False, {}, tools).text()

    def check_options(self, options: Mapping[str, Any]) -> None:
        """``ValueError`` for an option that the template never reads."""
        if options and not self.exists:
            raise ValueError("chat_template_kwargs: this model has no chat template")
        for name in options:
            if name in OWN_NAMES:
                raise ValueError(f"chat_template_kwargs: {name!r} cannot be set this way")
            if name not in self.names:
                can = ", ".join(sorted(self.names - OWN_NAMES)) or "no name"
                raise ValueError(
                    f"chat_template_kwargs: this model's chat template never reads {name!r:.60} "
                    f"(it reads: {can})"
                )

    @cached_property
    def source(self) -> str:
        source: str = self.tokenizer.get_chat_template()
        return source

    @cached_property
    def names(self) -> frozenset[str]:
        """Names that the template reads from outside."""
        from jinja2 import Environment, meta

        place = Environment(extensions=["jinja2.ext.loopcontrols"])
        # transformers' tag around an assistant's text
        plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", self.source)
        return frozenset(meta.find_undeclared_variables(place.parse(plain)))

    @cached_property
    def turn_end(self) -> int | None:
        """The token right after an assistant's text, if the template has one there."""
        talk = [{"role": role, "content": MARK.format(role)} for role in ("user", "assistant")]
        try:
            text = self.text(talk)
        except Exception:  # a template raises what it likes
            return None
        _, said, rest = text.rpartition(MARK.format("assistant"))
        rest = rest.lstrip()
        found = [token for token in added_tokens(self.tokenizer) if said and rest.startswith(token)]
        return added_tokens(self.tokenizer)[max(found, key=len)] if found else None


class Rendering:
    """The rendering of one conversation by a template."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Turn],
        generate: bool,
        options: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self.template, self.given = template, messages
        self.generate, self.options, self.tools = generate, options, tools
        renames = not re.search(r"""["']developer["']""", template.source)
        self.turns = [
            {**each, "role": "system"} if renames and each["role"] == "developer" else {**each}
            for each in messages
        ]
        self.parts: frozenset[int] = frozenset()  # messages whose content is passed as a part

    def ids(self) -> TokenIds:
        self._find_places()
        ids: TokenIds = self._apply(self.turns, tokenize=True)
        return ids

    def text(self) -> str:
        self._find_places()
        return self._rendered(self.turns)

    def _apply(self, turns: list[Turn], tokenize: bool) -> Any:
        forms: list[dict[str, Any]] = [
            {**turn, "content": [{"type": "text", "text": turn["content"]}]}
            if index in self.parts
            else turn
            for index, turn in enumerate(turns)
        ]
        try:
            return self.template.tokenizer.apply_chat_template(
                forms,
                add_generation_prompt=self.generate,
                tokenize=tokenize,
                return_dict=False,
                tools=list(self.tools) or None,
                **self.options,
            )
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"the chat template refuses these messages: {error}") from None

    def _rendered(self, turns: list[Turn]) -> str:
        text: str = self._apply(turns, tokenize=False)
        return text

    def _find_places(self) -> None:
        """Choose the form of contents; ``ValueError`` for a text that the template does not use.

        Each text is replaced by a unique mark that is searched in the result, so the time does not
        depend on the length of texts.  Tool calls are not replaced; the call id of a tool's answer
        only identifies its call and need not appear.
        """
        calls = any("tool_calls" in turn for turn in self.turns)
        fields = [
            Field(index, key)
            for index, turn in enumerate(self.turns)
            for key, text in turn.items()
            if key not in ("role", "tool_calls") and text.strip()
            if key != REASONING or REASONING not in self.template.source
            if key == "content" or turn["role"] != "tool" or not calls
        ]
        marked = [dict(turn) for turn in self.turns]
        for number, (index, key) in enumerate(fields):
            marked[index][key] = MARK.format(number)
        lost = self._lost(marked, fields)
        if lost is None or any(key == "content" for _, key in lost):
            among = fields if lost is None else lost
            self.parts = frozenset(index for index, key in among if key == "content")
            left = self._lost(marked, fields)
            if left is None or (lost is not None and len(left) >= len(lost)):
                self.parts = frozenset()
            else:
                lost = left
        for field in (lost or [])[:DOUBTED]:
            if not self._matters(field):
                raise ValueError(self._nowhere(field))

    def _lost(self, marked: list[Turn], fields: list[Field]) -> list[Field] | None:
        """Fields whose marks are missing in the result; None if the template refuses the marks."""
        try:
            text = self._rendered(marked)
        except ValueError:
            return None
        found = {int(number) for number in MARKED.findall(text)}
        return [field for number, field in enumerate(fields) if number not in found]

    def _matters(self, field: Field) -> bool:
        """Whether the prompt depends on the field's own text."""
        other = [dict(turn) for turn in self.turns]
        other[field.turn][field.key] += MARK.format(0)
        try:
            return self._rendered(self.turns) != self._rendered(other)
        except ValueError:
            return True  # not ignored; the unchanged messages decide

    def _nowhere(self, field: Field) -> str:
        index, key = field
        role = self.given[index]["role"]
        if key == "content":
            return (
                f"messages[{index}]: this model's chat template ignores a message of role "
                f"{role!r} there; omit it, or give it another role"
            )
        return (
            f"messages[{index}].{key}: this model's chat template has no place for it, so it "
            f"would be ignored; leave it out"
        )


def find_end_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer according to the tokenizer: its end token, and the end of a turn in
    its chat template."""
    template, eos = ChatTemplate(tokenizer), getattr(tokenizer, "eos_token_id", None)
    ends = (eos, template.turn_end if template.exists else None)
    return frozenset(end for end in ends if end is not None)
