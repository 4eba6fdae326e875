"""Bodies of requests: OpenAI's fields, vLLM's extras and ours, checked strictly."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "Compression",
    "Detokenize",
    "Function",
    "Generation",
    "Message",
    "Pin",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "TokenizeRequest",
    "Tool",
    "ToolCall",
    "ToolNamed",
]

# Lists end at their first error: a body may hold a million of them.
TokenId = Annotated[int, Field(ge=0)]
TokenList = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, fail_fast=True)]

MANY = 16  # unknown names that are told of, at most
MANY_BIASES = 1024
MANY_TOOLS = 128
#: For how long a cache can be pinned: a week.
MOST_SECONDS = 7 * 24 * 3600


def _kind(prompt: Any) -> str:
    """What a prompt is meant to be, by its first item."""
    first = prompt[0] if isinstance(prompt, list) and prompt else None
    if isinstance(prompt, str):
        return "text"
    return "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "tokens"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Texts, Tag("texts")]
    | Annotated[TokenList, Tag("tokens")]
    | Annotated[TokenLists, Tag("lists")],
    Discriminator(_kind),
]


class Strict(BaseModel):
    """Unknown names and other types are errors; so are NaN and infinity.

    A name that says nothing (null; an unknown one with an empty list) is passed over: clients send
    those for what is not set.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def says_something(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        given = {name: value for name, value in given.items() if value is not None}
        strange = [k for k, v in given.items() if k not in known and v != []][:MANY]
        return {k: v for k, v in given.items() if k in known or k in strange}


class Compression(Strict):
    """What to keep for this request, within the operator's limits.

    ``policy``: a method's name (the server's own by default);  ``keep``: the common budget;
    ``reuse``: take up and leave a conversation's cache;  ``kv_dtype``: how keys and values are
    stored, which must be the server's;  ``lossless``: keep everything, and let the policy choose
    what is read to guess tokens ahead (as the server does by default);  ``prefix``: how many of
    ``messages``, or of a ``prompt``'s characters or token ids, are taken in and compressed alone,
    and held for requests that begin with the same.
    """

    policy: str | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    reuse: bool = True
    kv_dtype: str | None = None
    lossless: bool | None = None
    prefix: Annotated[int, Field(ge=1)] | None = None


class Pin(Strict):
    """``POST /v1/caches/{id}/pin``: for how many seconds a cache must not be dropped."""

    ttl: Annotated[float, Field(gt=0, le=MOST_SECONDS)]


class StreamOptions(Strict):
    """``include_usage``: a last chunk tells the usage, and with ``continuous_usage_stats`` every
    chunk does;  ``include_kv``: every chunk tells how many tokens each layer keeps."""

    include_usage: bool = False
    include_kv: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """OpenAI's ``json_schema``; the schema itself is what it is."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """``text``, ``json_object`` (any object) or ``json_schema``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type 'json_schema', and to no other")
        return self


class StructuredOutputs(Strict):
    """vLLM's: a JSON schema, a regular expression, texts to choose from, a grammar (Lark's notation
    or GBNF), or any JSON object; one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generation(Strict):
    """What both endpoints take."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: str | None = None
    # what vLLM takes besides
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=1000)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0)] | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    # what structured_outputs was before
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    # ours
    compression: Compression | None = None

    @model_validator(mode="before")
    @classmethod
    def bounded(cls, given: Any) -> Any:
        biases = given.get("logit_bias") if isinstance(given, dict) else None
        if isinstance(biases, dict) and len(biases) > MANY_BIASES:
            raise ValueError(f"logit_bias: {len(biases)} tokens; {MANY_BIASES} are taken at most")
        return given

    @model_validator(mode="after")
    def streams(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream=true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs are not available with stream=true")
        return self

    @model_validator(mode="after")
    def has_one_form(self) -> Generation:
        if len(forms := self.forms) > 1:
            raise ValueError(f"{' and '.join(forms)}: an answer has one form; give one of them")
        return self

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """Fields that say what form the answer has, and what as ``StructuredOutputsParams``."""
        found = {
            f"guided_{kind}": {kind: getattr(self, f"guided_{kind}")}
            for kind in ("json", "regex", "choice", "grammar")
            if getattr(self, f"guided_{kind}") is not None
        }
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True)
        return found


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
            raise ValueError("max_tokens=0 makes sense with echo=true or prompt_logprobs only")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        return self


class TextPart(Strict):
    """A part of a message's content; only text is understood."""

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
    """``arguments``: a JSON object, as a text."""

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
    """A call that the model made."""

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: FunctionCalled


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def says_or_is_said(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls are an assistant's; a message of the role {self.role}")
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
        """What the chat template gets: the role, the text, and further fields that are given."""
        further = self.model_dump(include={"name", "refusal", "tool_call_id"}, exclude_none=True)
        if self.tool_calls:
            further["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        return {"role": self.role, "content": self.text, **further}


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
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # taken for the sake of clients that send them; they change nothing
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
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
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
        """Names of the functions that may be called, where ``tool_choice`` names them."""
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
        """Whether the answer may hold calls."""
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
    """``ValueError`` for two functions of one name."""
    names = [each.function.name for each in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tools: there are two functions {name!r}")


class TokenizeRequest(Strict):
    """``POST /tokenize``: a text, or messages as the chat template puts them."""

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
                raise ValueError(f"{name} is for messages; leave it out beside prompt")
        if self.prompt is None and "add_special_tokens" in given and self.add_special_tokens:
            raise ValueError("add_special_tokens is for prompt: the chat template puts its own")
        return self


class Detokenize(Strict):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
