"""The data types that all packages share."""

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

#: The phases in which a policy is called.
Phase = Literal["prefill", "extend", "reread", "decode"]

#: What a policy remembers about one request: small named tensors on the host.
State = dict[str, Tensor]


# --- what a policy sees and says -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers of the model, as a policy sees them.

    ``governed[layer]``: True if every token of the request can be attended to in this layer.  A
    policy only decides about governed layers; a layer whose sliding window is shorter than the
    request is limited by that window alone.  ``kv_heads``: KV heads per layer.
    """

    governed: tuple[bool, ...]
    kv_heads: int = 1

    @property
    def count(self) -> int:
        return len(self.governed)

    @property
    def first(self) -> int:
        """The first governed layer, or 0 if there is none."""
        return self.governed.index(True) if any(self.governed) else 0


@dataclass(frozen=True, slots=True)
class Reduce:
    """How the attention of a window of queries is reduced to one score per entry.

    ``heads``: ``mean`` or ``max`` over all query heads (one row of scores), ``kv_mean`` or
    ``kv_max`` over the query heads of each KV head (one row per KV head).
    ``rows``: ``mean``, ``sum`` or ``max`` over the window's queries.  ``newest_weight``: queries
    are first weighted linearly from 1 (oldest) to this value (newest).

    ``rows="below"`` counts the queries that could attend to the entry and gave it less than an
    equal share: a weight below 1 / (the query's position + 1), up to rounding.
    """

    heads: Literal["mean", "max", "kv_mean", "kv_max"] = "mean"
    rows: Literal["mean", "sum", "max", "below"] = "mean"
    newest_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Best:
    """The rule that most methods use: the best entries under a budget.

    In every KV head the ``count`` entries (one number, or one per head) with the highest scores
    stay; of equal scores the earlier entry.  Protected entries, the first ``sinks`` positions and
    the newest ``recent`` always stay, plus ``room`` other entries even if these fill the budget.

    ``by``: what scores an entry: the attention of the observed ``window``, the ``running`` score
    in the pool, how ``new`` it is, or the method's ``own`` score (``Policy.score``).
    ``kernel``, ``pool``: each score is replaced by the ``pool`` (mean or max) over it and its
    ``kernel`` - 1 nearest neighbours in the text.
    ``safeguard``: None: every head keeps ``count``.  Otherwise the heads of a layer compete for the
    same total (Ada-KV, 2407.11550, algorithm 1), and none keeps less than this share of ``count``.
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
    """Statistics of a layer's queries before rotation, times the softmax scale.

    mean : ``[heads, key_dim]``;  covariance : ``[heads, key_dim, key_dim]``;  sizes : ``[heads,
    pairs]``, the mean norm of each pair of channels that rotate together (``f`` and ``f + pairs``
    of a head; empty if the layer has no rotary positions).
    """

    mean: Tensor
    covariance: Tensor
    sizes: Tensor


@dataclass(frozen=True, slots=True)
class Needs:
    """What must be observed in a layer before the policy decides.

    ``window``: how many of the newest queries are scored (0: none); ``reduce``: how.
    ``remember``: the window's queries go into the ring of past queries that decoding scores with
    (otherwise only the newest query does); the same in every governed layer.
    ``column_sums``: the attention that each entry received from *all* new queries, per KV head.
    ``keys``, ``values``: those of the entries, for ``retain``.
    ``queries_from``: statistics of the text's queries from this token on, for ``retain``.
    ``ahead``: positions after the text (1 is the next token) that vectors are rotated to, averaged
    (``Observation.rotation``), for ``retain``.
    ``propagate``, ``retain``: the answer, if it is a rule; True: call the policy; None: keep all.
    ``among``: ranks by age ``(first, last)`` of the entries whose scores ``retain`` uses while
    decoding, the same tokens in every head; the scores of others may be 0.
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
    """The lengths on which a policy bases its decision, without any tensor.

    ``new_len``: tokens that enter the layer in this phase.  ``head_lens``: entries in the cache of
    each KV head, the new ones included; ``kept_len``: in the longest head; ``first_kept_len``: in
    the longest head of the first governed layer.  ``prompt_len``: length of the text that is being
    prefilled: the prompt, or in ``extend`` the added tokens.  ``seen_len``: tokens of the whole
    text.  In ``reread`` the text passes the layers a second time, after itself: ``new_len`` of
    these tokens enter the layer, and 0 after the last of them.
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
    """A layer as the policy sees it: the lengths and the tensors that it asked for.

    rule : the rule from ``Needs``, if there is one.
    positions : ``[kv_heads, n]`` original positions; for ``propagate`` ``[1, new_len]``.
    scores : ``[1 or kv_heads, n]`` window scores per entry, or None.
    column_sums, slot_scores : ``[kv_heads, n]`` or None.
    keys, values : ``[kv_heads, n, key_dim]`` as stored in the cache (rotated), and ``[kv_heads, n,
        value_dim]``, float32 or wider; or None.
    queries : statistics of the text's queries, if ``queries_from`` asked for them; or None.
    rotation : ``[key_dim, key_dim]``, maps a vector before rotation to the mean of its rotations to
        the positions ``ahead``; or None.  The identity if positions are not rotary.
    protected : ``[kv_heads or 1, n]`` bool, entries that must stay.
    kernels : selection kernels that are faster than torch, if the backend has them.

    ``n`` is the length of the longest head (``view.kept_len``).  A shorter head has its
    ``view.head_lens`` entries first, then padding: distinct negative positions, scores, keys and
    values of 0, and nothing protected.
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

    ``counts``: number of valid indices per head (the first ones), ``[kv_heads]``; None: all k.
    ``for_drafts``: nothing is dropped; these are the entries that drafts read.
    """

    indices: Tensor | None = None
    counts: Tensor | None = None
    for_drafts: bool = False


# --- what a layer is -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """Sizes of one attention layer.  ``window``: sliding window in tokens, None for no window."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None


# --- what a user gives and gets ------------------------------------------------------------------


class Logprob(NamedTuple):
    """Log-probabilities at one position: of the chosen token and of the most likely tokens.

    ``rank``: rank of the chosen token by probability, starting at 1.
    """

    token_id: int
    logprob: float
    top: dict[int, float]
    rank: int


@dataclass(frozen=True, slots=True)
class DraftUsage:
    """Draft statistics of a lossless request: ``drafted`` tokens were verified in
    ``verifications`` steps, and ``accepted`` of them were accepted."""

    drafted: int
    accepted: int
    verifications: int

    @property
    def acceptance(self) -> float:
        """Share of drafts that were accepted; 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_verification(self) -> float:
        """Mean tokens per verification, its own included; 0 if there was none."""
        done = self.verifications
        return (self.accepted + done) / done if done else 0.0


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds since arrival; ``None`` if the event did not happen.

    ``prefill_tokens_computed``: tokens that were computed in prefill, summed over layers and
    divided by the number of layers; ``computed_share`` is that divided by the prompt's length, and
    above 1 if the policy read the prompt a second time.
    ``drafts``: draft statistics; None if the request was not lossless.
    """

    queue_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float
    prefill_tokens_computed: float
    computed_share: float
    drafts: DraftUsage | None = None


@dataclass(frozen=True, slots=True)
class KVUsage:
    """The KV cache of a request, just before it was released.

    ``kept_len``: entries, ``[layers][kv_heads]``.  ``full_len``: entries that a full cache would
    hold in every head of a layer, ``[layers]``: ``seen_len``, or less in sliding layers.
    ``bytes``: bytes of its pages.  ``peak_bytes``: the most it held at any time, query rings and
    prefill buffers included.  ``full_bytes``: bytes of the pages of a full cache.
    ``keep_lowered_to``: the ``keep`` that it was lowered to under memory pressure, or None.
    ``host_bytes``: bytes of further pages in host memory (``offload_lossless``), which ``bytes``
    does not include.
    """

    seen_len: int
    kept_len: tuple[tuple[int, ...], ...]
    full_len: tuple[int, ...]
    bytes: int
    peak_bytes: int
    full_bytes: int
    keep_lowered_to: float | None = None
    host_bytes: int = 0

    @property
    def kept_share(self) -> float:
        """Entries in the cache as a share of a full cache's; never above 1."""
        return sum(self.layer_means) / sum(self.full_len) if self.seen_len else 0

    @property
    def layer_means(self) -> tuple[float, ...]:
        """Entries per layer, as a mean over its heads."""
        return tuple(sum(heads) / len(heads) for heads in self.kept_len)


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The output of a request.

    ``finish_reason``: ``"stop"`` (end of sequence, stop token or stop string), ``"length"``,
    ``"abort"`` or ``"error"`` (for example logits that are not finite); None while streaming.
    ``prompt_logprobs``: one per prompt token, None for the first one.
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
    """Log-probabilities of a given continuation after a context with a compressed cache.

    ``logprobs``: one per token of the continuation; ``greedy``: whether it is the most likely one.
    ``metrics`` and ``kv`` belong to the context, before the continuation was added.
    ``logits``: ``[continuation, vocab]`` float32 on the host, if requested.
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
    """Which tokens were kept where, for pictures and tests.

    ``prefill_positions[layer][head]`` and ``kept_positions[layer][head]``: sorted original
    positions ``[kept]`` after prefill and at the end.  ``kept_len_by_step[s][layer][head]``:
    entries after token ``s`` was cached.  ``prefill_logits``, ``final_logits``: ``[vocab]``, after
    the prompt and after the last token.  ``computed_by_layer``: prompt tokens that entered each
    layer, followed by the same for every further pass over the prompt.
    """

    prompt_token_ids: TokenIds
    prefill_positions: list[list[Tensor]]
    kept_positions: list[list[Tensor]]
    kept_len_by_step: list[list[list[int]]]
    token_ids: TokenIds
    prefill_logits: Tensor
    final_logits: Tensor
    computed_by_layer: list[int] = field(default_factory=list)
