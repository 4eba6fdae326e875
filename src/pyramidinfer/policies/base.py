"""The questions every method answers.

A policy is a frozen dataclass whose fields are its options.  Its methods are pure: what it must
remember of a request is handed in and out as ``state`` (small host tensors).  It sees lengths and
tensors, never a module, a cache or a model's config.  Everything not overridden means "all".
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
    """``keep`` cannot be reached on a model of this depth; ``lowest``: it must be above this."""

    def __init__(self, message: str, lowest: float) -> None:
        super().__init__(message)
        self.lowest = lowest


class Facts(NamedTuple):
    """What a policy can be told of a model (``Policy.bind``), worked out when it is asked for.

    ``profile``: the model's head profile, None where there is none to be had;  ``check``: raises
    ``ValueError`` for a profile of other weights;  ``encoder``: what makes a text into token ids,
    None without a tokenizer.
    """

    profile: Callable[[], Profile | None]
    check: Callable[[Profile], None]
    encoder: Callable[[], Callable[[str], TokenIds] | None]


class Forecast(NamedTuple):
    """Upper bounds per layer.

    ``reach``: prompt tokens that enter the layer; ``kept``: entries its longest KV head holds from
    the end of its prefill to the end of generation.  ``heads``: the same of every head, ``[layers,
    kv_heads]``, where they differ.  ``total``: entries that a layer's heads hold together, where
    that is less than their bounds add up to.  ``sum``: the same of all layers, for a policy whose
    text is read again (``readings``) and cut when that is over.  ``working_bytes``: state beyond
    ``start``'s that is held while the prompt goes in.  ``anchors``: entries that stay in front of
    what is dropped, for a policy that streams.
    """

    reach: list[int]
    kept: list[int]
    heads: list[list[int]] | None = None
    total: list[int] | None = None
    sum: int | None = None
    working_bytes: int = 0
    anchors: int = 0

    def by_head(self, kv_heads: int) -> np.ndarray:
        """What every head holds at most, ``[layers, kv_heads]``."""
        if self.heads is not None:
            return np.array(self.heads)
        return np.repeat(np.array(self.kept)[:, None], kv_heads, 1)


@dataclass(frozen=True)
class Policy:
    """Keep everything: the defaults of every question."""

    name: ClassVar[str] = ""
    uses_scores: ClassVar[bool] = False  # asks the pool for a running score per entry
    computes_less: ClassVar[bool] = False  # may drop prompt tokens between layers
    evicts: ClassVar[bool] = False  # is to be asked while decoding
    streams: ClassVar[bool] = False  # rotary positions are places in the cache, so no text ends
    guesses: ClassVar[bool] = False  # tokens are guessed ahead and verified (Lossless)

    # --- what it is on a model ----------------------------------------------------------------

    def bind(self, facts: Facts) -> Policy:
        """The policy with what it wants to know of the model; ``ValueError`` where what it was
        given is of another one."""
        return self

    def check(self, layers: Layers) -> None:
        """Raise ``ValueError`` where the options cannot be met on a model of this depth
        (``KeepError`` where a higher ``keep`` could be)."""

    @property
    def chooser(self) -> Policy:
        """Who chooses among entries: itself; of a lossless policy, who says what drafts read."""
        return self

    @property
    def rule(self) -> str:
        """What its choices rest on beside the options, in a few words; ``""`` for nothing."""
        return ""

    # --- what stays ---------------------------------------------------------------------------

    def needs(self, view: View) -> Needs:
        """What to observe, and the answers that are rules.  Called often: ints only."""
        return NOTHING

    def score(self, seen: Observation) -> Tensor:
        """Scores of a rule ``by="own"``, ``[1 or kv_heads, n]`` (one row: all heads keep the same
        entries)."""
        raise NotImplementedError(f"{type(self).__name__} has no score of its own")

    def propagate(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which of the layer's new tokens enter the next layer: indices ``[1, k]``, ascending."""
        return choose(seen, self.score, goes_deeper=True), state

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        """Which entries stay in the layer's cache after prefill or extend, and while decoding.

        Where the text is read again (phase ``reread``) it is asked after each reading, to take
        down what that looked at: all stays then.  Once all was read ``view.new_len`` is 0.
        """
        return choose(seen, self.score), state

    def readings(self, text: Sequence[int], room: int, head: int = 0) -> list[TokenIds]:
        """What is read behind a text once it is in, while every layer still holds all of it: one
        after the other, each from the text's end on, and forgotten again.

        ``text``: the new tokens (at admission only their number counts);  ``room``: positions that
        there are behind it;  ``head``: tokens in front that the tokenizer puts before every text.
        ``ValueError`` where there are too few positions.
        """
        return []

    # --- what it remembers of a request -------------------------------------------------------

    def start(self, layers: Layers) -> State:
        """The state of a request that has not begun."""
        return {}

    def prefilled(self, view: View) -> State:
        """The state once a layer's prefill or extend is over (``view.kept_len`` is final)."""
        return view.state

    def truncated(self, state: State, kept: np.ndarray) -> State:
        """The state once the newest tokens were forgotten; ``kept``: entries now, ``[layers,
        kv_heads]``."""
        return state

    @property
    def slack(self) -> int:
        """Entries that a head may gather beyond its ``ceiling`` before it is cut."""
        return 0

    def ceiling(self, kept: np.ndarray, state: State, layers: Layers) -> np.ndarray:
        """Entries that heads are held to while decoding, ``[layers, 1 or kv_heads]``.

        ``kept``: entries now, ``[layers, kv_heads]``.  ``needs`` is asked of a layer only once one
        of its heads has more than this and the ``slack``; one that has as many now must not be
        due before it has more.  0: it is asked after every token.
        """
        return np.zeros((layers.count, 1), dtype=np.int64)

    def forecast_extended(self, text_len: int, max_new: int, layers: Layers) -> Forecast | None:
        """Upper bounds of what is kept once a further text has joined a cache, ``text_len`` tokens
        in all, however much was held before (its ``reach`` tells nothing); None: nothing of what
        was held is dropped then."""
        return None

    def tightened(self, keep: float, state: State, layers: Layers) -> tuple[Policy, State] | None:
        """The policy at a lower ``keep``, and the state of a request that decodes under it from
        now on; None where some layer would not be held to less."""
        return None

    # --- what it promises ---------------------------------------------------------------------

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        """Upper bounds for a request; admission rests on them."""
        return Forecast([prompt_len] * layers.count, [prompt_len + max_new] * layers.count)

    def ring(self, prompt_len: int, max_new: int) -> int:
        """Queries per layer that are looked back on while decoding (0: none)."""
        return 0

    @property
    def reads_again(self) -> bool:
        """Whether a text may be read again once it is in."""
        return type(self).readings is not Policy.readings

    @property
    def keeps_all(self) -> bool:
        """Whether a text computed anew gives the same cache."""
        return type(self).needs is Policy.needs


def asks_for_profile(policy: Policy) -> bool:
    """Whether the policy wants the model's head profile."""
    asked = []

    def profile() -> None:
        asked.append(policy)

    policy.bind(Facts(profile, lambda given: None, lambda: None))
    return bool(asked)


def check_keep(keep: object) -> None:
    """``ValueError`` unless ``keep`` is None or a share in (0, 1]."""
    if keep is not None and not (is_number(keep) and 0 < keep <= 1):  # type: ignore[operator]
        raise ValueError(f"keep={keep!r} must be above 0 and at most 1")
