"""Keep everything: the baseline that every other policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyramidinfer.config import named_options
from pyramidinfer.policies.base import Policy, check_keep

__all__ = ["Full"]


@named_options
@dataclass(frozen=True)
class Full(Policy):
    """The full cache.

    keep : only 1 is allowed, because nothing is dropped.
    """

    name: ClassVar[str] = "full"

    keep: float | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep not in (None, 1, 1.0):
            raise ValueError(
                f"keep={self.keep}: policy 'full' keeps everything; choose another policy to drop"
            )
