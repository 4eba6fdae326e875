"""The series of a result's row: a policy, and how its cache was stored.

Rows of results from before quantized caches have no such field; their caches were stored in the
model's own dtype (``auto``).
"""

from __future__ import annotations

from pyramidinfer.lab.study import Row

__all__ = ["AUTO", "is_reference", "kv_dtype", "series"]

AUTO = "auto"


def kv_dtype(row: Row) -> str:
    return str(row.get("kv_dtype", AUTO))


def series(row: Row) -> str:
    """The policy's spec and, after a blank, how its cache was stored unless that is ``auto``."""
    return row["policy"] if kv_dtype(row) == AUTO else f"{row['policy']} {kv_dtype(row)}"


def is_reference(row: Row) -> bool:
    """Whether the row is the full cache in the model's own dtype, the reference of all
    comparisons."""
    return series(row) == "full"
