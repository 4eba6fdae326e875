"""The nouns everything else passes around; what they tell follows from their fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from pyramidinfer.native.library import Kernels
from pyramidinfer.sampling import SamplingParams, StructuredOutputsParams

__all__ = [
    "AttentionShape",
    "Best",
    "DraftUsage",
    "KVUsage",
    "Keep",
    "Layers",
    "Logprob",
    "Needs",
    "Observation",
    "Phase",
    "Queries",
    "Reduce",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "Score",
    "State",
    "StructuredOutputsParams",
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
    """The rule by which most methods choose: the best entries under a budget.

    Of every KV head the ``count`` entries (one number, or one a head) with the highest scores stay,
    of equal ones the earlier.  What is protected, the first ``sinks`` positions and the newest
    ``recent`` stay regardless, and ``room`` others beside them, even where they fill the budget.

    ``by``: what scores an entry: the attention of the ``window`` that was asked for, the
    ``running`` score kept beside it, how ``new`` it is, or the method's ``own`` (``Policy.score``).
    ``kernel``, ``pool``: each score is replaced by the ``pool`` of it and its ``kernel`` - 1
    nearest neighbours in the text.
    ``safeguard``: None: every head keeps ``count``.  Else the heads of a layer compete for as many
    entries altogether (Ada-KV, 2407.11550, algorithm 1), and none falls below this share of what
    it would have had.
    """

    count: int | tuple[int, ...]
    by: Literal["window", "running", "new", "own"] = "window"
    kernel: int = 1
    pool: Literal["max", "mean"] = "max"
    sinks: int = 0
    recent: int = 0
    room: int = 0
    safeguard: float | None = None


class Queries(NamedTuple):
    """What a layer's queries are like before rotation, times the scale of their softmax.

    mean : ``[heads, key_dim]``;  covariance : ``[heads, key_dim, key_dim]``;  sizes : ``[heads,
    pairs]``, the mean length of each pair of numbers that are rotated together (number ``f`` and
    number ``f + pairs`` of a head; none where the layer has no rotary positions).
    """

    mean: Tensor
    covariance: Tensor
    sizes: Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be observed in a layer before the policy is asked.

    ``window``: how many of the newest queries are scored (0: none) and ``reduce`` how.
    ``remember``: the window's queries go into the ring that decoding looks back on (only the
    newest one otherwise); the same in every governed layer.
    ``column_sums``: attention each entry got from *all* new queries, per KV head.
    ``keys``, ``values``: the entries' own, for ``retain``.
    ``queries_from``: what the text's queries are like, from this token on, for ``retain``.
    ``ahead``: places behind the text, 1 for the next token's, that vectors are to be rotated to on
    average (``Observation.rotation``), for ``retain``.
    ``propagate``, ``retain``: the answer to these questions, where it is a rule; True: ask the
    policy; None: all stay.
    ``among``: ranks by age ``(first, last)`` of the entries whose scores ``retain`` will look at
    while decoding, the same tokens in every head; the others' may be 0.
    """

    window: int = 0
    reduce: Reduce = Reduce()
    remember: bool = False
    column_sums: bool = False
    keys: bool = False
    values: bool = False
    queries_from: int | None = None
    ahead: Sequence[int] = ()
    propagate: Best | Literal[True] | None = None
    retain: Best | Literal[True] | None = None
    among: tuple[int, int] | None = None


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

    rule : what the policy said beforehand (``Needs``).
    positions : ``[kv_heads, n]`` original positions; for ``propagate`` ``[1, new_len]``.
    scores : ``[1 or kv_heads, n]`` window scores, entry by entry, or None.
    column_sums, slot_scores : ``[kv_heads, n]`` or None.
    keys, values : ``[kv_heads, n, key_dim]`` as they are in the cache (rotated), and ``[kv_heads,
        n, value_dim]``, float32 or wider; or None.
    queries : what the text's queries are like, as ``queries_from`` asked for; or None.
    rotation : ``[key_dim, key_dim]``, a vector before rotation times this is the mean of it rotated
        to the places ``ahead``; or None.  Where positions are not rotary it leaves vectors alone.
    protected : ``[kv_heads or 1, n]`` bool, entries that must stay.
    kernels : what selects faster than torch does, where the backend has it.

    ``n`` is the length of the longest head (``view.kept_len``).  A head that is shorter has its
    ``view.head_lens`` entries in front; behind them positions are negative, no two the same,
    scores, keys and values 0 and nothing is protected.
    """

    view: View
    positions: Tensor
    protected: Tensor
    scores: Tensor | None = None
    column_sums: Tensor | None = None
    slot_scores: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    queries: Queries | None = None
    rotation: Tensor | None = None
    rule: Best | Literal[True] | None = None
    kernels: Kernels | None = None


class Keep(NamedTuple):
    """Entries that stay: indices ``[heads, k]`` (heads is 1 or kv_heads), or None for all.

    ``counts``: how many of a head's indices count, the first ones, ``[kv_heads]``; None: all k.
    ``for_drafts``: nothing is dropped; these are the entries that drafts read.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None
    for_drafts: bool = False


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


class Logprob(NamedTuple):
    """One position's log-probabilities: the chosen token's, and the likeliest tokens'.

    ``rank``: the chosen token's place among all by likelihood, from 1 on.
    """

    token_id: int
    logprob: float
    top: dict[int, float]
    rank: int


@dataclass(frozen=True, slots=True)
class DraftUsage:
    """What a lossless request's guesses did: ``drafted`` tokens were guessed and verified, of which
    ``accepted`` were right, in ``verifications`` steps."""

    drafted: int
    accepted: int
    verifications: int

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were right; 0 where there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_verification(self) -> float:
        """Tokens that a step with guesses gave, its own included; 0 where there was none."""
        done = self.verifications
        return (self.accepted + done) / done if done else 0.0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds since arrival; ``None`` where the event did not happen.

    ``prefill_tokens_computed``: tokens that went through a layer in prefill, summed over layers
    and divided by the number of layers; ``computed_share`` is that over the prompt's length, above
    1 where a policy had the prompt read a second time.
    ``drafts``: what guesses did, None where the request was not lossless.
    """

    queue_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float
    prefill_tokens_computed: float
    computed_share: float
    drafts: DraftUsage | None = None


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a request's cache was, just before it was released.

    ``kept_len``: entries, ``[layers][kv_heads]``.  ``full_len``: entries a full cache would hold in
    every head of a layer, ``[layers]``: ``seen_len``, less in sliding layers.  ``bytes``: its
    pages.  ``peak_bytes``: the most it held at any time, query rings and prefill transients
    included.  ``full_bytes``: pages a full cache would take.  ``keep_lowered_to``: what
    ``keep`` was lowered to while it ran, for want of memory.
    """

    seen_len: int
    kept_len: tuple[tuple[int, ...], ...]
    full_len: tuple[int, ...]
    bytes: int
    peak_bytes: int
    full_bytes: int
    keep_lowered_to: float | None = None

    @property
    def kept_share(self) -> float:
        """Share of a full cache's entries that are in the cache; never above 1."""
        return sum(self.layer_means) / sum(self.full_len) if self.seen_len else 0

    @property
    def layer_means(self) -> tuple[float, ...]:
        """Entries of each layer, the mean over its heads."""
        return tuple(sum(heads) / len(heads) for heads in self.kept_len)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request's answer.

    ``finish_reason``: ``"stop"`` (end-of-sequence, stop id or stop string), ``"length"``, or
    ``"abort"``, ``"error"`` (logits that are no finite numbers, say); None while streaming.
    ``prompt_logprobs``: of each prompt token, None for the first one.
    """

    request_id: int
    prompt_token_ids: TokenIds
    text: str
    token_ids: TokenIds
    finish_reason: str | None
    logprobs: list[Logprob] | None
    metrics: RequestMetrics
    kv: KVUsage
    prompt_logprobs: list[Logprob | None] | None = None


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
