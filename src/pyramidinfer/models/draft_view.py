"""Which pages of a full cache a request's drafts read.

Pages, not entries: a page is read where it lies, so nothing is copied, and a draft's own entries
go where they stay if it is accepted.  Of every KV head the pages that hold most of what the policy
would keep, as many as those entries fill, the first one, and all pages that came later.
"""

from __future__ import annotations

import numpy as np

from pyramidinfer.cache import Table
from pyramidinfer.types import Keep

__all__ = ["DraftView"]


class DraftView:
    """Page numbers count within a head's own pages, so that they outlive a move to host memory.

    picks : ``[layers, kv_heads, n]`` pages that are read, of which ``counts`` ``[layers,
    kv_heads]`` count;  later : ``[layers, kv_heads]`` the page from which on all are read (0: all
    of them);  seen_len : tokens there were when it was chosen.
    """

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.picks = np.zeros((layers, kv_heads, 0), dtype=np.int64)
        self.counts = np.zeros((layers, kv_heads), dtype=np.int64)
        self.later = np.zeros((layers, kv_heads), dtype=np.int64)
        self.seen_len = 0

    def copy(self) -> DraftView:
        """Another one that reads the same."""
        twin = DraftView(*self.counts.shape)
        twin.picks, twin.counts = self.picks.copy(), self.counts.copy()
        twin.later, twin.seen_len = self.later.copy(), self.seen_len
        return twin

    def note(self, layer: int, keep: Keep, lens: np.ndarray, page_size: int, seen_len: int) -> None:
        """Take down what a policy would keep of a layer's ``lens`` ``[kv_heads]`` entries."""
        self.seen_len = seen_len
        self.later[layer] = self.counts[layer] = 0
        if keep.indices is None:
            return
        indices = keep.indices.cpu().numpy()
        counts = [indices.shape[1]] * len(lens) if keep.counts is None else keep.counts.tolist()
        for head, (count, held) in enumerate(zip(counts, lens // page_size, strict=True)):
            row = indices[head if len(indices) > 1 else 0][:count] // page_size
            hits = np.bincount(row, minlength=held)[:held]
            hits[:1] = page_size + 1
            most = min(-(-count // page_size), int((hits > 0).sum()))
            best = np.sort(np.argsort(-hits, kind="stable")[:most])
            if most > self.picks.shape[2]:
                more = ((0, 0), (0, 0), (0, most - self.picks.shape[2]))
                self.picks = np.pad(self.picks, more)
            self.picks[layer, head, :most] = best
            self.counts[layer, head], self.later[layer, head] = most, held

    def read(self, table: Table, page_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Pages ``[layers, kv_heads, n]`` of a table in the order in which drafts read them, and
        entries in them ``[layers, kv_heads]``."""
        newer = table.held - self.later
        width = int((self.counts + newer).max())
        at = np.arange(width)
        chosen = np.zeros((*self.counts.shape, width), dtype=np.int64)
        most = min(width, self.picks.shape[2])
        chosen[..., :most] = self.picks[..., :most]
        behind = self.later[..., None] + at - self.counts[..., None]
        index = np.where(at < self.counts[..., None], chosen, behind)
        index = np.minimum(index, table.pages.shape[2] - 1)
        pages = np.take_along_axis(table.pages, index, 2)
        return pages, table.kept - (self.later - self.counts) * page_size

    def share(self, entries: int, page_size: int) -> float:
        """What drafts read of a cache with so many entries in every head, as a share of it."""
        skipped = int(((self.later - self.counts) * page_size).sum())
        return 1 - skipped / (self.counts.size * entries)
