"""R-KV: entries that are important and not redundant (Cai et al., 2505.24133).

Long answers repeat themselves.  Every ``buffer`` generated tokens a layer is cut back to its
budget.  The newest ``window`` entries stay; of the others, those with the highest ``mix`` x
importance - (1 - ``mix``) x redundancy stay, per KV head.  Importance is the attention of the
window's queries: the largest over the query heads that share the KV head, averaged over queries and
max-pooled over neighbours.  Redundancy is how similar an entry's key is to the other keys of its
head: the mean cosine similarity, followed by a softmax.  For every key, the newest of the other
similar keys (above ``threshold``) counts 0, so that of repeated content the last copy is penalised
least.

Deviations: weights are those of the model's attention, and the largest of the group is taken after
the softmax (the official code takes the largest logit, then a softmax over the entries outside the
window).  A key without similar keys changes nothing (in the official code the first entry then
counts 0).  A prompt over the budget is cut as well.  A further text (``extend``) that is shorter
than the window is scored by its own queries only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.config import check_share, check_whole, named_options
from pyramidinfer.policies.retaining import Buffered
from pyramidinfer.policies.rule import pool_neighbours
from pyramidinfer.policies.snapkv import check_kernel
from pyramidinfer.types import Best, Needs, Observation, Reduce, View

__all__ = ["RKV", "redundancy"]

#: Cosine similarities held in memory at a time (float32: 1 MiB).
BLOCK = 1 << 18


@named_options
@dataclass(frozen=True)
class RKV(Buffered):
    """Important and not redundant entries, per KV head.

    window : number of newest queries that score; the newest ``window`` entries always stay.
    kernel : neighbours over which importance is max-pooled (odd; 1 turns pooling off).
    mix : weight of importance; redundancy has weight 1 - ``mix``.
    threshold : cosine similarity above which two keys are similar.
    capacity : entries per layer after a cut (the paper shows 128 to 1536; not used with ``keep``).
    keep : replaces ``capacity``: see ``Retaining``; the budget also holds during generation, plus
        the buffer.
    """

    name: ClassVar[str] = "rkv"

    window: int = 8
    kernel: int = 7
    mix: float = 0.1
    threshold: float = 0.5
    capacity: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("window", self.window, 1)
        check_kernel(self.kernel)
        check_share("mix", self.mix)
        check_share("threshold", self.threshold)

    def floor(self) -> int:
        return self.window + 1

    def needs(self, view: View) -> Needs:
        if not view.layers.governed[view.layer]:
            return Needs()
        over, is_decode = self.over(view), view.phase == "decode"
        rule = Best(self.limit(view), "own", recent=self.window) if over else None
        reduce = Reduce("kv_max", "sum")
        return Needs(self.window, reduce, remember=not is_decode, keys=over, retain=rule)

    def score(self, seen: Observation) -> Tensor:
        assert seen.scores is not None and seen.keys is not None
        view = seen.view
        queries = min(self.window, view.prompt_len + view.seen_len - self.text_len(view))
        recent = seen.positions > view.seen_len - 1 - self.window
        context = torch.where(recent, 0.0, seen.scores / queries)  # left out of the pooling
        importance = pool_neighbours(context, seen.positions, self.kernel, "max", seen.kernels)
        redundant = redundancy(seen.keys, seen.positions, self.threshold)
        return self.mix * importance - (1 - self.mix) * redundant

    def ring(self, prompt_len: int, max_new: int) -> int:
        return self.window


def redundancy(keys: Tensor, positions: Tensor, threshold: float) -> Tensor:
    """Redundancy ``[kv_heads, n]``: softmax over a head's entries of their mean similarity.

    keys ``[kv_heads, n, key_dim]``, positions ``[kv_heads, n]`` (negative for the padding of a
    shorter head).  At most ``BLOCK`` similarities are in memory at a time, or one row.
    """
    keys, there = F.normalize(keys, dim=-1), positions >= 0
    alike = torch.zeros_like(keys[..., 0])
    size = keys.shape[1]
    step = max(1, BLOCK // size)
    for head, place in enumerate(positions):
        for start in range(0, size, step):
            rows = torch.arange(start, min(start + step, size), device=keys.device)
            cosines = keys[head, rows] @ keys[head].T
            cosines[rows - start, rows] = 0.0
            last, newest = torch.where(cosines > threshold, place, -1).max(1)
            found = last >= 0
            cosines[rows[found] - start, newest[found]] = 0.0
            alike[head] += cosines.sum(0)
    mean = alike / there.sum(1, keepdim=True)
    return torch.where(there, mean, -torch.inf).softmax(1)
