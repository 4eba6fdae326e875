"""Request bodies to engine requests: policy, prompts, parameters, limits."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from pyramidinfer.config import check_choice
from pyramidinfer.engine import LLM
from pyramidinfer.engine.checks import ContextLengthError, check_prompt_logprobs
from pyramidinfer.engine.grammar import GrammarError
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import POLICIES, Policy, Profile, choose_policy, make_policy
from pyramidinfer.policies.lossless import DRAFT_KEEP
from pyramidinfer.server.errors import ApiError
from pyramidinfer.server.forms import Forms, limit, param_of, plain_reader
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import (
    ChatRequest,
    CompletionRequest,
    Detokenize,
    Message,
    TokenizeRequest,
    Tool,
)
from pyramidinfer.server.protocol_base import Compression, Generation
from pyramidinfer.server.settings import ServerSettings
from pyramidinfer.server.tool_calls import AnswerReader, check_calls
from pyramidinfer.types import SamplingParams, StructuredOutputsParams, TokenIds

__all__ = ["Job", "Jobs"]

MAX_STOP_LENGTH = 1000
#: Assumed maximum number of characters per token if the tokenizer sets no bound.
LONGEST_TOKEN = 256
#: Texts that differ in their first token under every tokenizer.
OTHER_TEXTS = ("the", "A", "\u4e16")
#: For requests without ``max_tokens``, if neither the operator nor the model sets a default.
MAX_TOKENS = 256


@dataclass(slots=True)
class Job:
    """One HTTP request for the engine.

    ``leaders``: a request per prompt (further choices are its samples);  ``echoed``: the text
    before the answers to each prompt;  ``drop``: no tokens were requested;  ``reader``: creates the
    parser that splits a chat's answer into reasoning, text and tool calls.
    """

    body: ChatRequest | CompletionRequest
    leaders: list[Request]
    echoed: list[str] = field(default_factory=list)
    drop: bool = False
    reader: Callable[[], AnswerReader] = plain_reader
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = ""

    def __post_init__(self) -> None:
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        self.id = f"{prefix}-{uuid.uuid4().hex}"

    @property
    def is_chat(self) -> bool:
        return isinstance(self.body, ChatRequest)


class Jobs:
    """Builds jobs; ``ApiError`` or ``ValueError`` for what cannot be served."""

    def __init__(self, llm: LLM, settings: ServerSettings, prompts: Prompts) -> None:
        self.llm, self.settings, self.prompts = llm, settings, prompts
        self.engine, self.own = llm.engine, llm.policy
        self.forms = Forms(prompts, settings)
        self.lossless = self.own.guesses
        #: Chooses the entries to keep or, on a lossless server, those that drafts read.
        self.base = self.own.chooser
        self.defaults = llm.sampling_defaults if settings.generation_config == "auto" else {}
        self.refused: dict[str, str] = {}  # policies that cannot be served, and why
        self.served = self._policies()
        self.policies = list(self.served)
        self._made = lru_cache(256)(self._make_policy)

    @property
    def own_keep(self) -> float | None:
        """The keep of the server's policy (None if it has none)."""
        return getattr(self.base, "keep", None)

    @property
    def may_keep_all(self) -> bool:
        """Whether a request may keep everything, as lossless requests do."""
        return self.own.keeps_all or "full" in self.policies

    def chat(self, body: ChatRequest, owner: str | None) -> Job:
        self._check_messages(body.messages, body.tools)
        prompt = self._checked(self._rendered(body), "messages")
        wanted = body.max_completion_tokens or body.max_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        prefix = self._prefix(
            body.compression,
            prompt,
            len(body.messages),
            partial(self._rendered_with, body),
            "messages",
        )
        leader = self._request(body, prompt, wanted, top, owner, prefix)
        return Job(body, [leader], reader=self.forms.reader(body, prompt))

    def completion(self, body: CompletionRequest, owner: str | None) -> Job:
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        prompts = [given] if isinstance(given[0], int) else given
        limit("n", len(prompts) * (body.n or 1), self.settings.max_n, "choices (prompts x n)")
        drop = body.max_tokens == 0
        leaders, echoed = [], []
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(prompt, "prompt")
                ids = self.prompts.encode(prompt, body.add_special_tokens)
            else:
                ids = prompt
            self._checked(ids, "prompt")
            prefix = self._prefix(
                body.compression,
                ids,
                len(prompt),
                partial(self._encoded_with, body, prompt),
                "prompt",
            )
            leader = self._request(
                body, ids, body.max_tokens or int(drop) or None, body.logprobs, owner, prefix
            )
            if body.echo:
                echoed.append(prompt if isinstance(prompt, str) else self.prompts.decode(ids))
            leaders.append(leader)
        return Job(body, leaders, echoed, drop)

    def tokens(self, body: TokenizeRequest) -> TokenIds:
        """Token ids of a body's text or messages, within the limits of a request."""
        if body.messages is not None:
            self._check_messages(body.messages, body.tools, body.add_generation_prompt)
            return self._rendered(body, body.add_generation_prompt)
        text = body.prompt or ""
        self._check_length(text, "prompt")
        return self.prompts.encode(text, body.add_special_tokens)

    def begun(self, body: TokenizeRequest, compression: Compression | None) -> tuple[TokenIds, int]:
        """``tokens`` of a body, and how many of them ``compression.prefix`` prefills alone."""
        tokens = self.tokens(body)
        if body.messages is None:
            text = body.prompt or ""
            tokens_with = partial(self._encoded_with, body, text)
            return tokens, self._prefix(compression, tokens, len(text), tokens_with, "prompt")
        size, tokens_with = len(body.messages), partial(self._rendered_with, body)
        return tokens, self._prefix(compression, tokens, size, tokens_with, "messages")

    def lora(self, model: str | None) -> str | None:
        """The adapter that a body's ``model`` names; None for the model without an adapter."""
        return model if model in self.engine.adapters else None

    def text(self, body: Detokenize) -> str:
        """The text of a body's tokens, within the limits of a request."""
        most = self.settings.max_prompt_tokens or self.engine.runner.max_positions
        if not self.own.streams:
            limit("tokens", len(body.tokens), most, "tokens")
        try:
            return self.prompts.decode(body.tokens)
        except ValueError as error:
            raise ApiError(400, str(error), param="tokens") from None

    def _rendered(self, body: ChatRequest | TokenizeRequest, generate: bool = True) -> TokenIds:
        options = body.chat_template_kwargs or {}
        try:
            self.prompts.template.check_options(options)
        except ValueError as error:
            raise ApiError(400, str(error), param="chat_template_kwargs") from None
        options = {**options, **self.forms.effort(body, options)}
        try:
            return self.prompts.chat(body.messages or [], generate, options, body.tools or ())
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None

    # --- prefixes -----------------------------------------------------------------------------

    def _prefix(
        self,
        compression: Compression | None,
        prompt: TokenIds,
        size: int,
        tokens_with: Callable[[int, str], TokenIds],
        param: str,
    ) -> int:
        """The number of a prompt's tokens that belong to the items of ``compression.prefix``.

        size : number of items;  tokens_with : token ids of the first ``count`` items, followed by
            another text.  The prefix is the part that all following texts have in common, so it is
            the same for every request that begins with these items.
        """
        count = compression.prefix if compression else None
        if count is None:
            return 0
        if count >= size:
            raise ApiError(
                400,
                f"compression: prefix={count}, but {param} has {size} items: at least one "
                f"must come behind the prefix",
                param="compression",
            )
        common = len(prompt)
        for text in OTHER_TEXTS:
            other = tokens_with(count, text)
            same = zip(prompt[:common], other, strict=False)
            differ = (at for at, (one, two) in enumerate(same) if one != two)
            common = next(differ, min(common, len(other)))
        if not common:
            raise ApiError(
                400,
                f"compression: prefix={count}: the prompt does not begin with these items, "
                f"so they cannot be computed on their own; leave prefix out",
                param="compression",
            )
        return min(common, len(prompt) - 1)

    def _rendered_with(
        self, body: ChatRequest | TokenizeRequest, count: int, text: str
    ) -> TokenIds:
        """Token ids of a chat's first messages, with another text as the next message."""
        changed = {"content": text, "tool_calls": None}
        given = body.messages or []
        messages = [*given[:count], given[count].model_copy(update=changed)]
        return self._rendered(body.model_copy(update={"messages": messages}), generate=False)

    def _encoded_with(
        self,
        body: CompletionRequest | TokenizeRequest,
        prompt: str | TokenIds,
        count: int,
        text: str,
    ) -> TokenIds:
        """Token ids of a prompt's first characters, followed by another text; for a prompt of token
        ids, the first ids."""
        if not isinstance(prompt, str):
            return prompt[:count]
        return self.prompts.encode(prompt[:count] + text, body.add_special_tokens)

    # --- parts --------------------------------------------------------------------------------

    def _request(
        self,
        body: Generation,
        prompt: TokenIds,
        wanted: int | None,
        top: int | None,
        owner: str | None,
        prefix: int,
    ) -> Request:
        settings = self.settings
        limit("n", body.n or 1, settings.max_n, "choices")
        limit("logprobs", top or 0, settings.max_logprobs, "likeliest tokens")
        policy = self.policy(body.compression)
        param = "messages" if isinstance(body, ChatRequest) else "prompt"
        most = self._max_tokens(prompt, wanted, policy, param, body.min_tokens)
        form = self.forms.form(body, prompt)
        params = self._params(body, most, top, self._prompt_top(body, len(prompt), policy), form)
        reuse = body.compression is None or body.compression.reuse
        reuse = reuse and params.prompt_logprobs is None  # a reused cache gives no logits
        owner = owner if reuse else None
        try:
            return self.engine.make(
                prompt,
                params,
                policy=policy,
                samples=body.n or 1,
                owner=owner,
                lora=self.lora(body.model),
                prefix=prefix,
                salt=body.cache_salt or "",
            )
        except ContextLengthError as error:
            raise self._too_long(param, f"{error}.") from None
        except GrammarError as error:
            raise ApiError(400, str(error), param=param_of(body)) from None
        except ValueError as error:
            raise ApiError(400, str(error)) from None

    def _params(
        self,
        body: Generation,
        max_tokens: int,
        top: int | None,
        prompt_top: int | None,
        form: StructuredOutputsParams | None,
    ) -> SamplingParams:
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        stop = [text for text in stop if text]
        limit("stop", len(stop), self.settings.max_stop, "stop strings")
        longest = max(map(len, stop), default=0)
        limit("stop", longest, MAX_STOP_LENGTH, "characters in a stop string")
        ids = body.stop_token_ids or []
        limit("stop_token_ids", len(ids), self.settings.max_stop, "stop token ids")
        try:
            bias = {int(token): amount for token, amount in (body.logit_bias or {}).items()}
        except ValueError:
            raise ApiError(400, "logit_bias: keys must be token ids", param="logit_bias") from None
        asked: dict[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "min_p": body.min_p,
            "top_k": None if body.top_k is None else max(0, body.top_k),
            "repetition_penalty": body.repetition_penalty,
        }
        said = {name: value for name, value in asked.items() if value is not None}
        chosen = {"temperature": 1.0, **self.defaults, **said, "max_tokens": max_tokens}
        return SamplingParams(
            **chosen,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            seed=body.seed,
            stop=tuple(stop),
            stop_token_ids=tuple(ids),
            ignore_eos=body.ignore_eos,
            logprobs=top,
            logit_bias=bias,
            min_tokens=body.min_tokens,
            skip_special_tokens=body.skip_special_tokens and not self.forms.reads_marks(body),
            prompt_logprobs=prompt_top,
            structured_outputs=form,
        )

    def _max_tokens(
        self, prompt: TokenIds, wanted: int | None, policy: Policy, param: str, least: int
    ) -> int:
        """The number of tokens to generate: the requested one, if there is room, or the default."""
        settings, size = self.settings, len(prompt)
        room = self.engine.runner.max_positions - size
        endless = self.engine.shared.is_endless(policy, size)
        if wanted is None:
            if room < 1 and not endless:
                raise self._too_long(
                    param,
                    f"your {param} resulted in {size} tokens. Please reduce the length of "
                    f"the {param}.",
                )
            usual = settings.default_max_tokens or self.defaults.get("max_tokens", MAX_TOKENS)
            usual = min(usual, settings.max_tokens_limit or usual)
            if least <= usual:
                return usual if endless else min(usual, room)
            wanted = least
        if settings.max_tokens_limit is not None:
            name = "max_tokens" if wanted > least else "min_tokens"
            limit(name, wanted, settings.max_tokens_limit, "generated tokens")
        if wanted > room and not endless:
            raise self._too_long(
                param,
                f"you requested {size + wanted} tokens ({size} in the {param}, {wanted} in "
                f"the completion). Please reduce the length of the {param} or completion.",
            )
        return wanted

    def _too_long(self, param: str, what: str) -> ApiError:
        """The wording of OpenAI and vLLM, because some clients parse the message."""
        longest = self.engine.runner.max_positions
        return ApiError(
            400,
            f"This model's maximum context length is {longest} tokens. However, {what}",
            param=param,
            code="context_length_exceeded",
        )

    def _checked(self, prompt: TokenIds, param: str) -> TokenIds:
        if not prompt:
            raise ApiError(400, f"the {param} is empty; send at least one token", param=param)
        longest = self.settings.max_prompt_tokens
        if longest is not None:
            limit(param, len(prompt), longest, "prompt tokens", code="context_length_exceeded")
        return prompt

    def _check_messages(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, whole: bool = True
    ) -> None:
        """``_check_length`` for a chat, where each message and part is at least one token.  Results
        must belong to calls, and if the chat is ``whole``, every call must have its result."""
        try:
            check_calls(messages, whole)
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        most = self.settings.max_prompt_tokens or self.engine.runner.max_positions
        parts = sum(len(each.content) if isinstance(each.content, list) else 1 for each in messages)
        if not self.own.streams and parts > most:
            raise self._too_long(
                "messages",
                f"your messages have {parts} parts, a token each at least. Please "
                f"reduce the length of the messages.",
            )
        texts = [each.text for each in messages]
        texts += [call.function.arguments for each in messages for call in each.tool_calls or ()]
        texts += [each.reasoning_content or "" for each in messages]
        self._check_length("".join(texts), "messages")
        self._check_length("".join(each.model_dump_json() for each in tools or ()), "tools")

    def _check_length(self, text: str, param: str) -> None:
        """Refuse a text before tokenization if it has too many tokens in any tokenization."""
        most = self.settings.max_prompt_tokens or self.engine.runner.max_positions
        each = self.prompts.longest_token or LONGEST_TOKEN
        if not self.own.streams and len(text) > most * each:
            raise self._too_long(
                param,
                f"your {param} has {len(text)} characters, more than {most} tokens can "
                f"hold. Please reduce the length of the {param}.",
            )

    def _prompt_top(self, body: Generation, size: int, policy: Policy) -> int | None:
        """The number of likeliest tokens requested for each of ``size`` prompt tokens.  The policy
        must compute every prompt token in the last layer."""
        top, what, param = body.prompt_logprobs, "prompt_logprobs", "prompt_logprobs"
        if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
            if top is None:
                what, param = "echo with logprobs", "logprobs"
            top = max(body.logprobs, top or 0)
        if top is None:
            return None
        limit(param, top, self.settings.max_logprobs, "likeliest tokens")
        try:
            check_prompt_logprobs(policy, what=what)
        except ValueError as error:
            raise ApiError(400, str(error), param=param) from None
        runner = self.engine.runner
        needed = size * runner.vocab_size * runner.dtype.itemsize
        if needed > self.settings.prompt_logprob_bytes:
            raise ApiError(
                400,
                f"{what} of {size} prompt tokens needs {needed} bytes of logits; this server "
                f"allows {self.settings.prompt_logprob_bytes}: shorten the prompt",
                param=param,
            )
        return top

    # --- compression --------------------------------------------------------------------------

    def policy(self, asked: Compression | None) -> Policy:
        """The policy of a request, within the server's limits."""
        stored = self.engine.config.kv_dtype
        if asked is not None and asked.kv_dtype not in (None, stored):
            raise ApiError(
                400,
                f"compression: kv_dtype={asked.kv_dtype!r}, but all caches of this server are "
                f"stored in kv_dtype={stored!r}: set that, or leave it out",
                param="compression",
            )
        if asked is None:
            return self.own
        lossless = self.lossless if asked.lossless is None else asked.lossless
        if asked.policy is None and asked.keep is None and lossless == self.lossless:
            return self.own
        try:
            return self._made(asked.policy, asked.keep, lossless)
        except ValueError as error:
            raise ApiError(400, f"compression: {error}", param="compression") from None

    def _make_policy(self, name: str | None, keep: float | None, lossless: bool) -> Policy:
        settings, own = self.settings, self.base
        if lossless:
            name = None if name == "full" else name  # full chooses no entries for drafts
            if not self.may_keep_all:
                raise ValueError(
                    f"lossless keeps everything, as policy 'full' does, which is not served here; "
                    f"there are {', '.join(self.policies)}: leave lossless out"
                )
        if name == "full" and own.name != name and settings.max_keep < 1:
            raise ValueError(
                f"policy 'full' keeps everything; this server allows {settings.max_keep}"
            )
        if name is not None and name not in self.policies:
            check_choice("policy", name, POLICIES)
            reason = self.refused.get(name)
            raise ValueError(
                f"policy {name!r} is not served here{f' ({reason})' if reason else ''}; there are "
                f"{', '.join(self.policies)}"
            )
        low, high = settings.min_keep, settings.max_keep
        if keep is not None and not low <= keep <= high:
            raise ValueError(f"keep={keep} is outside what this server allows: {low} to {high}")
        share = DRAFT_KEEP if lossless and not self.lossless else self.own_keep
        if self.lossless and not lossless:  # the server's keep is that of drafts
            share = min(high, getattr(make_policy(own.name), "keep", None) or high)
        share = share if keep is None else keep
        if name is None or name == own.name:
            chosen = choose_policy(own, share, lossless)
        elif name == "full":
            make_policy(name, keep)  # refuses a keep below 1
            chosen = make_policy(name)
        else:
            if share is None:
                share = DRAFT_KEEP if lossless else min(high, 1.0)
            chosen = choose_policy(name, share, lossless)
        chosen = self.engine.bind(chosen, measure=False)  # the model is in use
        self.engine.check_policy(chosen)
        return chosen

    @property
    def heads(self) -> list[list[float] | None] | None:
        """The share of its entries that each KV head needs, ``[layers][kv_heads]``, None in layers
        with a sliding window; None if no served policy has a profile."""
        for each in self.served.values():
            if isinstance(profile := getattr(each, "profile", None), Profile):
                rows = zip(profile.share, profile.governed, strict=True)
                return [list(row) if governed else None for row, governed in rows]
        return None

    def _policies(self) -> dict[str, Policy]:
        """Policies that a request may select, with default options; the server's policy first."""
        asked = self.settings.policies
        found = {self.base.name: self.base}
        for name in [*POLICIES] if asked is None else asked:
            check_choice("policies", name, POLICIES)
            try:
                asked_for = self.engine.bind(make_policy(name), measure=False)
                self.engine.check_policy(asked_for)
            except ValueError as error:
                if asked is not None:
                    raise
                self.refused[name] = str(error)
                continue
            if name != "full" or self.settings.max_keep == 1:
                found.setdefault(name, asked_for)
        return found
