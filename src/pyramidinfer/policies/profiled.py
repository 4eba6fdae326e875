"""The base class of policies that use the model's head profile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

from pyramidinfer.policies.base import Facts, Policy
from pyramidinfer.policies.profile import Masks, Profile, load_heads
from pyramidinfer.types import Layers

__all__ = ["Profiled"]


class Profiled(Policy):
    """A policy with an option ``profile``: a ``Profile``, the path of one, or ``"auto"`` for the
    model's own, which the engine provides."""

    profile: Profile | Masks | str | None

    def load_profile(self) -> None:
        """Read the profile if a path is given; raises ``ValueError`` if it is not a profile."""
        if not isinstance(self.profile, Profile | Masks | str | Path | None):
            raise ValueError(f"profile={self.profile!r} must be a path, 'auto' or None")
        if isinstance(self.profile, str | Path) and self.profile != "auto":
            object.__setattr__(self, "profile", load_heads(self.profile))

    def bind(self, facts: Facts) -> Self:
        if self.profile == "auto":
            return replace(self, profile=facts.profile())  # type: ignore[call-arg]
        if isinstance(self.profile, Profile):
            facts.check(self.profile)
        return self

    def check(self, layers: Layers) -> None:
        if self.profile == "auto":  # checked when it is available
            return
        if not isinstance(self.profile, Profile | Masks):
            raise ValueError(
                f"policy {self.name!r} needs a head profile, and this model has none: "
                f"make one (pyramidinfer profile MODEL) or give profile=FILE"
            )
        share, shape = self.profile.share, (layers.count, layers.kv_heads)
        if (len(share), len(share[0])) != shape:
            raise ValueError(
                f"the profile has {len(share)} layers with {len(share[0])} KV heads, this model "
                f"has {shape[0]} with {shape[1]}: make its own (pyramidinfer profile MODEL)"
            )
