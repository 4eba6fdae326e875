"""The series of a result's row: a policy, and how its cache and the weights were stored.

Rows of older results lack these fields; their caches and weights were stored in the model's own
dtype (``auto``).
"""

from __future__ import annotations

from pyramidinfer.lab.study import Row

__all__ = ["AUTO", "is_reference", "kv_dtype", "series", "weights"]

AUTO = "auto"


def kv_dtype(row: Row) -> str:
    return str(row.get("kv_dtype", AUTO))


def weights(row: Row) -> str:
    return str(row.get("weights", AUTO))


def series(row: Row) -> str:
    """The policy's spec, the kv dtype, and ``weights=`` with their format, separated by spaces;
    formats that are ``auto`` are omitted."""
    words = [row["policy"]]
    words += [kv_dtype(row)] if kv_dtype(row) != AUTO else []
    words += [f"weights={weights(row)}"] if weights(row) != AUTO else []
    return " ".join(words)


def is_reference(row: Row) -> bool:
    """Whether the row is the full cache, cache and weights in the model's own dtype: the reference
    of all comparisons."""
    return series(row) == "full"
