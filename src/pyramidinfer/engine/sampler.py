"""Choosing tokens: transformers' logits processors, each request with its own generator."""

from __future__ import annotations

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

from pyramidinfer.engine.request import Request
from pyramidinfer.types import Logprob, SamplingParams

__all__ = ["prepare", "sample"]


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


def prepare(request: Request, device: torch.device) -> None:
    """Build a request's processors and generator once."""
    params, chain = request.params, LogitsProcessorList()
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        chain.append(CountPenalty(request))
    if params.temperature > 0:
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
    token = likeliest
    if request.processors or request.params.temperature > 0:
        token = _choose(logits[None].float(), request)
    if request.params.logprobs is None:
        return token, None
    return token, _logprob(logits, token, request.params)


def _choose(scores: Tensor, request: Request) -> int:
    # Only the repetition penalty looks at the text, and making it a tensor takes time.
    text = request.prompt + request.output if request.params.repetition_penalty != 1 else []
    seen = torch.tensor([text], dtype=torch.int64, device=scores.device)
    scores = request.processors(seen, scores)
    if request.params.temperature == 0:
        return int(scores.argmax())
    weights = torch.softmax(scores[0], dim=-1)
    return int(torch.multinomial(weights, 1, generator=request.generator))


def _logprob(logits: Tensor, token: int, params: SamplingParams) -> Logprob:
    values = torch.log_softmax(logits.double(), dim=-1)
    top = values.topk(min(params.logprobs or 0, len(values)))
    likeliest = dict(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Logprob(token, float(values[token]), likeliest)
