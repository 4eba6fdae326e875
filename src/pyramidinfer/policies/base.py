"""The interface of a policy: the questions that every method answers.

A policy is a frozen dataclass whose fields are its options.  Its methods are pure: what it must
remember about a request is passed in and returned as ``state`` (small host tensors).  It sees
lengths and tensors, never a module, a cache or a model's config.  Every method that is not
overridden keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from torch import Tensor

from pyramidinfer.config import is_number
from pyramidinfer.policies.profile import Profile
from pyramidinfer.policies.rule import choose
from pyramidinfer.types import Keep, Layers, Needs, Observation, State, TokenIds, View

__all__ = ["Facts", "Forecast", "KeepError", "Policy", "asks_for_profile", "check_keep"]

NOTHING = Needs()


class KeepError(ValueError):
    """A model of this depth cannot meet ``keep``; ``lowest``: it must be above this value."""

    def __init__(self, message: str, lowest: float) -> None:
        super().__init__(message)
        self.lowest = lowest


class Facts(NamedTuple):
    """What a policy can learn about a model (``Policy.bind``), each computed on demand.

    ``profile``: returns the model's head profile, None if there is none;  ``check``: raises
    ``ValueError`` for a profile of other weights;  ``encoder``: returns a function from text to
    token ids, None without a tokenizer.
    """

    profile: Callable[[], Profile | None]
    check: Callable[[Profile], None]
    encoder: Callable[[], Callable[[str], TokenIds] | None]


class Forecast(NamedTuple):
    """Upper bounds per layer.

    ``reach``: prompt tokens that enter the layer.  ``kept``: entries that its longest KV head holds
    between the end of prefill and the end of generation.  ``heads``: the same for every head,
    ``[layers, kv_heads]``, where heads differ.  ``total``: entries that all heads of a layer hold
    together, where that is less than the sum of their bounds.  ``sum``: the same over all layers,
    for a policy that reads the text a second time (``readings``) and cuts it afterwards.
    ``working_bytes``: state during prefill, in addition to ``start``'s.  ``anchors``: entries that
    stay before the dropped ones, for a policy that streams.
    """

    reach: list[int]
    kept: list[int]
    heads: list[list[int]] | None = None
    total: list[int] | None = None
    sum: int | None = None
    working_bytes: int = 0
    anchors: int = 0

    def by_head(self, kv_heads: int) -> np.ndarray:
        """The most entries that each head holds, ``[layers, kv_heads]``."""
        if self.heads is not None:
            return np.array(self.heads)
        return np.repeat(np.array(self.kept)[:, None], kv_heads, 1)


@dataclass(frozen=True)
class Policy:
    """The base class of all policies; it keeps everything."""

    name: ClassVar[str] = ""
    uses_scores: ClassVar[bool] = False  # needs a running score per entry in the pool
    computes_less: ClassVar[bool] = False  # may drop prompt tokens between layers
    evicts: ClassVar[bool] = False  # is asked while decoding
    streams: ClassVar[bool] = False  # positions are places in the cache: no last position
    guesses: ClassVar[bool] = False  # drafts tokens and verifies them (Lossless)

    # --- what it is on a model ----------------------------------------------------------------

    def bind(self, facts: Facts) -> Policy:
        """The policy with what it needs to know about the model; raises ``ValueError`` if an
        option belongs to another model."""
        return self

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` if the options are impossible on a model of this depth
        (``KeepError`` if a higher ``keep`` would be possible)."""

    @property
    def chooser(self) -> Policy:
        """The policy that chooses entries: this one, or the one that chooses a lossless view."""
        return self

    @property
    def rule(self) -> str:
        """What decides besides the options (a profile, a calibration) in a few words, or ``""``."""
        return ""

    # --- what stays ---------------------------------------------------------------------------

    def needs(self, view: View) -> Needs:
        """What to observe, and answers in the form of rules.  Called often: uses ints only."""
        return NOTHING

    def score(self, seen: Observation) -> Tensor:
        """Scores for a rule ``by="own"``, ``[1 or kv_heads, n]`` (one row if all heads keep the
        same entries)."""
        raise NotImplementedError(f"{type(self).__name__} has no score of its own")

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """The new tokens that go to the next layer: indices ``[1, k]``, ascending."""
        return choose(seen, self.score, goes_deeper=True), state

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """The entries that stay in the layer's cache: after prefill or extend, and while decoding.

        If the text is read a second time (phase ``reread``), this is called after each reading to
        note its attention, and everything stays.  After the last reading ``view.new_len`` is 0.
        """
        return choose(seen, self.score), state

    def readings(self, text: Sequence[int], room: int, head: int = 0) -> list[TokenIds]:
        """Token sequences to read after the text, while every layer still holds all of it.  Each
        one starts at the end of the text, and its entries are removed again.

        ``text``: the new tokens (at admission only their number counts);  ``room``: positions left
        after it;  ``head``: tokens that the tokenizer puts before every text.  Raises
        ``ValueError`` if there are too few positions.
        """
        return []

    # --- what it remembers of a request -------------------------------------------------------

    def start(self, layers: Layers) -> State:
        """The state of a request that has not started."""
        return {}

    def prefilled(self, view: View) -> State:
        """The state after a layer's prefill or extend (``view.kept_len`` is final)."""
        return view.state

    def truncated(self, state: State, kept: np.ndarray) -> State:
        """The state after the newest tokens were removed; ``kept``: entries now, ``[layers,
        kv_heads]``."""
        return state

    @property
    def slack(self) -> int:
        """Entries that a head may hold above its ``ceiling`` before it is cut."""
        return 0

    def ceiling(self, kept: np.ndarray, state: State, layers: Layers) -> np.ndarray:
        """Entries that heads are limited to while decoding, ``[layers, 1 or kv_heads]``.

        ``kept``: entries now, ``[layers, kv_heads]``.  ``needs`` is called for a layer only when
        one of its heads has more entries than this plus the ``slack``.  A head with exactly this
        many entries must not be due before it has more.  0: ``needs`` is called after every token.
        """
        return np.zeros((layers.count, 1), dtype=np.int64)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        """Upper bounds after a further text was added to a cache, for ``text_len`` tokens in total
        and any previous cache (``reach`` is not used); None if nothing of the previous cache is
        dropped."""
        return None

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """The policy at a lower ``keep``, and the state of a request that decodes under it from
        now on; None if some layer's limit would not fall."""
        return None

    # --- what it promises ---------------------------------------------------------------------

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        """Upper bounds for a request; admission relies on them."""
        return Forecast([prompt_len] * layers.count, [prompt_len + max_new] * layers.count)

    def ring(self, prompt_len: int, max_new: int) -> int:
        """Past queries per layer that are kept for scoring while decoding (0: none)."""
        return 0

    @property
    def reads_again(self) -> bool:
        """Whether a text may be read a second time after prefill."""
        return type(self).readings is not Policy.readings

    @property
    def keeps_all(self) -> bool:
        """Whether recomputing a text gives the same cache."""
        return type(self).needs is Policy.needs


def asks_for_profile(policy: Policy) -> bool:
    """Whether the policy needs the model's head profile."""
    asked = []

    def profile() -> None:
        asked.append(policy)

    policy.bind(Facts(profile, lambda given: None, lambda: None))
    return bool(asked)


def check_keep(keep: object) -> None:
    """Raise ``ValueError`` unless ``keep`` is None or a share in (0, 1]."""
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):  # type: ignore[operator]
        raise ValueError(f"keep={keep!r} must be above 0 and at most 1")
