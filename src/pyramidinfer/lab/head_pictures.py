"""Pictures of a head profile: layers × heads, and a comparison with the loss from pruning one
layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pyramidinfer.lab.pictures import counted, save
from pyramidinfer.lab.study import Row
from pyramidinfer.policies.profile import Profile

__all__ = ["draw_heads", "draw_profile"]

#: Divergences below this are rounding noise and drawn as this value.
LEAST = 1e-7


def draw_profile(profile: Profile, path: Path) -> Path:
    """How much of a text every KV head needs: layers down, heads across."""
    figure = Figure(figsize=(_width(profile), _height(profile)), layout="constrained")
    axis = figure.subplots()
    _map(figure, axis, profile)
    return save(figure, path)


def draw_heads(profile: Profile, rows: Sequence[Row], path: Path) -> Path:
    """The profile, and per layer the mean of its heads and the divergence when it is pruned.

    rows : of the study, one per layer; ``kl`` is None if a layer was not pruned.
    """
    width = _width(profile)
    figure = Figure(figsize=(width + 5.2, _height(profile)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[width, 5.2])
    _map(figure, left, profile)
    mine = [row for row in rows if row["governed"] and row["kl"] is not None]
    layers = [row["layer"] for row in mine]
    means = [row["mean"] for row in mine]
    right.plot(means, layers, marker="o", markersize=3.5, color="#1f6f9c")
    right.set_ylim(profile.layers - 0.5, -0.5)
    right.set_xlabel("mean share of its heads", color="#1f6f9c")
    right.set_xlim(left=0)
    other = right.twiny()
    losses = [max(row["kl"], LEAST) for row in mine]
    other.plot(losses, layers, marker="s", markersize=3.5, color="#c4561c")
    other.set_xscale("log")
    other.set_xlabel(
        f"divergence with {mine[0]['pruned_to']:.0%} of it kept, nats per token, {counted(mine)}",
        color="#c4561c",
    )
    right.set_ylabel("layer")
    right.grid(alpha=0.25)
    return save(figure, path)


def _width(profile: Profile) -> float:
    return 2.6 + min(7.0, 0.42 * max(map(len, profile.share)))


def _height(profile: Profile) -> float:
    return min(12.0, 1.6 + 0.24 * profile.layers)


def _map(figure: Figure, axis: Any, profile: Profile) -> None:
    widest = max(map(len, profile.share))
    values = np.full((profile.layers, widest), np.nan)
    for layer, row in enumerate(profile.share):
        if profile.governed[layer]:
            values[layer, : len(row)] = row
    axis.set_facecolor("0.88")
    image = axis.imshow(values, aspect="auto", cmap="magma_r", vmin=0, vmax=1, origin="upper")
    every = -(-profile.layers // 16)
    axis.set_yticks(range(0, profile.layers, every))
    axis.set_xticks(range(0, widest, -(-widest // 12)))
    axis.set_xlabel("KV head")
    axis.set_ylabel("layer")
    grey = "" if all(profile.governed) else "; grey: bounded by a window"
    axis.set_title(
        f"entries needed, agreement {profile.agreement:.2f}{grey}", loc="left", fontsize=9
    )
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.08)
    bar.set_label(f"share of a head's entries among the best {profile.kept:.0%} of all")
