"""Bodies of ``/v1/responses``: OpenAI's Responses API for text and functions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from pyramidinfer.server.protocol import MANY_TOOLS, Effort, FunctionCalled, FunctionName
from pyramidinfer.server.protocol_base import CacheSalt, Compression, Strict

__all__ = [
    "FunctionCallItem",
    "FunctionOutputItem",
    "Item",
    "MessageItem",
    "ReasoningItem",
    "ResponseRequest",
    "read_items",
]

LOGPROBS = "message.output_text.logprobs"
Status = Literal["in_progress", "completed", "incomplete"]
Include = Literal["message.output_text.logprobs"]
Id = Annotated[str, Field(min_length=1, max_length=200)]


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    """Text of the model from an earlier turn; its log-probabilities are ignored."""

    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class ReasoningText(Strict):
    type: Literal["reasoning_text"]
    text: str


def _tag(part: Any) -> str:
    """The type of a part or an item, in brackets to tell it from field names (see ``app``)."""
    kind = (
        part.get("type", "message") if isinstance(part, dict) else getattr(part, "type", "message")
    )
    return f"({kind})"


TextPart = Annotated[
    Annotated[InputText, Tag("(input_text)")] | Annotated[OutputText, Tag("(output_text)")],
    Discriminator(_tag),
]


def _is_text(given: Any) -> str:
    return "(text)" if isinstance(given, str) else "(list)"


Content = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[TextPart], Field(fail_fast=True, min_length=1), Tag("(list)")],
    Discriminator(_is_text),
]


def _text(content: str | list[Any]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


class MessageItem(Strict):
    """A message of the user, system, developer or assistant."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return _text(self.content)


class FunctionCallItem(FunctionCalled):
    """A call that the model made."""

    type: Literal["function_call"]
    call_id: Id
    id: Id | None = None
    status: Status | None = None


class FunctionOutputItem(Strict):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content
    id: Id | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return _text(self.output)


class ReasoningItem(Strict):
    """The model's reasoning before the next item."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Annotated[list[Any], Field(max_length=0)] | None = None
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return _text(self.content or "")


Item = MessageItem | FunctionCallItem | FunctionOutputItem | ReasoningItem
TaggedItem = Annotated[
    Annotated[MessageItem, Tag("(message)")]
    | Annotated[FunctionCallItem, Tag("(function_call)")]
    | Annotated[FunctionOutputItem, Tag("(function_call_output)")]
    | Annotated[ReasoningItem, Tag("(reasoning)")],
    Discriminator(_tag),
]
Input = Annotated[
    Annotated[str, Tag("(text)")]
    | Annotated[list[TaggedItem], Field(min_length=1, fail_fast=True), Tag("(list)")],
    Discriminator(_is_text),
]
ITEMS: TypeAdapter[list[Item]] = TypeAdapter(list[TaggedItem])


def read_items(items: list[dict[str, Any]]) -> list[Item]:
    """Output items as input items."""
    return ITEMS.validate_python(items)


class TextFormat(Strict):
    """``text``, ``json_object`` (any object) or ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    description: str | None = None

    @model_validator(mode="after")
    def has_schema(self) -> TextFormat:
        if self.type == "json_schema" and (self.schema_ is None or self.name is None):
            raise ValueError("type 'json_schema' needs name and schema")
        extra = self.model_fields_set - {"type"}
        if self.type != "json_schema" and extra:
            raise ValueError(f"{min(extra).rstrip('_')} belongs to type 'json_schema'")
        return self


class TextConfig(Strict):
    format: TextFormat | None = None


class Reasoning(Strict):
    effort: Effort | None = None


class FunctionTool(Strict):
    """A function that the model may call; ``parameters``: a JSON schema of its arguments."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChosen(Strict):
    type: Literal["function"]
    name: FunctionName


class FunctionsAllowed(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[FunctionChosen], Field(min_length=1, max_length=MANY_TOOLS)]


def _choice(given: Any) -> str:
    if isinstance(given, str):
        return "(word)"
    kind = given.get("type") if isinstance(given, dict) else getattr(given, "type", None)
    return "(some)" if kind == "allowed_tools" else "(one)"


Choice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")]
    | Annotated[FunctionChosen, Tag("(one)")]
    | Annotated[FunctionsAllowed, Tag("(some)")],
    Discriminator(_choice),
]


class ObfuscationOption(Strict):
    include_obfuscation: Literal[False] = False


class ResponseRequest(Strict):
    """``POST /v1/responses``."""

    model: str | None = None
    input: Input
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    stream: bool | None = None
    stream_options: ObfuscationOption | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=8)] | None
    ) = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MANY_TOOLS, fail_fast=True)] | None = None
    tool_choice: Choice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    # accepted because clients send them; without effect
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    # our own fields
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: CacheSalt = None
    compression: Compression | None = None

    @model_validator(mode="after")
    def consistent(self) -> ResponseRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        return self

    @property
    def items(self) -> list[Item]:
        """The new items of the conversation."""
        if isinstance(self.input, str):
            return [MessageItem(role="user", content=self.input)]
        return list(self.input)

    @property
    def wants_logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or ())
