"""Sampling: transformers' logits processors; each request has its own generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pyramidinfer.config import accumulate_dtype
from pyramidinfer.engine.request import Request
from pyramidinfer.types import Logprob, TokenIds

__all__ = ["choose", "guessing", "prepare", "read_prompt", "sample"]


class Constrained(LogitsProcessor):
    """Masks tokens that the request's constraint does not allow."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert self.request.constraint is not None
        allowed = self.request.constraint.allowed(scores.shape[1]).to(scores.device)
        return scores.masked_fill(~allowed, -torch.inf)


class Bias(LogitsProcessor):
    """Adds to the logits of some tokens (OpenAI's ``logit_bias``)."""

    def __init__(self, bias: dict[int, float], device: torch.device) -> None:
        self.tokens = torch.tensor(list(bias), device=device)
        self.amounts = torch.tensor([float(amount) for amount in bias.values()], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.index_add(1, self.tokens, self.amounts[None].to(scores.dtype))


class CountPenalty(LogitsProcessor):
    """Presence and frequency penalties over the tokens generated so far (OpenAI's definition)."""

    def __init__(self, request: Request) -> None:
        self.request = request

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.request.output:
            return scores
        params = self.request.params
        counts = torch.bincount(torch.tensor(self.request.output), minlength=scores.shape[1])
        penalty = params.presence_penalty * (counts > 0) + params.frequency_penalty * counts
        return scores - penalty.to(scores.device, scores.dtype)


class MinTokens(LogitsProcessor):
    """Masks tokens that would end an answer until it has ``min_tokens`` tokens."""

    def __init__(self, request: Request, ends: frozenset[int], device: torch.device) -> None:
        self.request, self.ends = request, torch.tensor(sorted(ends), device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(self.request.output) >= self.request.params.min_tokens:
            return scores
        others = scores.index_fill(1, self.ends, -torch.inf)
        return others if (others > -torch.inf).any() else scores  # the grammar is complete


def prepare(request: Request, device: torch.device, end_ids: frozenset[int]) -> None:
    """Build a request's processors and generator once."""
    params, chain = request.params, LogitsProcessorList()
    if params.logit_bias:
        chain.append(Bias(dict(params.logit_bias), device))
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(CountPenalty(request))
    if request.constraint is not None:
        chain.append(Constrained(request))
    ends = end_ids.union(request.stop_ids)
    if params.min_tokens and ends:
        chain.append(MinTokens(request, ends, device))
    if not params.is_greedy:
        if params.temperature != 1:
            chain.append(TemperatureLogitsWarper(float(params.temperature)))
        if params.top_k:
            chain.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            chain.append(TopPLogitsWarper(float(params.top_p)))
        if params.min_p > 0:
            chain.append(MinPLogitsWarper(float(params.min_p)))
        request.generator = torch.Generator(device)
        if params.seed is None:
            request.generator.seed()
        else:
            request.generator.manual_seed(params.seed % 2**64)
    request.processors = chain


def sample(logits: Tensor, request: Request, likeliest: int) -> tuple[int, Logprob | None]:
    """A request's next token from ``logits`` ``[vocab]`` (``likeliest``: their argmax)."""
    token = choose(logits, request, likeliest)
    if request.params.logprobs is None:
        return token, None
    return token, _logprobs(logits[None], [token], request.params.logprobs)[0]


def choose(logits: Tensor, request: Request, likeliest: int) -> int:
    """The same without log-probabilities."""
    token = likeliest
    if request.processors or not request.params.is_greedy:
        token = _choose(logits[None].float(), request)
    if request.constraint is not None:
        token = request.constraint.accept(token)
    return token


@contextmanager
def guessing(requests: list[Request]) -> Iterator[None]:
    """Tokens that requests sample in this context are undone at its end: their text, random state
    and constraint state are restored.

    A draft token uses the random numbers that sampling will use for the same position.
    """
    before = [(each, len(each.output), each.generator, each.constraint) for each in requests]
    try:
        for each, _, generator, constraint in before:
            each.generator = None if generator is None else generator.clone_state()
            each.constraint = None if constraint is None else constraint.copy()
        yield
    finally:
        for each, length, generator, constraint in before:
            del each.output[length:]
            each.generator, each.constraint = generator, constraint


def read_prompt(prompt: TokenIds, top: int, start: int, logits: Tensor) -> list[Logprob]:
    """Log-probabilities from the logits ``[n, vocab]`` of a prompt's tokens from ``start`` on: of
    the next tokens in the prompt, and of the ``top`` most likely ones."""
    tokens = prompt[start + 1 : start + 1 + len(logits)]
    return _logprobs(logits[: len(tokens)], tokens, top) if tokens else []


def _choose(scores: Tensor, request: Request) -> int:
    # Only the repetition penalty reads the text, and converting it to a tensor takes time.
    text = request.prompt + request.output if request.params.repetition_penalty != 1 else []
    seen = torch.tensor([text], dtype=torch.int64, device=scores.device)
    scores = request.processors(seen, scores)
    if request.params.is_greedy:
        return int(scores.argmax())
    weights = torch.softmax(scores[0], dim=-1)
    return int(torch.multinomial(weights, 1, generator=request.generator))


def _logprobs(logits: Tensor, tokens: TokenIds, top: int) -> list[Logprob]:
    """Log-probabilities from ``logits`` ``[n, vocab]`` of ``tokens`` ``[n]`` and of the ``top``
    most likely ones."""
    values = torch.log_softmax(logits.to(accumulate_dtype(logits.dtype)), dim=-1)
    best = values.topk(min(top, values.shape[1]))
    chosen = values.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    ranks = (values > chosen).sum(1) + 1
    return [
        Logprob(token, value, dict(zip(ids, high, strict=True)), rank)
        for token, value, ids, high, rank in zip(
            tokens,
            chosen[:, 0].tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            ranks.tolist(),
            strict=True,
        )
    ]
