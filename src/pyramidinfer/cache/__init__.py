"""Where keys and values live: one paged pool, a table per request."""

from pyramidinfer.cache.pool import GroupSpec, Pool, PoolExhausted
from pyramidinfer.cache.table import Ring, Table

__all__ = ["GroupSpec", "Pool", "PoolExhausted", "Ring", "Table"]
