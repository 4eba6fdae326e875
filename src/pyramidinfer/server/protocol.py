"""Request bodies: OpenAI's fields, vLLM's extra fields and ours; the parts of a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from pyramidinfer.server.protocol_base import Generation, Prompt, ResponseFormat, Strict, TokenId

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Detokenize",
    "Function",
    "Message",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
    "ToolNamed",
]

MANY_TOOLS = 128


class CompletionRequest(Generation):
    """``POST /v1/completions``."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    logprobs: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def consistent(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported: leave it out")
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise ValueError("max_tokens=0 needs echo=true or prompt_logprobs")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self


class TextPart(Strict):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: str


FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Function(Strict):
    """A function that the model may call; ``parameters``: a JSON schema of its arguments."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """OpenAI's ``tools``: functions only."""

    type: Literal["function"]
    function: Function


class FunctionNamed(Strict):
    name: FunctionName


class ToolNamed(Strict):
    """``tool_choice``: this function."""

    type: Literal["function"]
    function: FunctionNamed


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[ToolNamed], Field(min_length=1, max_length=MANY_TOOLS)]


class ToolsAllowed(Strict):
    """``tool_choice``: some of the functions."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_kind(choice: Any) -> str:
    if not isinstance(choice, dict):
        return "word"
    return "some" if choice.get("type") == "allowed_tools" else "one"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("word")]
    | Annotated[ToolNamed, Tag("one")]
    | Annotated[ToolsAllowed, Tag("some")],
    Discriminator(_choice_kind),
]
Tools = Annotated[list[Tool], Field(max_length=MANY_TOOLS, fail_fast=True)]


class FunctionCalled(Strict):
    """``arguments``: a JSON object as a string."""

    name: str
    arguments: str

    @model_validator(mode="after")
    def has_arguments(self) -> FunctionCalled:
        try:
            is_object = isinstance(json.loads(self.arguments), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            given = f"{self.arguments!r:.60}"
            raise ValueError(f"arguments must be a JSON object as a text, not {given}")
        return self


class ToolCall(Strict):
    """A call by the model."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: FunctionCalled


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def says_or_is_said(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are an assistant's; a message of the role {self.role}")
        if self.reasoning_content is not None and self.role != "assistant":
            raise ValueError(f"reasoning_content is an assistant's; a message of role {self.role}")
        if self.role != "assistant" and not self.content and self.content != "":
            raise ValueError(f"a message of the role {self.role} needs content: a text, or parts")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    @property
    def turn(self) -> dict[str, Any]:
        """The message for the chat template: role, text, and further fields that are set."""
        texts = {"name", "refusal", "tool_call_id", "reasoning_content"}
        further = self.model_dump(include=texts, exclude_none=True)
        if self.tool_calls:
            further["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return {"role": self.role, "content": self.text, **further}


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class ChatRequest(Generation):
    """``POST /v1/chat/completions``."""

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # accepted because clients send them; without effect
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ: set one of them")
        most = self.max_completion_tokens or self.max_tokens
        if most is not None and self.min_tokens > most:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={most}")
        return self

    @model_validator(mode="after")
    def calls(self) -> ChatRequest:
        check_tools(self.tools or [])
        names = {each.function.name for each in self.tools or ()}
        for name in self.choosable or ():
            if name not in names:
                known = f"tools has {', '.join(sorted(names))}" if names else "there are no tools"
                raise ValueError(f"tool_choice: {name!r} is no function here; {known:.300}")
        if self.must_call and not names:
            raise ValueError("tool_choice='required' needs tools")
        if self.calls_tools and (forms := self.forms):
            name, form = next(iter(forms.items()))
            if self.must_call:
                raise ValueError(
                    f"{name}: with this tool_choice the answer is a call, so it would have no "
                    f"effect; leave it out"
                )
            if not form.keys() <= {"json", "json_object"} or isinstance(form.get("json"), str):
                raise ValueError(
                    f"{name}: beside tools an answer's form can be a JSON schema (an object, in "
                    f"response_format) and no other; or send tool_choice='none'"
                )
        return self

    @property
    def choosable(self) -> list[str] | None:
        """Names of the functions that may be called, if ``tool_choice`` names them."""
        choice = self.tool_choice
        if isinstance(choice, ToolNamed):
            return [choice.function.name]
        if isinstance(choice, ToolsAllowed):
            return [each.function.name for each in choice.allowed_tools.tools]
        return None

    @property
    def must_call(self) -> bool:
        choice = self.tool_choice
        if isinstance(choice, ToolsAllowed):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, ToolNamed)

    @property
    def calls_tools(self) -> bool:
        """Whether the answer may contain calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        found, wanted = super().forms, self.response_format
        if wanted is not None and wanted.json_schema is not None:
            found["response_format"] = {"json": wanted.json_schema.schema_}
        elif wanted is not None and wanted.type == "json_object":
            found["response_format"] = {"json_object": True}
        return found


def check_tools(tools: list[Tool]) -> None:
    """``ValueError`` for two functions with the same name."""
    names = [each.function.name for each in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tools: there are two functions {name!r}")


class TokenizeRequest(Strict):
    """``POST /tokenize``: a text, or messages under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages, one of them")
        given = self.model_fields_set
        check_tools(self.tools or [])
        for name in given & {"add_generation_prompt", "chat_template_kwargs", "tools"}:
            if self.messages is None:
                raise ValueError(f"{name} is for messages; leave it out with prompt")
        if self.prompt is None and "add_special_tokens" in given and self.add_special_tokens:
            raise ValueError("add_special_tokens is for prompt: the chat template puts its own")
        return self


class Detokenize(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
