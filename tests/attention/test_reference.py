"""The reference backend against plain loops in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from pyramidinfer.attention import DecodePlan, Scale, available_backends, select_backend
from pyramidinfer.attention.base import Pages
from pyramidinfer.types import Reduce

HEADS, KV, DIM, VALUE = 4, 2, 8, 6
SCALES = [
    Scale(0.3),
    Scale(0.3, softcap=2.0),
    Scale(0.3, window=5),
    Scale(0.3, 2.0, 5),
    Scale(0.3, window=12),
]  # 12: more than there are entries, less than they span


def brute_weights(
    queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
) -> list[list[list[float]]]:
    """weights[head][query][entry], by the definition."""
    heads = queries.shape[1]
    result = []
    for head in range(heads):
        kv = head // (heads // keys.shape[0])
        rows = []
        for row in range(queries.shape[0]):
            logits = []
            for column in range(keys.shape[1]):
                value = float(queries[row, head].double() @ keys[kv, column].double()) * scale.scale
                if scale.softcap:
                    value = scale.softcap * math.tanh(value / scale.softcap)
                far = scale.window is not None and q_pos[row] - k_pos[kv, column] >= scale.window
                logits.append(-math.inf if k_pos[kv, column] > q_pos[row] or far else value)
            top = max(logits)
            exps = [math.exp(value - top) for value in logits]
            rows.append([value / sum(exps) for value in exps])
        result.append(rows)
    return result


def brute_out(weights: list[list[list[float]]], values: Tensor) -> Tensor:
    heads, rows = len(weights), len(weights[0])
    group = heads // values.shape[0]
    out = torch.zeros(rows, heads, values.shape[2], dtype=torch.float64)
    for head in range(heads):
        for row in range(rows):
            for column, weight in enumerate(weights[head][row]):
                out[row, head] += weight * values[head // group, column].double()
    return out


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("name", available_backends())
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("held", [0, 7])
def test_prefill(name: str, scale: Scale, dtype: torch.dtype, held: int) -> None:
    """New tokens on nothing, or on older entries in any order."""
    new = 9
    queries, keys, values = (
        random(1, new, HEADS, DIM, dtype=dtype),
        random(2, KV, held + new, DIM, dtype=dtype),
        random(3, KV, held + new, VALUE, dtype=dtype),
    )
    old = torch.stack([torch.randperm(held), torch.randperm(held)])
    fresh = torch.arange(held, held + 2 * new, 2)  # dropped tokens leave gaps
    k_pos = torch.cat([old, fresh.expand(KV, -1)], dim=1)
    out = select_backend(name).prefill(queries, keys, values, fresh, k_pos, scale)
    expected = brute_out(brute_weights(queries, keys, fresh, k_pos, scale), values)
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert out.dtype == dtype


@pytest.mark.parametrize("name", available_backends())
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_decode_over_ragged_pages(name: str, scale: Scale, dtype: torch.dtype) -> None:
    """Three requests whose heads have different lengths; everything outside their entries is
    NaN."""
    size, lengths = 4, [(1, 1), (11, 3), (6, 9)]
    pages = Pages(
        torch.full((14, size, DIM), math.nan, dtype=dtype),
        torch.full((14, size, VALUE), math.nan, dtype=dtype),
        torch.zeros(14, size, dtype=torch.int32),
    )
    tables = torch.tensor(
        [[[3, 0, 0], [11, 0, 0]], [[7, 1, 9], [4, 0, 0]], [[5, 2, 0], [8, 12, 6]]],
        dtype=torch.int32,
    )
    queries = random(4, 3, HEADS, DIM, dtype=dtype)
    q_pos = torch.tensor([0, 14, 9])
    expected, shares = [], []
    group = HEADS // KV
    for request, head in itertools.product(range(3), range(KV)):
        length = lengths[request][head]
        keys = random(10 + 2 * request + head, 1, length, DIM, dtype=dtype)
        values = random(20 + 2 * request + head, 1, length, VALUE, dtype=dtype)
        k_pos = torch.arange(int(q_pos[request]) - length + 1, int(q_pos[request]) + 1)
        k_pos = k_pos.flip(0)[None] if head else k_pos[None]  # order does not matter
        for entry in range(length):
            slot = tables[request, head, entry // size], entry % size
            pages.keys[slot] = keys[0, entry]
            pages.values[slot] = values[0, entry]
            pages.positions[slot] = k_pos[0, entry].int()
        weights = brute_weights(
            queries[request : request + 1, head * group : (head + 1) * group],
            keys,
            q_pos[request : request + 1],
            k_pos,
            scale,
        )
        expected.append(brute_out(weights, values)[0])
        shares.append(torch.tensor(weights, dtype=torch.float64)[:, 0].sum(0))
    backend = select_backend(name)
    plan = DecodePlan(tables[None], torch.tensor([lengths]), [11], q_pos)
    got = backend.run(plan, 0, queries, pages, scale, probs=True)
    torch.testing.assert_close(
        got.out.double(), torch.cat(expected).view(3, HEADS, VALUE), atol=TOLERANCE[dtype], rtol=0
    )
    assert got.probs is not None
    for found, share in zip(got.probs.flatten(0, 1), shares, strict=True):
        torch.testing.assert_close(
            found[: len(share)].double(), share, atol=TOLERANCE[dtype], rtol=0
        )
        assert not found[len(share) :].any()


@pytest.mark.parametrize("name", available_backends())
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("heads", ["mean", "max", "kv_mean", "kv_max"])
@pytest.mark.parametrize("rows", ["mean", "sum", "max"])
def test_window_scores(
    name: str, scale: Scale, heads: str, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reduced as asked, also when the window is worked on in several blocks."""
    from pyramidinfer.attention import reference

    monkeypatch.setattr(reference, "BLOCK", 100)
    queries, keys = random(5, 6, HEADS, DIM), random(6, KV, 20, DIM)
    q_pos, k_pos = torch.arange(14, 20), torch.arange(20).expand(KV, -1)
    weights = torch.tensor(brute_weights(queries, keys, q_pos, k_pos, scale), dtype=torch.float64)
    ramp = [1 + 0.5 * row / 5 for row in range(6)]
    grouped = weights.view(KV, HEADS // KV, 6, 20)
    over = {
        "mean": weights.mean(0)[None],
        "max": weights.amax(0)[None],
        "kv_mean": grouped.mean(1),
        "kv_max": grouped.amax(1),
    }[heads] * torch.tensor(ramp, dtype=torch.float64)[:, None]
    expected = {"mean": over.mean(1), "sum": over.sum(1), "max": over.amax(1)}[rows]
    got = select_backend(name).window_scores(
        queries,
        keys,
        q_pos,
        k_pos,
        scale,
        Reduce(heads, rows, 1.5),
        rows=6,  # type: ignore[arg-type]
    )
    torch.testing.assert_close(got.scores, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", available_backends())
def test_given_weights_are_not_renormalised(name: str) -> None:
    """With a stored log-sum-exp a weight stays what it was, whatever else was dropped since."""
    backend, scale = select_backend(name), Scale(0.3)
    queries, keys = random(7, 3, HEADS, DIM), random(8, KV, 12, DIM)
    q_pos, k_pos = torch.arange(9, 12), torch.arange(12).expand(KV, -1)
    reduce = Reduce("kv_mean", "mean")
    before = backend.window_scores(queries, keys, q_pos, k_pos, scale, reduce, rows=3)
    left = torch.tensor([0, 3, 4, 10])
    after = backend.window_scores(
        queries, keys[:, left], q_pos, k_pos[:, left], scale, reduce, rows=3, lse=before.lse
    )
    torch.testing.assert_close(after.scores, before.scores[:, left])


@pytest.mark.parametrize("name", available_backends())
def test_missing_rows_count_as_zero(name: str) -> None:
    backend, scale, reduce = select_backend(name), Scale(0.3), Reduce("mean", "mean", 2.0)
    queries, keys = random(7, 2, HEADS, DIM), random(8, KV, 12, DIM)
    q_pos, k_pos = torch.arange(10, 12), torch.arange(12).expand(KV, -1)
    weights = torch.tensor(brute_weights(queries, keys, q_pos, k_pos, scale), dtype=torch.float64)
    ramp = torch.linspace(1, 2, 5, dtype=torch.float64)[-2:]
    expected = (weights.mean(0) * ramp[:, None]).sum(0) / 5
    got = backend.window_scores(queries, keys, q_pos, k_pos, scale, reduce, rows=5)
    torch.testing.assert_close(got.scores[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", available_backends())
@pytest.mark.parametrize("scale", SCALES)
def test_column_sums(name: str, scale: Scale) -> None:
    queries, keys = random(5, 20, HEADS, DIM), random(6, KV, 20, DIM)
    pos = torch.arange(20)
    weights = torch.tensor(
        brute_weights(queries, keys, pos, pos.expand(KV, -1), scale), dtype=torch.float64
    )
    expected = weights.view(KV, HEADS // KV, 20, 20).sum((1, 2))
    got = select_backend(name).column_sums(queries, keys, pos, pos.expand(KV, -1), scale)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=0)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'flash' is unknown"):
        select_backend("flash")
