"""Fields shared by request bodies, with strict checks."""

from __future__ import annotations

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
    "CacheSalt",
    "Compression",
    "Generation",
    "JsonSchema",
    "Pin",
    "Prompt",
    "ResponseFormat",
    "StreamOptions",
    "Strict",
    "StructuredOutputs",
    "TokenId",
]

# Validation of a list stops at its first error: a body may contain a million errors.
TokenId = Annotated[int, Field(ge=0)]
TokenList = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[str], Field(min_length=1, fail_fast=True)]
TokenLists = Annotated[list[TokenList], Field(min_length=1, fail_fast=True)]

MANY = 16  # maximum number of unknown names in an error
MANY_BIASES = 1024
#: Longest time that a cache can be pinned: a week.
MOST_SECONDS = 7 * 24 * 3600


def _kind(prompt: Any) -> str:
    """The intended type of a prompt, by its first item."""
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
    """Unknown names, wrong types, NaN and infinity are errors.

    Null values, and unknown names with an empty list, are ignored, because clients send those for
    unset fields.
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

    ``policy``: a method's name (default: the server's);  ``keep``: the share of entries to keep;
    ``reuse``: reuse and hold a conversation's cache;  ``kv_dtype``: how keys and values are
    stored, which must be the server's;  ``lossless``: keep everything, and let the policy choose
    the entries that drafts read (default: as the server);  ``prefix``: the number of ``messages``,
    or of a ``prompt``'s characters or token ids, that are prefilled and compressed alone, and held
    for requests that begin with the same prefix.
    """

    policy: str | None = None
    keep: Annotated[float, Field(gt=0, le=1)] | None = None
    reuse: bool = True
    kv_dtype: str | None = None
    lossless: bool | None = None
    prefix: Annotated[int, Field(ge=1)] | None = None


class Pin(Strict):
    """``POST /v1/caches/{id}/pin``: the number of seconds for which a cache is not dropped."""

    ttl: Annotated[float, Field(gt=0, le=MOST_SECONDS)]


class StreamOptions(Strict):
    """``include_usage``: the last chunk has the usage, and with ``continuous_usage_stats`` every
    chunk has it;  ``include_kv``: every chunk has the number of tokens that each layer keeps."""

    include_usage: bool = False
    include_kv: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Strict):
    """OpenAI's ``json_schema``; the schema itself may have any fields."""

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
            raise ValueError("json_schema needs type 'json_schema'")
        return self


class StructuredOutputs(Strict):
    """vLLM's: a JSON schema, a regular expression, texts to choose from, a grammar (Lark's notation
    or GBNF), or any JSON object; one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Texts | None = None
    grammar: str | None = None
    json_object: bool | None = None


CacheSalt = Annotated[str, Field(min_length=1)] | None


class Generation(Strict):
    """Fields of both endpoints."""

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
    # vLLM's extra fields
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
    cache_salt: CacheSalt = None
    # vLLM's names before structured_outputs
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Texts | None = None
    guided_grammar: str | None = None
    # our own fields
    compression: Compression | None = None

    @model_validator(mode="before")
    @classmethod
    def bounded(cls, given: Any) -> Any:
        biases = given.get("logit_bias") if isinstance(given, dict) else None
        if isinstance(biases, dict) and len(biases) > MANY_BIASES:
            raise ValueError(f"logit_bias: {len(biases)} tokens; at most {MANY_BIASES} are allowed")
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
            raise ValueError(
                f"{' and '.join(forms)}: an answer has one constraint; set one of them"
            )
        return self

    @property
    def forms(self) -> dict[str, dict[str, Any]]:
        """Fields that constrain the answer, with arguments of ``StructuredOutputsParams``."""
        found = {
            f"guided_{kind}": {kind: getattr(self, f"guided_{kind}")}
            for kind in ("json", "regex", "choice", "grammar")
            if getattr(self, f"guided_{kind}") is not None
        }
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs.model_dump(by_alias=True)
        return found
