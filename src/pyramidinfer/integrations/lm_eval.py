"""The model ``pyramidinfer`` for lm-eval (the LM Evaluation Harness), with compression.

Prefill compresses the context; then its continuation is scored, or its answer generated, on the
compressed cache.  ``python -m pyramidinfer.integrations.lm_eval`` takes the arguments of the
command ``lm_eval``.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import nn

from pyramidinfer.config import EngineConfig, check_whole, nearest
from pyramidinfer.engine.llm import LLM
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.integrations.tally import Tally
from pyramidinfer.policies import POLICIES, make_policy
from pyramidinfer.types import SamplingParams, TokenIds

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        has_bos_prefix,
        maybe_truncate,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}; lm-eval comes with: pip install 'pyramidinfer[lm_eval]'", name=error.name
    ) from error

__all__ = ["PyramidInferLM"]

#: Below lm-eval's own logger, so that its level and format apply.
logger = logging.getLogger("lm_eval.models.pyramidinfer")

ARGUMENTS = (
    "pretrained",
    "policy",
    "keep",
    "dtype",
    "device",
    "kv_memory",
    "max_length",
    "max_gen_toks",
    "rolling_context",
    "tokenizer",
    "add_bos_token",
    "prefix_token_id",
    "chat_template_args",
)
#: Generation options that mean the same here; ``num_beams`` can only be 1.
GENERATION = (
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
)
Window = tuple[TokenIds, TokenIds]


@register_model("pyramidinfer")
class PyramidInferLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """This engine as a model of lm-eval.

    pretrained : folder, hub id, fetched model, GGUF file, or a loaded transformers model.
    policy, keep : a policy's name and budget; its other options are given by name.
    dtype, device, kv_memory, tokenizer : as for ``LLM``.
    max_length : maximum number of tokens of a context and its continuation; the model's positions
        if None.
    max_gen_toks : maximum number of generated tokens if a task does not set it.
    rolling_context : in ``loglikelihood_rolling``, the share of a window that is compressed
        context.  None: 0.5, and 0 (lm-eval's own windows) for the policy ``full``.
    add_bos_token, prefix_token_id, chat_template_args : as for lm-eval's ``hf``.
        ``add_bos_token=True`` is refused if the tokenizer has no BOS, or if a given tokenizer adds
        none.
    batch_size, max_batch_size : ignored, because all requests of a call run together.
    options : options of the policy and of ``EngineConfig`` (``page_size``, ``kv_dtype``, …).

    Raises ``ValueError`` for anything unknown, with the nearest name.
    """

    def __init__(
        self,
        pretrained: str | nn.Module,
        policy: str = "pyramid",
        keep: float | None = None,
        *,
        dtype: Any = "auto",
        device: Any = "auto",
        kv_memory: int | str = "1GiB",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        rolling_context: float | None = None,
        tokenizer: Any = "auto",
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        engine_options, policy_options = _sort_options(policy, options)
        chosen = make_policy(policy, keep, **policy_options)
        check_whole("max_gen_toks", max_gen_toks, 1)
        if rolling_context is None:
            rolling_context = 0.0 if policy == "full" else 0.5
        if not isinstance(rolling_context, int | float) or not 0 <= rolling_context < 1:
            raise ValueError(f"rolling_context={rolling_context!r} must be at least 0 and below 1")
        self.llm = LLM(
            pretrained,
            chosen,
            kv_memory=kv_memory,
            dtype=dtype,
            device=device,
            tokenizer=tokenizer,
            **engine_options,
        )
        if self.llm.tokenizer is None:
            raise ValueError(f"{self.llm.name!r} has no tokenizer; name one with tokenizer=")
        self.tokenizer = self.llm.tokenizer
        self._device = self.llm.device
        self.max_gen_toks, self.rolling_context = max_gen_toks, rolling_context
        self.max_length = self._check_length(max_length)
        self.add_bos_token, self.chat_template_args = add_bos_token, chat_template_args or {}
        if add_bos_token is not None:
            self._set_bos(add_bos_token, isinstance(tokenizer, str | os.PathLike))
        self._prefix = self._find_prefix(prefix_token_id)
        self._prefix_text = self.tok_decode([self._prefix], skip_special_tokens=False)
        self._special = self._find_special()
        self.tallies: dict[str, Tally] = {}

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> PyramidInferLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> PyramidInferLM:
        """Model arguments take precedence over ``--device`` and ``--batch_size``, which are always
        set."""
        others = {name: value for name, value in (additional_config or {}).items() if value}
        if others.get("device") == "cuda:0" and not torch.cuda.is_available():
            del others["device"]  # the command's default, not set by the user
        if "pretrained" not in arg_dict:
            raise ValueError(
                "model_args needs pretrained=: a folder, hub id, fetched model or GGUF file"
            )
        return cls(**{**others, **arg_dict})

    def _check_length(self, max_length: int | None) -> int:
        longest = self.llm.engine.runner.max_positions
        if max_length is None:
            return longest
        check_whole("max_length", max_length, 2)
        if max_length > longest:
            raise ValueError(
                f"max_length={max_length} is more than the model's {longest} positions"
            )
        return max_length

    def _set_bos(self, wanted: bool, is_own: bool) -> None:
        """Set ``add_bos_token``, as ``hf`` does: many tokenizers have a BOS but do not add it.

        is_own : whether the tokenizer was loaded here; a given one is not changed.
        """
        if is_own:
            self.tokenizer.add_bos_token = wanted
        if wanted and self.tokenizer.encode("a")[:1] != [self.tokenizer.bos_token_id]:
            raise ValueError(
                "add_bos_token=True has no effect: "
                + (
                    "the tokenizer has no BOS; leave it out"
                    if self.tokenizer.bos_token_id is None
                    else "the tokenizer that was given adds no BOS; set its add_bos_token first"
                )
            )

    def _find_prefix(self, chosen: int | None) -> int:
        for token in (chosen, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError("the tokenizer has neither BOS nor EOS; give prefix_token_id=")

    # --- text and tokens ----------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        token: int | None = self.tokenizer.eos_token_id
        return token

    @property
    def prefix_token_id(self) -> int:
        """The token before the first token of a text, and in place of an empty context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> TokenIds:
        """Token ids; a text that begins with the prefix token gets no second one."""
        if add_special_tokens is None:
            has_one = has_bos_prefix(string, self._prefix_text)
            add_special_tokens = False if has_one else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: TokenIds = self.tokenizer.encode(string, **options)
        return ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        return text

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as a prompt, without system messages if the template refuses them."""

        def render(messages: list[dict[str, str]]) -> str:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )
            return text

        try:
            return render(chat_history)
        except TemplateError:
            logger.warning("the chat template failed; trying it without the system role")
            return render([each for each in chat_history if each["role"] != "system"])

    # --- likelihoods --------------------------------------------------------------------------

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, window by window; every token is scored once."""
        texts = [each.args[0] for each in requests]
        windows = [list(self.windows(self.tok_encode(text))) for text in texts]
        answers = iter(
            self._loglikelihood_tokens(
                [(None, *window) for each in windows for window in each],
                disable_tqdm,
                "loglikelihood_rolling",
            )
        )
        totals = [sum((next(answers)[0] for _ in each), 0.0) for each in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def windows(self, tokens: TokenIds) -> Iterator[Window]:
        """A text as (context, continuation) pairs whose continuations make up the text.

        With ``rolling_context`` = 0 these are lm-eval's own windows.  Otherwise a window is at most
        as long as the text, and its first share is context.  The first window is split in two: as
        many tokens as a context after the prefix token alone, and the rest after those.
        """
        size, context = self._room - 1, 1
        if self.rolling_context:
            size = max(1, min(size, len(tokens)))
            context = math.ceil(self.rolling_context * size)
        rolling = get_rolling_token_windows(tokens, self.prefix_token_id, size, context)
        for index, window in enumerate(rolling):
            before, scored = make_disjoint_window(window)
            if index or not self.rolling_context:
                yield before, scored
                continue
            yield before, scored[:context]
            if scored[context:]:
                yield before + scored[:context], scored[context:]

    @property
    def _room(self) -> int:
        """Maximum number of tokens of a context and its continuation.

        The last token is only predicted, so there is room for ``max_length`` plus one.
        """
        return self.max_length + 1

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, TokenIds, TokenIds]],
        disable_tqdm: bool = False,
        kind: str = "loglikelihood",
    ) -> list[tuple[float, bool]]:
        """Score continuations after their compressed contexts (truncated from the left)."""
        engine, tally = self.llm.engine, self.tallies.setdefault(kind, Tally())
        made: list[Request] = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) < self._room:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: it must have "
                    f"at least 1 and, with max_length={self.max_length}, at most {self._room - 1} "
                    f"({texts or 'a rolling window'!r:.80})"
                )
            if len(context) + len(continuation) > self._room:
                logger.warning(
                    "context (%d tokens) and continuation (%d) exceed max_length=%d: truncated "
                    "from the left",
                    len(context),
                    len(continuation),
                    self.max_length,
                )
            context = context[-(self._room - len(continuation)) :]
            scoring = Scoring(continuation, keep_logits=False)
            made.append(engine.make(context, SamplingParams(), scoring=scoring))
            tally.scored += len(continuation)
            tally.on_prefix += len(continuation) * (len(context) == 1)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(made)
        for index, request in self._run(made, kind, disable_tqdm):
            assert request.scoring is not None
            answers[index] = sum(request.scoring.logprobs), all(request.scoring.greedy)
            if requests[index][0] is not None:  # a rolling window is only a part of a request
                self.cache_hook.add_partial(kind, requests[index][0], answers[index])
        return answers

    # --- generation ---------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts (truncated from the left) up to a stop string."""
        made, stops = [], []
        for context, options in (each.args for each in requests):
            params, stop = self.sampling(options)
            if params.max_tokens >= self.max_length:
                raise ValueError(
                    f"max_gen_toks={params.max_tokens} leaves no room for a context in "
                    f"max_length={self.max_length}"
                )
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            tokens, _ = maybe_truncate(tokens, params.max_tokens, self.max_length)
            made.append(self.llm.engine.make(tokens, params))
            stops.append(stop)
        texts = [""] * len(made)
        for index, request in self._run(made, "generate_until", disable_tqdm):
            text = self.tok_decode(request.output)
            texts[index] = postprocess_generated_text(text, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def sampling(self, options: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """A task's generation options, and the strings that end its answer."""
        rest = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        samples, temperature = rest.pop("do_sample"), float(rest.pop("temperature", 0.0))
        if samples and not temperature:
            raise ValueError("do_sample=True needs a temperature above 0 (--gen_kwargs)")
        if (beams := rest.pop("num_beams", 1)) != 1:
            raise ValueError(f"num_beams={beams!r}: there is no beam search; leave it at 1")
        max_tokens, until = rest.pop("max_gen_toks"), rest.pop("until")
        known = (*GENERATION, "do_sample", "temperature", "max_gen_toks", "until", "num_beams")
        for name in rest:
            if name not in GENERATION:
                raise ValueError(f"unknown generation option {name!r}; {nearest(name, known)}")
        if samples and rest.get("seed") is None:  # lm-eval seeds torch
            rest["seed"] = int(torch.randint(2**62, ()))
        end = self.eot_token_id
        eos = None if end is None else self.tok_decode([end], skip_special_tokens=False)
        stop = [each for each in handle_stop_sequences(until, eos) if each != ""]
        if not all(isinstance(each, str) for each in stop):
            raise ValueError(f"until={until!r} must be a text, or a list of texts")
        # decoded text has no special tokens, so such a stop string is matched by the token's id
        ids = [token for token, text in self._special.items() if any(s in text for s in stop)]
        params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, stop=stop, stop_token_ids=ids, **rest
        )
        return params, stop

    def _find_special(self) -> dict[int, str]:
        """Tokens that decoding leaves out, and their texts."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {token for token, each in added.items() if each.special}
        return {
            token: self.tok_decode([token], skip_special_tokens=False)
            for token in sorted(special.union(self.tokenizer.all_special_ids))
            if token < self.llm.engine.runner.vocab_size
        }

    # --- running ------------------------------------------------------------------------------

    def _run(
        self, requests: list[Request], kind: str, quiet: bool
    ) -> Iterator[tuple[int, Request]]:
        """Run requests together; yields the index and the request when it has ended."""
        engine, tally = self.llm.engine, self.tallies.setdefault(kind, Tally())
        places = {request.id: index for index, request in enumerate(requests)}
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=quiet) as bar:
            for ended in engine.steps(requests):
                for request in ended:
                    self._count(tally, request)
                    bar.update()
                    yield places[request.id], request
        logger.info("%s: %s", kind, tally.shares())

    def _count(self, tally: Tally, request: Request) -> None:
        used = self.llm.engine.usage(request)
        tally.requests += 1
        tally.tokens += len(request.prompt)
        tally.computed += self.llm.engine.metrics(request).prefill_tokens_computed
        tally.cached += sum(used.full_len)
        tally.kept += sum(used.layer_means)
        tally.bytes += used.bytes
        tally.full_bytes += used.full_bytes

    def get_model_info(self) -> dict[str, Any]:
        """Information that lm-eval writes into its results in addition to the arguments."""
        return {
            "model_dtype": str(self.llm.dtype),
            "pyramidinfer": {
                "policy": repr(self.llm.policy),
                "max_length": self.max_length,
                "rolling_context": self.rolling_context,
                "cache": {kind: tally.shares() for kind, tally in self.tallies.items()},
            },
        }


def _sort_options(policy: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into those of the engine and those of the policy."""
    if policy not in POLICIES:
        raise ValueError(f"unknown policy {policy!r}; {nearest(str(policy), POLICIES)}")
    of_engine = {each.name for each in fields(EngineConfig)}
    of_policy = {each.name for each in fields(POLICIES[policy])}
    if "lora_modules" in options:
        raise ValueError(
            f"lora_modules={options['lora_modules']!r}: no task would run with the adapters; to "
            f"evaluate one, give its folder as pretrained="
        )
    for name in options:
        if name not in of_engine | of_policy:
            choices = {*ARGUMENTS, *of_engine, *of_policy}
            raise ValueError(
                f"unknown model argument {name!r} with policy {policy!r}; {nearest(name, choices)}"
            )
    for_engine = {name: value for name, value in options.items() if name in of_engine}
    return for_engine, {name: options[name] for name in options if name not in for_engine}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
