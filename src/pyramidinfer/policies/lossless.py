"""Keep everything; another policy chooses what drafts read (self-speculative decoding).

The output equals that of the full cache, because the model verifies the draft tokens over all
entries.  The other policy only chooses which entries the drafts read.  It changes how many draft
tokens are accepted, never the output.  Drafting with a short view of a long cache comes from
TriForce (2404.11912) and MagicDec (2408.11049).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from pyramidinfer.policies.base import Facts, Policy
from pyramidinfer.policies.registry import POLICIES, make_policy
from pyramidinfer.types import Keep, Layers, Needs, Observation, State, View

__all__ = ["DRAFT_KEEP", "Lossless", "choose_policy"]

#: The share of the text that drafts read by default.
DRAFT_KEEP = 0.1


@dataclass(frozen=True)
class Lossless(Policy):
    """The full cache; drafts read the entries that ``drafts`` would keep.

    Raises ``ValueError`` for a policy that cannot choose entries of a full cache: one with running
    scores, or one that reads the text a second time.
    """

    name: ClassVar[str] = "lossless"
    guesses: ClassVar[bool] = True

    drafts: Policy

    def __post_init__(self) -> None:
        drafts = self.drafts
        if drafts.uses_scores or drafts.reads_again:
            why = "reads the text again" if drafts.reads_again else "keeps a running score"
            raise ValueError(
                f"lossless: policy {drafts.name!r} {why} and cannot choose what drafts read; "
                f"choose another one ('pyramid', 'snapkv', 'streaming_llm', …), or switch "
                f"lossless off"
            )

    def bind(self, facts: Facts) -> Policy:
        return replace(self, drafts=self.drafts.bind(facts))

    def check(self, layers: Layers) -> None:
        self.drafts.check(layers)

    @property
    def chooser(self) -> Policy:
        return self.drafts

    @property
    def rule(self) -> str:
        own = self.drafts.rule
        return f"nothing is dropped; drafts read what {self.drafts.name!r} keeps" + (
            own and f" ({own})"
        )

    @property
    def keeps_all(self) -> bool:
        return True

    # --- what drafts read ---------------------------------------------------------------------

    def needs(self, view: View) -> Needs:
        asked = self.drafts.needs(view)
        return replace(asked, propagate=None, retain=None if asked.retain is None else True)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        seen = replace(seen, rule=self.drafts.needs(seen.view).retain)
        keep, state = self.drafts.retain(seen, state)
        return keep._replace(for_drafts=True), state

    def start(self, layers: Layers) -> State:
        return self.drafts.start(layers)

    def prefilled(self, view: View) -> State:
        return self.drafts.prefilled(view)

    def truncated(self, state: State, kept: np.ndarray) -> State:
        return self.drafts.truncated(state, kept)

    def ring(self, prompt_len: int, max_new: int) -> int:
        return self.drafts.ring(prompt_len, max_new)


def choose_policy(
    policy: str | Policy, keep: float | None = None, lossless: bool = False, **options: Any
) -> Policy:
    """As ``make_policy``; with ``lossless``, the full cache with drafts by that policy.

    With ``full`` the default policy chooses what drafts read.  Without ``keep`` drafts read a
    tenth of the text, unless the policy has options that set its budget.
    """
    if not lossless:
        return make_policy(policy, keep, **options)
    if getattr(policy, "name", policy) == "full":
        policy = "pyramid"
    named = policy == "pyramid" or (policy in list(POLICIES) and not options)
    if named and keep is None and "keep" not in options:
        keep = DRAFT_KEEP
    return Lossless(make_policy(policy, keep, **options))
