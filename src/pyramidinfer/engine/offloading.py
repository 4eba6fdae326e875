"""Limits of lossless requests with caches in host memory (``offload_lossless``).

The pool has the pages of the prompt that drafts read, all newer entries, and spare pages for one
layer of the other pages while drafts are verified (``cache/away.py``).
"""

from __future__ import annotations

import numpy as np

from pyramidinfer.cache import Away
from pyramidinfer.engine.checks import ContextLengthError
from pyramidinfer.engine.memory import Cost
from pyramidinfer.engine.shared import Shared
from pyramidinfer.policies import Policy
from pyramidinfer.types import Layers

__all__ = ["away_for", "check_offloaded", "is_offloaded", "offloaded_cost"]


def is_offloaded(shared: Shared, policy: Policy) -> bool:
    """Whether a request with this policy has its cache in host memory."""
    return shared.config.offload_lossless and policy.guesses


def away_for(shared: Shared, policy: Policy, length: int, layers: Layers) -> Away:
    """What may stay in the pool of a prompt of ``length`` tokens.  Host memory is reserved for all
    pages that may leave it: a forecast only bounds how many stay."""
    layout, kv_heads = shared.pool.layout, shared.runner.kv_heads
    chosen = policy.chooser.forecast(length, 0, layers).by_head(kv_heads)
    most = np.maximum(1, layout.pages_for(np.minimum(chosen, length)))
    most[~np.array(layers.governed)] = layout.pages_for(length)  # sliding layers stay in the pool
    pages = kv_heads * (length // layout.page_size)
    governed = [layer for layer, is_governed in enumerate(layers.governed) if is_governed]
    size = sum(shared.copier.block_bytes(layer, pages) for layer in governed)
    return Away(most, layout.page_size, size)


def offloaded_cost(
    shared: Shared, policy: Policy, length: int, max_new: int, layers: Layers, protected: int
) -> Cost:
    """The most memory in the pool that a request with its cache in host memory can need."""
    most = away_for(shared, policy, length, layers).most
    here = (most + 1) * shared.pool.page_size  # one page may not be full
    return shared.ledger.cost(policy, length, max_new, layers, protected, here=here)


def check_offloaded(shared: Shared, reserved: int, hold: bool, prefix: int) -> None:
    """``ValueError`` for a request that cannot have its cache in host memory."""
    if hold or prefix:
        raise ValueError(
            f"{'hold=True' if hold else f'prefix={prefix}'}: the cache of a lossless request is "
            f"in host memory here and cannot be continued; leave it out, or start the engine "
            f"without offload_lossless"
        )
    if reserved > shared.config.host_budget:
        raise ContextLengthError(
            f"the prompt's cache needs up to {reserved} bytes ({reserved / 2**20:.1f} MiB) of "
            f"host_kv_memory, which has {shared.config.host_budget}: raise it, or shorten the "
            f"prompt"
        )
