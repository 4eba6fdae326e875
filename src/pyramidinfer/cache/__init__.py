"""The KV cache: one paged pool, and a table per request."""

from pyramidinfer.cache.away import Away
from pyramidinfer.cache.evict import evict_best
from pyramidinfer.cache.export import Copier, Exported
from pyramidinfer.cache.group import GroupSpec, PoolExhausted
from pyramidinfer.cache.layout import Layout, Place
from pyramidinfer.cache.pool import Pool
from pyramidinfer.cache.running import Weights
from pyramidinfer.cache.staging import Staging, send_away
from pyramidinfer.cache.table import Copying, Ring, Table

__all__ = [
    "Away",
    "Copier",
    "Copying",
    "Exported",
    "GroupSpec",
    "Layout",
    "Place",
    "Pool",
    "PoolExhausted",
    "Ring",
    "Staging",
    "Table",
    "Weights",
    "evict_best",
    "send_away",
]
