"""Checks that refuse invalid input before any work, with the value and a remedy."""

from __future__ import annotations

import operator
from collections.abc import Sequence as Items

import torch

from pyramidinfer.cache import Layout
from pyramidinfer.config import EngineConfig
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.loading import free_memory
from pyramidinfer.policies import Policy
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = [
    "ContextLengthError",
    "check_ahead",
    "check_count",
    "check_params",
    "check_plan",
    "check_prefix",
    "check_prompt_logprobs",
    "check_spans",
    "check_stream",
    "check_tokens",
]


class ContextLengthError(ValueError):
    """More tokens than the model's positions, or the pool's memory, allow."""


def check_plan(
    runner: ModelRunner,
    policy: Policy,
    config: EngineConfig,
    device: torch.device,
    weights: int = 0,
    loading: int = 0,
) -> None:
    """Check that this model (needs no weights) can run with this config: depth, budget, free
    memory.

    ``weights``: bytes still to be loaded in addition to the pool;  ``loading``: bytes during
    loading, in the files' format.
    """
    policy.check(runner.layers_for(1))
    check_ahead(policy, config)
    budget, free = config.budget, free_memory(device)
    scores = policy.uses_scores or config.slot_scores
    least = Layout.least_bytes(runner.group_specs(config.kv_dtype), config.page_size, scores)
    if budget < least:
        raise ValueError(
            f"kv_memory={budget} bytes is below one page per layer: this model needs at least "
            f"{least} bytes ({runner.depth} layers, {config.page_size} entries a page)"
        )
    if (most := max(weights, loading)) > free:
        raise ValueError(
            f"the model needs {most / 2**30:.2f} GiB for its weights in {runner.dtype}; "
            f"{free / 2**30:.2f} GiB of memory are free on {device}"
        )
    if budget + weights > free:
        raise ValueError(
            f"kv_memory={budget} bytes ({budget / 2**30:.2f} GiB) is more than the "
            f"{(free - weights) / 2**30:.2f} GiB of memory that are free on {device} next to the "
            f"weights; lower kv_memory"
        )
    here = free_memory(torch.device("cpu")) - (budget + weights if device.type == "cpu" else 0)
    if config.host_budget > here:
        raise ValueError(
            f"host_kv_memory={config.host_budget} bytes ({config.host_budget / 2**30:.2f} GiB) is "
            f"more than the {max(0, here) / 2**30:.2f} GiB of host memory free next to the "
            f"rest; lower it"
        )


def check_ahead(policy: Policy, config: EngineConfig) -> None:
    """``ValueError`` for drafting if the model is split over ranks."""
    if policy.guesses and config.ranks > 1:
        raise ValueError(
            f"lossless works on one rank, and this is {config.ranks}: omit tensor_parallel_size "
            f"and pipeline_parallel_size, or use policy='full'"
        )


def check_params(params: SamplingParams, vocab_size: int, has_tokenizer: bool) -> None:
    """Check that these parameters are valid for this vocabulary."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling={params!r} must be SamplingParams")
    if params.stop and not has_tokenizer:
        raise ValueError("stop strings need a tokenizer; none was loaded (use stop_token_ids)")
    if not params.skip_special_tokens and not has_tokenizer:
        raise ValueError("skip_special_tokens=False needs a tokenizer; none was loaded")
    biased = list(dict(params.logit_bias))
    for name, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        for token in tokens:
            if token >= vocab_size:
                raise ValueError(f"{name}: {token} is outside the vocabulary of {vocab_size}")


def check_count(name: str, value: int) -> int:
    """``value`` as an int, or ``ValueError``."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be a whole number") from None


def check_prompt_logprobs(
    policy: Policy, goes_on: bool = False, what: str = "prompt_logprobs"
) -> None:
    """``ValueError`` unless every prompt token reaches the last layer: dropped tokens, and tokens
    of a reused cache, have no logits."""
    if goes_on:
        raise ValueError(
            f"{what}: tokens of a prefix or an earlier turn have no log-probabilities any more; "
            f"give the whole prompt at once"
        )
    if policy.computes_less:
        raise ValueError(
            f"{what}: policy {policy.name!r} drops prompt tokens between layers, and dropped "
            f"tokens have no log-probabilities; use another policy (such as 'full') or omit it"
        )


def check_prefix(prefix: int, length: int, params: SamplingParams, goes_on: bool) -> None:
    """``ValueError`` for a prefix that cannot be prefilled separately."""
    prefix = check_count("prefix", prefix)
    if not 0 < prefix < length:
        raise ValueError(
            f"prefix={prefix}: of a prompt of {length} tokens at least one must be in the prefix, "
            f"and at least one behind it"
        )
    if goes_on:
        raise ValueError(f"prefix={prefix}: requests on a held cache and scored requests have none")
    if params.prompt_logprobs is not None:
        raise ValueError(
            f"prefix={prefix}: a prompt that is prefilled in parts has no prompt_logprobs; leave "
            f"one of them out"
        )


def check_stream(new: int, held: int, positions: int) -> None:
    """``ContextLengthError`` if a streaming request gets more tokens at once than the model has
    positions."""
    if new + held >= positions:
        raise ContextLengthError(
            f"{new} tokens on top of {held} cached ones exceed the {positions} positions of "
            f"this model; generation is unlimited, but at most "
            f"{positions - held - 1} tokens can be prefilled at a time"
        )


def check_tokens(tokens: TokenIds, vocab_size: int, what: str = "prompt") -> None:
    """``ValueError`` unless these are token ids of the model, at least one."""
    if len(tokens) == 0:
        raise ValueError(f"the {what} is empty; give at least one token")
    for token in tokens:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token id {token!r} is outside the vocabulary: 0 to {vocab_size - 1}")


def check_spans(protect: Items[tuple[int, int]], length: int) -> tuple[tuple[int, int], ...]:
    """Spans as pairs of ints inside a prompt of ``length`` tokens."""
    try:
        spans = tuple((operator.index(start), operator.index(stop)) for start, stop in protect)
    except (TypeError, ValueError):
        raise ValueError(
            f"protect={protect!r} must be a list of spans (start, stop) of prompt positions"
        ) from None
    for start, stop in spans:
        if not 0 <= start < stop <= length:
            raise ValueError(
                f"protect span ({start}, {stop}) lies outside the prompt's {length} tokens"
            )
    return spans
