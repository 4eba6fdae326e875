"""The nouns everything else passes around.  No behaviour lives here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyramidinfer.config import is_number, named_options

__all__ = [
    "AttentionShape",
    "Best",
    "KVUsage",
    "Keep",
    "Layers",
    "Logprob",
    "Needs",
    "Observation",
    "Phase",
    "Reduce",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "State",
    "TokenIds",
    "Trace",
    "View",
]

TokenIds = list[int]

#: What a policy is asked in.
Phase = Literal["prefill", "extend", "reread", "decode"]

#: A policy's memory of one request: small named tensors, on the host.
State = dict[str, Tensor]


# --- what a policy sees and says -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layers:
    """The model's depth as a policy needs to know it.

    ``governed[layer]``: every token of the request can be attended to there.  Only these layers
    are a policy's business; a layer whose sliding window is shorter than the request is bounded
    by that window and by nothing else.  ``kv_heads``: of every layer.
    """

    governed: tuple[bool, ...]
    kv_heads: int = 1

    @property
    def count(self) -> int:
        return len(self.governed)

    @property
    def first(self) -> int:
        """The first governed layer, or 0 where there is none."""
        return self.governed.index(True) if any(self.governed) else 0


@dataclass(frozen=True, slots=True)
class Reduce:
    """How the attention of a window of queries becomes one score per entry.

    ``heads``: ``mean`` or ``max`` over all query heads (one row of scores), ``kv_mean`` or
    ``kv_max`` over the query heads of each KV head (one row per KV head).
    ``rows``: ``mean``, ``sum`` or ``max`` over the window's queries.  ``newest_weight``: queries
    are first weighted linearly from 1 (oldest) to this (newest).

    ``rows="below"`` counts, among the queries that could see the entry, those that gave it less
    than an even share: a weight below 1 / (the query's position + 1), rounding apart.
    """

    heads: Literal["mean", "max", "kv_mean", "kv_max"] = "mean"
    rows: Literal["mean", "sum", "max", "below"] = "mean"
    newest_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Best:
    """A rule of eviction said beforehand: keep the best entries by their window scores.

    Of every KV head the ``count`` entries (one number, or one a head) with the highest scores stay,
    each score replaced by the ``pool`` of it and its ``kernel`` - 1 nearest neighbours in the text;
    the first ``sinks`` positions, the newest ``recent`` and what is protected stay regardless.
    Without a window the best entries are the newest.
    """

    count: int | tuple[int, ...]
    kernel: int
    pool: Literal["max", "mean"]
    sinks: int
    recent: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be observed in a layer before the policy is asked.

    ``window``: how many of the newest queries are scored (0: none) and ``reduce`` how.
    ``remember``: the window's queries go into the ring that decoding looks back on (only the
    newest one otherwise); the same in every governed layer.
    ``column_sums``: attention each entry got from *all* new queries, per KV head.
    ``slot_scores``: the running score kept beside each entry.
    ``keys``: the entries' keys, for ``retain`` and ``evict``.
    ``propagate``, ``retain``, ``evict``: which questions to ask; the others are answered "all".
    ``among``: ranks by age ``(first, last)`` of the entries whose scores ``evict`` will look at,
    the same tokens in every head; the others' may be 0.
    ``best``: what ``evict`` will answer, where that is such a rule and scores, if any, are one row
    per KV head; whoever can may carry it out without asking.
    """

    window: int = 0
    reduce: Reduce = Reduce()
    remember: bool = False
    column_sums: bool = False
    slot_scores: bool = False
    keys: bool = False
    propagate: bool = False
    retain: bool = False
    evict: bool = False
    among: tuple[int, int] | None = None
    best: Best | None = None


@dataclass(frozen=True, slots=True)
class View:
    """The lengths a policy decides on, before any tensor is looked at.

    ``new_len`` tokens enter the layer in this phase; ``head_lens`` entries are in each of its KV
    heads' caches, the new ones included, ``kept_len`` in the longest; ``first_kept_len`` are in
    the longest head of the first governed layer.  ``prompt_len`` is the length of the text being
    taken in: the prompt, or in ``extend`` the tokens added to it.  ``seen_len`` tokens make up the
    whole text.  In ``reread`` a text that is in goes through the layers again, behind itself:
    ``new_len`` tokens of that enter the layer, and 0 once all of it was read.
    """

    phase: Phase
    layer: int
    layers: Layers
    prompt_len: int
    new_len: int
    head_lens: tuple[int, ...]
    first_kept_len: int
    seen_len: int
    state: State

    @property
    def kept_len(self) -> int:
        return max(self.head_lens)


@dataclass(frozen=True, slots=True)
class Observation:
    """A layer as the policy sees it: the view and the tensors it asked for.

    positions : ``[kv_heads, n]`` original positions; for ``propagate`` ``[1, new_len]``.
    scores : ``[1 or kv_heads, n]`` window scores, entry by entry, or None.
    column_sums, slot_scores : ``[kv_heads, n]`` or None.
    keys : ``[kv_heads, n, key_dim]``, as they are in the cache (rotated), float32 or wider; or
        None.
    protected : ``[kv_heads or 1, n]`` bool, entries that must stay.

    ``n`` is the length of the longest head (``view.kept_len``).  A head that is shorter has its
    ``view.head_lens`` entries in front; behind them positions are negative, no two the same,
    scores and keys 0 and nothing is protected.
    """

    view: View
    positions: Tensor
    protected: Tensor
    scores: Tensor | None = None
    column_sums: Tensor | None = None
    slot_scores: Tensor | None = None
    keys: Tensor | None = None


class Keep(NamedTuple):
    """Entries that stay: indices ``[heads, k]`` (heads is 1 or kv_heads), or None for all.

    ``counts``: how many of a head's indices count, the first ones, ``[kv_heads]``; None: all k.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None


# --- what a layer is -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer's sizes. ``window``: positions it can look back, None for all."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


# --- what a user gives and gets ------------------------------------------------------------------


@named_options
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen.  ``temperature=0`` is greedy.

    ``top_k=0``, ``top_p=1`` and ``min_p=0`` switch the filter off.  ``logprobs=k`` returns the
    log-probability of each chosen token and of the ``k`` likeliest ones, before any filter.
    ``logit_bias``: token id → what is added to its logit, between -100 and 100.
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
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r} must be True or False")
        for name, low, high in (
            ("temperature", 0.0, 1e3), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.01, 1e3), ("presence_penalty", -1e3, 1e3),
            ("frequency_penalty", -1e3, 1e3),
        ):  # fmt: skip
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"{name}={value!r} must lie between {low:g} and {high:g}")
        if 0 < self.temperature < 1e-3:
            raise ValueError(
                f"temperature={self.temperature!r} must be 0 (greedy) or at least 0.001"
            )
        if self.top_p == 0:
            raise ValueError("top_p=0 must be above 0 (1 switches it off)")
        for name, least, most in (
            ("max_tokens", 1, 2**31), ("top_k", 0, 2**31), ("logprobs", 0, 1000),
            ("seed", -(2**63), 2**64 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("logprobs", "seed"):
                continue
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{name}={value!r} must be a whole number between {least} and {most}"
                )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop={text!r}: a stop string must be a text that is not empty")
        for token in self.stop_token_ids:
            if type(token) is not int or token < 0:
                raise ValueError(f"stop_token_ids: {token!r} is not a token id")


class Logprob(NamedTuple):
    """One position's log-probabilities: the chosen token's, and the likeliest tokens'."""

    token_id: int
    logprob: float
    top: dict[int, float]


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds since arrival; ``None`` where the event did not happen.

    ``prefill_tokens_computed``: tokens that went through a layer in prefill, summed over layers
    and divided by the number of layers; ``computed_share`` is that over the prompt's length, above
    1 where a policy had the prompt read a second time.
    """

    queue_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float
    prefill_tokens_computed: float
    computed_share: float


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a request's cache was, just before it was released.

    ``kept_len``: entries, ``[layers][kv_heads]``.  ``bytes``: its pages.  ``peak_bytes``: the most
    it held at any time, query rings and prefill transients included.  ``full_bytes``: pages a full
    cache would take (sliding layers capped).  ``keep_lowered_to``: what ``keep`` was lowered to
    while it ran, for want of memory.
    """

    seen_len: int
    kept_len: tuple[tuple[int, ...], ...]
    bytes: int
    peak_bytes: int
    full_bytes: int
    keep_lowered_to: float | None = None

    @property
    def kept_share(self) -> float:
        """Mean over layers and heads of the share of processed tokens that are in the cache."""
        return sum(self.layer_means) / (len(self.kept_len) * self.seen_len) if self.seen_len else 0

    @property
    def layer_means(self) -> tuple[float, ...]:
        """Entries of each layer, the mean over its heads."""
        return tuple(sum(heads) / len(heads) for heads in self.kept_len)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer.

    ``finish_reason``: ``"stop"`` (end-of-sequence, stop id or stop string), ``"length"``, or
    ``"abort"``, ``"error"`` (logits that are no finite numbers, say); None while streaming.
    """

    request_id: int
    prompt_token_ids: TokenIds
    text: str
    token_ids: TokenIds
    finish_reason: str | None
    logprobs: list[Logprob] | None
    metrics: RequestMetrics
    kv: KVUsage


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a given continuation is after a context whose cache was compressed.

    ``logprobs``: of each token of the continuation; ``greedy``: whether it is the likeliest there.
    ``metrics`` and ``kv`` are those of the context, before the continuation went in.
    ``logits``: ``[continuation, vocab]`` float32 on the host, where asked for.
    """

    prompt_token_ids: TokenIds
    token_ids: TokenIds
    logprobs: list[float]
    greedy: list[bool]
    metrics: RequestMetrics
    kv: KVUsage
    logits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Trace:
    """Which tokens survived where, for pictures and tests.

    ``prefill_positions[layer][head]`` and ``kept_positions[layer][head]``: sorted original
    positions ``[kept]`` after prefill and at the end.  ``kept_len_by_step[s][layer][head]``:
    entries once token ``s`` is cached.  ``prefill_logits``, ``final_logits``: ``[vocab]``, after
    the prompt and after the last token.  ``computed_by_layer``: prompt tokens that entered each
    layer; where the prompt was read again, the same of every further reading behind them.
    """

    prompt_token_ids: TokenIds
    prefill_positions: list[list[Tensor]]
    kept_positions: list[list[Tensor]]
    kept_len_by_step: list[list[list[int]]]
    token_ids: TokenIds
    prefill_logits: Tensor
    final_logits: Tensor
    computed_by_layer: list[int] = field(default_factory=list)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision attention weights are worked out in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
