"""Sums of the tokens and entries that an evaluation's requests computed and kept."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Tally"]


@dataclass(slots=True)
class Tally:
    """Sums over the requests of one kind.

    ``scored``: tokens whose likelihood was requested;  ``on_prefix``: those of them in a window
    with a context of one token, where nothing can be compressed.
    """

    requests: int = 0
    tokens: int = 0
    computed: float = 0.0
    cached: int = 0
    kept: float = 0.0
    bytes: int = 0
    full_bytes: int = 0
    scored: int = 0
    on_prefix: int = 0

    def shares(self) -> dict[str, float]:
        """Counts and shares for the results; shares are relative to the full cache."""
        shares = {
            "requests": self.requests,
            "context_tokens": self.tokens,
            "computed_share": round(self.computed / max(1, self.tokens), 4),
            "kept_share": round(self.kept / max(1, self.cached), 4),
            "bytes_share": round(self.bytes / max(1, self.full_bytes), 4),
        }
        if self.scored:
            shares["scored_tokens"] = self.scored
            shares["scored_after_one_token"] = round(self.on_prefix / self.scored, 4)
        return shares
