"""Sampling parameters and structured outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pyramidinfer.config import is_number, named_options

__all__ = ["SamplingParams", "StructuredOutputsParams"]


@named_options
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The required form of an answer.  Give exactly one of the first five.

    json : a JSON schema, as a dict or a text.
    regex : a regular expression that the whole answer matches.
    choice : a list of texts; the answer is one of them.
    grammar : a grammar in Lark's notation or in GBNF (``root ::= …``).
    json_object : True for any JSON object.
    think : two tags; the model may generate any text between them before the structured answer.
        The first is empty if the prompt ends with it; the model must then generate the second.

    ``ValueError`` for none or several of the five, and for values of another type.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    think: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        forms = [name for name in self.__slots__ if name != "think"]
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        if self.think is not None and (len(self.think) != 2 or not self.think[1]):
            raise ValueError(f"structured_outputs: think={self.think!r:.60} must be two tags")
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: give one of {', '.join(forms)} (given: "
                f"{', '.join(given) or 'none'})"
            )
        choice = [] if self.choice is None else self.choice
        texts = [*choice] if isinstance(choice, list | tuple) else [None]
        schema = json.dumps(self.json) if isinstance(self.json, dict) else self.json
        for name, value in (("json", schema), ("regex", self.regex), ("grammar", self.grammar)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"structured_outputs: {name}={value!r:.60} must be a text")
        if (self.choice is not None and not texts) or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"structured_outputs: choice={choice!r:.60} must be a list of texts")
        if self.json_object not in (None, True, False):
            raise ValueError(
                f"structured_outputs: json_object={self.json_object!r:.60} must be True or False"
            )
        for text in filter(None, (schema, self.regex, self.grammar, *texts)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"structured_outputs: {text!r:.60}: {error}") from None
        object.__setattr__(self, "json", schema)
        object.__setattr__(self, "choice", tuple(texts) or None)


@named_options
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are sampled.

    max_tokens : the largest number of tokens to generate.
    temperature : 0, or any value below 0.00001, is greedy.
    top_p, top_k, min_p : filters; ``top_p=1``, ``top_k=0`` and ``min_p=0`` switch them off.
        ``top_p=0`` keeps only the most likely token.
    repetition_penalty, presence_penalty, frequency_penalty : 1, 0 and 0 have no effect.
    seed : makes the samples of a request reproducible.
    stop : texts that end the answer.
    stop_token_ids : token ids that end the answer.
    ignore_eos : continue after an end token.
    logprobs : *k* returns the log-probabilities of each generated token and of the *k* most likely
        ones, before any filter.
    logit_bias : token id → number added to its logit, between -100 and 100.
    min_tokens : the number of tokens before an end token, a stop id or a stop string may end the
        answer (unless ``structured_outputs`` allows only the end).
    skip_special_tokens : False includes special tokens in the text.
    prompt_logprobs : *k*, as ``logprobs``, for the tokens of the prompt.
    structured_outputs : the required form of the answer.

    ``ValueError`` for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    stop_token_ids: tuple[int, ...] | list[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] | tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        try:
            bias = dict(self.logit_bias)
        except (TypeError, ValueError):
            raise ValueError(
                f"logit_bias={self.logit_bias!r:.60} must map token ids to numbers"
            ) from None
        for token, amount in bias.items():
            if type(token) is not int or token < 0:
                raise ValueError(f"logit_bias: {token!r} is not a token id")
            if not is_number(amount) or not -100 <= amount <= 100:
                raise ValueError(
                    f"logit_bias of token {token}: {amount!r} must lie between -100 and 100"
                )
        object.__setattr__(self, "logit_bias", tuple(sorted(bias.items())))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        for name, value in (("stop", stop), ("stop_token_ids", self.stop_token_ids)):
            if not isinstance(value, list | tuple):
                raise ValueError(f"{name}={value!r} must be a list")
        stop = tuple(stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        form = self.structured_outputs
        if not isinstance(form, StructuredOutputsParams | None):
            raise ValueError(f"structured_outputs={form!r:.60} must be StructuredOutputsParams")
        for name, low, high in (
            ("temperature", 0.0, 1e3),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 1e3),
            ("presence_penalty", -1e3, 1e3),
            ("frequency_penalty", -1e3, 1e3),
        ):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must lie between {low:g} and {high:g}")
        for name, least, most in (
            ("max_tokens", 1, 2**31),
            ("top_k", 0, 2**31),
            ("logprobs", 0, 1000),
            ("seed", -(2**63), 2**64 - 1),
            ("min_tokens", 0, 2**31),
            ("prompt_logprobs", 0, 1000),
        ):
            value = getattr(self, name)
            if value is None and name in ("logprobs", "prompt_logprobs", "seed"):
                continue
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{name}={value!r} must be a whole number between {least} and {most}"
                )
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r}: a stop string must be a text that is not empty")
        for token in self.stop_token_ids:
            if type(token) is not int or token < 0:
                raise ValueError(f"stop_token_ids: {token!r} is not a token id")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken.  At so low a temperature no other token
        is sampled, and logits divided by it may overflow."""
        return self.temperature < 1e-5
