"""Recent attention consistency: do recent tokens agree on which context matters?

The measurement of the PyramidInfer paper (arXiv 2405.12532, section 3.2).  A text of n tokens is
split at relative distance d = (n - i) / n = 30 % from its end (i = 1 … n counts tokens): the
earlier tokens are the context, the later ones are recent.  Each recent token's attention, mean over
heads, ranks the context; its set is the top 80 % of the context's tokens.  The result is the share
of this set that is also in the last token's set.  Two random sets would share 80 %.

``single``: ranked by the token's own attention.  ``ensemble``: ranked by the mean over the 20 % of
the text that end at the token, weighted linearly from 1 to 1.2; as in every window score, a token
gets no weight from queries before it.

The weights are those of the engine's attention: the backend itself scores every recent query.
Layers whose sliding window is shorter than the text are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer.attention import Backend, Scale
from pyramidinfer.config import accumulate_dtype
from pyramidinfer.engine import LLM
from pyramidinfer.lab.icr import bootstrap, publish
from pyramidinfer.lab.pictures import draw_rac
from pyramidinfer.lab.plans import RacPlan
from pyramidinfer.lab.samples import Subject, settings
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Full
from pyramidinfer.types import Reduce, TokenIds

__all__ = ["MODES", "Newest", "NewestRows", "RacPlan", "measure_text", "run_rac", "watch"]

RECENT, WINDOW, NEWEST_WEIGHT = 0.3, 0.2, 1.2
MODES = ("single", "ensemble")


def run_rac(plan: RacPlan, out: Path, workers: int = 1) -> Path:
    """Measure, write ``out`` and draw a picture; returns the picture's path."""
    plan = replace(plan, tops=tuple(dict.fromkeys(plan.tops)))
    cells = [{"passage": index} for index in range(plan.samples)]
    configuration = {
        **settings(plan),
        "recent": RECENT,
        "window": WINDOW,
        "newest_weight": NEWEST_WEIGHT,
    }
    found = run_cells("rac", configuration, cells, partial(_work, plan), out, workers)
    rows = _summarise(found, plan.bins)
    publish(out, rows)
    return draw_rac(rows, out.with_suffix(".png"))


def _work(plan: RacPlan, cell: dict[str, Any]) -> list[Row]:
    text = _texts(plan)[cell["passage"]]
    return measure_text(_llm(plan.subject), text, plan.tops, plan.bins)


def measure_text(llm: LLM, tokens: TokenIds, tops: tuple[float, ...], bins: int) -> list[Row]:
    """One row per layer, top and mode; ``overlaps``: the mean in each bin of distance.

    ``llm`` keeps everything (policy ``Full``).
    """
    length = len(tokens)
    recent, window = math.ceil(RECENT * length), max(1, int(WINDOW * length))
    context = length - recent
    governed = llm.engine.runner.layers_for(length).governed
    places = _places(length, recent, bins)
    ramp = _ramp(recent, window)
    rows: list[Row] = []
    parts: list[Tensor] = []

    def take(seen: Newest) -> None:
        """Collect a layer's rows chunk by chunk; compare them when all have arrived."""
        found = seen.weights[:, :context]  # earlier chunks have not seen the whole context
        parts.append(F.pad(found, (0, context - found.shape[1])))
        if sum(len(part) for part in parts) < recent + window - 1:
            return
        attention = torch.cat(parts)
        parts.clear()
        if not governed[seen.layer]:
            return
        ranked = (attention[window - 1 :], ramp.to(attention) @ attention)
        for top in tops:
            count = max(1, int(top * context))
            for mode, each in zip(MODES, ranked, strict=True):
                overlaps = _overlaps(each, count)[:-1]
                means = [float(overlaps[places == index].mean()) for index in range(bins)]
                rows.append(
                    {
                        "layer": seen.layer,
                        "top": top,
                        "mode": mode,
                        "overlaps": means,
                        "chance": count / context,
                    }
                )

    with watch(llm, length - (recent + window - 1), length, take):
        llm.trace(tokens)
    return rows


def _places(length: int, recent: int, bins: int) -> np.ndarray:
    """The bin of each recent token but the last, ``[recent - 1]``, oldest first."""
    distances = np.arange(recent - 1, 0, -1) / length
    places: np.ndarray = np.minimum((distances / RECENT * bins).astype(int), bins - 1)
    return places


def _ramp(recent: int, window: int) -> Tensor:
    """Weights ``[recent, recent + window - 1]`` that make ensembles of a matrix's rows."""
    ramp = torch.zeros(recent, recent + window - 1, dtype=torch.float64)
    row = torch.arange(recent)[:, None]
    weights = torch.linspace(1.0, NEWEST_WEIGHT, window, dtype=torch.float64)
    ramp[row, row + torch.arange(window)] = weights / weights.sum()
    return ramp


def _overlaps(scores: Tensor, count: int) -> np.ndarray:
    """The share of each row's ``count`` best columns that are also among the last row's:
    ``[rows]``.

    Among equal scores, the earlier column wins.
    """
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    in_last = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    in_last[best[-1]] = True
    shared: np.ndarray = in_last[best].double().mean(1).cpu().numpy()
    return shared


# --- looking at attention while a prompt goes in --------------------------------------------------


class Newest(NamedTuple):
    """One chunk of a prompt in one layer.

    reached : ``[new]`` positions of the tokens computed;  positions : ``[entries]`` in the cache;
    weights : ``[rows, entries]`` attention of the watched queries, mean over heads.
    """

    layer: int
    reached: Tensor
    positions: Tensor
    weights: Tensor


Take = Callable[[Newest], None]


class NewestRows:
    """A backend that also reports the attention of a prompt's newest queries, from position
    ``first`` on.  For one prompt at a time; all other work, and positions from ``end`` on (a prompt
    that is read again), go to the ``inner`` backend."""

    prefill_scored = None  # everything comes through prefill

    def __init__(self, inner: Backend, first: int, end: int, take: Take) -> None:
        self.inner, self.first, self.end, self.take = inner, first, end, take
        self.layer, self.last = -1, -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def prefill(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        q_pos: Tensor,
        k_pos: Tensor,
        scale: Scale,
    ) -> Tensor:
        if int(q_pos[0]) >= self.end:
            return self.inner.prefill(queries, keys, values, q_pos, k_pos, scale)
        if self.layer < 0 or int(q_pos[0]) <= self.last:  # next layer: positions start again
            self.layer += 1
        self.last = int(q_pos[-1])
        weights = self._weights(queries, keys, q_pos, k_pos, scale)
        self.take(Newest(self.layer, q_pos, k_pos[0], weights))
        return self.inner.prefill(queries, keys, values, q_pos, k_pos, scale)

    def _weights(
        self, queries: Tensor, keys: Tensor, q_pos: Tensor, k_pos: Tensor, scale: Scale
    ) -> Tensor:
        high = accumulate_dtype(queries.dtype)
        watched = (q_pos >= self.first).nonzero()[:, 0].tolist()
        found = torch.empty(len(watched), keys.shape[1], dtype=high, device=keys.device)
        if watched:
            queries, keys = queries.to(high), keys.to(high)
        for row, at in enumerate(watched):
            one = slice(at, at + 1)
            found[row] = self.inner.window_scores(
                queries[one], keys, q_pos[one], k_pos, scale, Reduce("mean", "sum"), rows=1
            ).scores[0]
        return found


@contextmanager
def watch(llm: LLM, first: int, end: int, take: Take) -> Iterator[None]:
    """In this context, ``take`` receives every prefilled chunk of the one prompt of ``end``
    tokens."""
    runner = llm.engine.runner
    chosen = runner.chosen
    watching = cast(Backend, NewestRows(chosen.attention, first, end, take))
    runner.chosen = replace(chosen, attention=watching, every_row=True)
    try:
        yield
    finally:
        runner.chosen = chosen


@lru_cache(maxsize=1)
def _llm(subject: Subject) -> LLM:
    return subject.llm(Full())


@lru_cache(maxsize=1)
def _texts(plan: RacPlan) -> list[TokenIds]:
    passages = plan.subject.corpus().passages(plan.seed, plan.samples, plan.context, 1)
    return [passage.context for passage in passages]


# --- from texts to rows ---------------------------------------------------------------------------


def _summarise(found: list[Row], bins: int) -> list[Row]:
    """One row per layer, top, mode and bin, over all texts."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["layer"], row["top"], row["mode"]), []).append(row)
    rows: list[Row] = []
    for (layer, top, mode), texts in groups.items():
        overlaps = np.array([text["overlaps"] for text in texts])
        for index in range(bins):
            low, high = bootstrap(overlaps[:, index], np.ones(len(texts)))
            rows.append(
                {
                    "layer": layer,
                    "top": top,
                    "mode": mode,
                    "distance_low": RECENT * index / bins,
                    "distance_high": RECENT * (index + 1) / bins,
                    "overlap": float(overlaps[:, index].mean()),
                    "low": low,
                    "high": high,
                    "chance": texts[0]["chance"],
                    "samples": len(texts),
                }
            )
    return rows
