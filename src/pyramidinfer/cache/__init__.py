"""Where keys and values live: one paged pool, a table per request."""

from pyramidinfer.cache.group import GroupSpec, PoolExhausted
from pyramidinfer.cache.native import evict_best
from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.table import Ring, Table

__all__ = ["GroupSpec", "Pool", "PoolExhausted", "Ring", "Table", "evict_best"]
