"""The pages of a full cache that a request's drafts read.

A draft view selects pages, not entries, so nothing is copied, and the entries of accepted draft
tokens stay in place.  For every KV head it has the pages with most of the entries that the policy
would keep (as many pages as these entries fill), the first page, and all later pages.
"""

from __future__ import annotations

import numpy as np

from pyramidinfer.cache import Table
from pyramidinfer.types import Keep

__all__ = ["DraftView"]


class DraftView:
    """Page numbers are relative to a head's own pages, so they stay valid after offloading to host.

    picks : ``[layers, kv_heads, n]`` pages to read, of which the first ``counts``
    ``[layers, kv_heads]`` are valid;  later : ``[layers, kv_heads]``, the page from which on all
    are read (0: all pages);  seen_len : number of tokens when the view was chosen.
    """

    def __init__(self, layers: int, kv_heads: int) -> None:
        self.picks = np.zeros((layers, kv_heads, 0), dtype=np.int64)
        self.counts = np.zeros((layers, kv_heads), dtype=np.int64)
        self.later = np.zeros((layers, kv_heads), dtype=np.int64)
        self.seen_len = 0

    def copy(self) -> DraftView:
        """A copy that reads the same pages."""
        twin = DraftView(*self.counts.shape)
        twin.picks, twin.counts = self.picks.copy(), self.counts.copy()
        twin.later, twin.seen_len = self.later.copy(), self.seen_len
        return twin

    def note(self, layer: int, keep: Keep, lens: np.ndarray, page_size: int, seen_len: int) -> None:
        """Record the entries that a policy would keep of a layer's ``lens`` ``[kv_heads]``
        entries."""
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
        the number of entries in them ``[layers, kv_heads]``."""
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
        """The share that drafts read of a cache with this number of entries in every head."""
        skipped = int(((self.later - self.counts) * page_size).sum())
        return 1 - skipped / (self.counts.size * entries)
