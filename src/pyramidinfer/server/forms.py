"""Constraints of answers, their parsers, and the chat template's reasoning settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import ChatRequest, TokenizeRequest, ToolNamed
from pyramidinfer.server.protocol_base import Generation
from pyramidinfer.server.settings import ServerSettings
from pyramidinfer.server.tool_calls import AnswerReader, ToolReader
from pyramidinfer.server.tool_formats import grammar_of
from pyramidinfer.types import StructuredOutputsParams, TokenIds

__all__ = ["Forms", "limit", "param_of", "plain_reader"]


def limit(param: str, value: int, most: int, what: str, code: str | None = None) -> None:
    """``ApiError`` if a value is above the server's limit."""
    if value > most:
        raise ApiError(
            400,
            f"{param}: {value} {what} asked for; this server allows {most} at most",
            param=param,
            code=code,
        )


def param_of(body: Generation) -> str | None:
    """The field that constrains the answer."""
    if isinstance(body, ChatRequest) and body.calls_tools:
        return "tools"
    return next(iter(body.forms), None)


def plain_reader() -> AnswerReader:
    """A reader that treats the whole answer as text."""
    return AnswerReader(None, None)


class Forms:
    """Constraints and parsers of one model's answers; ``ApiError`` or ``ValueError`` for
    unsupported requests."""

    def __init__(self, prompts: Prompts, settings: ServerSettings) -> None:
        self.prompts, self.settings = prompts, settings

    def reader(self, body: ChatRequest, prompt: TokenIds) -> Callable[[], AnswerReader]:
        """A function that creates a reader, for each choice of a chat."""
        thoughts = self.prompts.thinking.reader(prompt)
        format, several = self.prompts.tool_prompt.format, self._several(body)
        names = body.choosable or [each.function.name for each in body.tools or ()]

        def made() -> AnswerReader:
            calls = ToolReader(format, names, several) if body.calls_tools else None
            return AnswerReader(thoughts() if thoughts else None, calls)

        return made

    def _several(self, body: ChatRequest) -> bool:
        """Whether the answer may hold more than one call."""
        one = isinstance(body.tool_choice, ToolNamed) or body.parallel_tool_calls is False
        return not one and self.prompts.tool_prompt.several

    def effort(
        self, body: ChatRequest | TokenizeRequest, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the chat template for the reasoning effort."""
        effort = body.reasoning_effort if isinstance(body, ChatRequest) else None
        if effort is None:
            return {}
        try:
            found = self.prompts.thinking.options(effort)
        except ValueError as error:
            raise ApiError(400, str(error), param="reasoning_effort") from None
        if twice := found.keys() & options.keys():
            raise ApiError(
                400,
                f"reasoning_effort and chat_template_kwargs both set {min(twice)!r}: set one",
                param="reasoning_effort",
            )
        return found

    def reads_marks(self, body: Generation) -> bool:
        """Whether the text needs special tokens, so that reasoning and calls are found."""
        if not isinstance(body, ChatRequest):
            return False
        calls = body.calls_tools and self.prompts.special_marks
        return calls or self.prompts.thinking.is_special

    def _calls(self, body: ChatRequest) -> StructuredOutputsParams | None:
        """The constraint of an answer with calls; None if calls need not be valid.  They must be
        valid if a call is required, if functions are ``strict`` or named by ``tool_choice``, or
        if an answer without calls has a constraint."""
        tools = [each.function for each in body.tools or ()]
        callable = [each for each in tools if each.name in (body.choosable or [each.name])]
        form = next(iter(body.forms.values()), None)
        strict = any(each.strict for each in callable)
        if not body.must_call and not strict and form is None and body.choosable is None:
            return None
        schema = None if form is None else form.get("json") or {"type": "object"}
        functions = [(each.name, each.parameters) for each in callable]
        size = sum(len(json.dumps(each)) for each in (functions, schema))
        limit("tools", size, self.settings.max_schema_bytes, "bytes")
        return StructuredOutputsParams(
            grammar=grammar_of(
                self.prompts.tool_prompt.format,
                functions,
                several=self._several(body),
                must=body.must_call,
                schema=schema,
                added=self.prompts.added,
            )
        )

    def form(self, body: Generation, prompt: TokenIds) -> StructuredOutputsParams | None:
        """The constraint of the answer; in a chat it applies after the reasoning."""
        form = self._of_body(body)
        if form is None or not isinstance(body, ChatRequest):
            return form
        return replace(form, think=self.prompts.thinking.before_form(prompt))

    def _of_body(self, body: Generation) -> StructuredOutputsParams | None:
        if isinstance(body, ChatRequest) and body.calls_tools:
            return self._calls(body)
        for param, options in body.forms.items():
            try:
                form = StructuredOutputsParams(**options)
            except ValueError as error:
                raise ApiError(400, str(error), param=param) from None
            texts = (form.json, form.regex, form.grammar, *(form.choice or ()))
            size = sum(len(text.encode()) for text in texts if text is not None)
            limit(param, size, self.settings.max_schema_bytes, "bytes")
            return form
        return None
