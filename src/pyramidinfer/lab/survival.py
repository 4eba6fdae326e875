"""Which tokens of one prompt survive to which layer: figures, a picture and an interactive page.

A token *reached* a layer if it was computed there; its entry is *kept* by the KV heads that hold
it after prefill (and at the end, if tokens were generated).  In addition there is a *score* that is
independent of the policy: the attention that the token got in that layer from the prompt's newest
``WINDOW`` queries (those that reached the layer), mean over heads and queries, from the same pass.
"""

from __future__ import annotations

import base64
import html
import json
import random
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from pyramidinfer.engine import LLM
from pyramidinfer.lab.icr import publish
from pyramidinfer.lab.pictures import save
from pyramidinfer.lab.plans import MapPlan
from pyramidinfer.lab.rac import Newest, watch
from pyramidinfer.lab.recall import make_question
from pyramidinfer.lab.study import Row, run_cells
from pyramidinfer.policies import Policy
from pyramidinfer.types import TokenIds

__all__ = [
    "MapPlan",
    "Survival",
    "draw_map",
    "measure_survival",
    "page",
    "run_map",
    "survival",
    "visible",
]

WINDOW = 32
GONE, PASSED, KEPT = (0.93, 0.94, 0.96), (0.77, 0.80, 0.85), (0.17, 0.36, 0.63)
NEEDLE = (0.86, 0.25, 0.16)
Spans = list[list[int]]


@dataclass(frozen=True)
class Survival:
    """The survival of a prompt's n tokens (``tokens`` also has the generated ones).

    reached : ``[layers, n]`` computed in the layer;  kept, end : ``[layers, heads, tokens]`` held
    by a KV head after the prompt, and at the end;  heads : KV heads of each layer;
    scores : ``[layers, n]`` mean attention from the newest ``window`` queries, NaN if the
    token did not reach the layer;  needle : the span of the fact in question, if known.
    """

    title: str
    tokens: list[str]
    prompt_len: int
    heads: list[int]
    reached: np.ndarray
    kept: np.ndarray
    end: np.ndarray
    scores: np.ndarray
    window: int
    needle: list[int] | None

    @property
    def shares(self) -> np.ndarray:
        """Share of a layer's KV heads that hold a token after the prompt, ``[layers, n]``."""
        shares: np.ndarray = self.kept.sum(1)[:, : self.prompt_len] / np.array(self.heads)[:, None]
        return shares

    @property
    def headline(self) -> str:
        """Policy, options, and the shares of layer-tokens computed and kept."""
        computed, kept = float(self.reached.mean()), float(self.shares.mean())
        return f"{self.title}: {computed:.0%} of layer-tokens computed, {kept:.0%} kept"


def run_map(plan: MapPlan, policy: Policy, out: Path) -> tuple[Path, Path]:
    """Measure, write ``out`` and draw a picture; returns the paths of the picture and the page."""
    llm = plan.subject.llm(policy)
    prompt, needle = _prompt(plan, llm)
    name = policy.name
    configuration = {
        "subject": asdict(plan.subject),
        "policy": name,
        "options": repr(policy),
        "max_tokens": plan.max_tokens,
        "score_window": WINDOW,
        "needle": needle,
        "prompt_token_ids": prompt,
    }
    work = partial(_work, llm, prompt, plan.max_tokens)
    generated, *rows = run_cells("map", configuration, [{"policy": name}], work, out)
    publish(out, rows, **generated)
    title = " ".join([name, *(f"{key}={value}" for key, value in _changed(policy))])
    tokens = texts(llm.tokenizer, prompt + generated["generated_token_ids"])
    found = survival(rows, title, tokens, len(prompt), needle)
    out.with_suffix(".html").write_text(page(found), encoding="utf-8")
    return draw_map(found, out.with_suffix(".png")), out.with_suffix(".html")


def _work(llm: LLM, prompt: TokenIds, max_tokens: int, cell: dict[str, Any]) -> list[Row]:
    generated, rows = measure_survival(llm, prompt, max_tokens)
    return [{"generated_token_ids": generated}, *rows]


def measure_survival(llm: LLM, prompt: TokenIds, max_tokens: int) -> tuple[TokenIds, list[Row]]:
    """The generated tokens, and a row per layer.

    reached : spans ``[start, stop)`` of positions computed there;  kept, kept_at_end : spans of
    the entries of each KV head;  scores : of each prompt token, None if it did not reach the layer.
    """
    length, depth = len(prompt), llm.engine.runner.depth
    reached = torch.zeros(depth, length, dtype=torch.bool)
    mass = torch.zeros(depth, length, dtype=torch.float64)
    queries = [0] * depth

    def take(seen: Newest) -> None:
        reached[seen.layer, seen.reached.cpu()] = True
        mass[seen.layer].index_add_(0, seen.positions.cpu(), seen.weights.sum(0).double().cpu())
        queries[seen.layer] += len(seen.weights)

    with watch(llm, max(0, length - WINDOW), length, take):
        trace = llm.trace(prompt, max_tokens)
    rows = []
    for layer in range(depth):
        scores = (mass[layer] / max(1, queries[layer])).tolist()
        kept, end = trace.prefill_positions[layer], trace.kept_positions[layer]
        rows.append(
            {
                "layer": layer,
                "computed_share": float(reached[layer].double().mean()),
                "kept_share": sum(map(len, kept)) / (len(kept) * length),
                "kept_at_end_share": sum(map(len, end)) / (len(end) * (length + max_tokens)),
                "reached": _spans(reached[layer].nonzero()[:, 0].tolist()),
                "kept": [_spans(head) for head in map(torch.Tensor.tolist, kept)],
                "kept_at_end": [_spans(head) for head in map(torch.Tensor.tolist, end)],
                "scores": [
                    float(f"{score:.4g}") if there else None
                    for score, there in zip(scores, reached[layer].tolist(), strict=True)
                ],
            }
        )
    return trace.token_ids, rows


def survival(
    rows: list[Row], title: str, tokens: list[str], prompt_len: int, needle: list[int] | None
) -> Survival:
    """The rows as arrays."""
    whole = len(tokens)
    heads = max(len(row["kept"]) for row in rows)

    def fill(name: str) -> np.ndarray:
        held = np.zeros((len(rows), heads, whole), dtype=bool)
        for row in rows:
            for head, spans in enumerate(row[name]):
                for start, stop in spans:
                    held[row["layer"], head, start:stop] = True
        return held

    reached = np.zeros((len(rows), prompt_len), dtype=bool)
    for row in rows:
        for start, stop in row["reached"]:
            reached[row["layer"], start:stop] = True
    scores = np.array([row["scores"] for row in rows], dtype=np.float32)  # None becomes NaN
    return Survival(
        title,
        [visible(token) for token in tokens],
        prompt_len,
        [len(row["kept"]) for row in rows],
        reached,
        fill("kept"),
        fill("kept_at_end"),
        scores,
        WINDOW,
        needle,
    )


def _prompt(plan: MapPlan, llm: LLM) -> tuple[TokenIds, list[int] | None]:
    """The prompt's tokens, and the span of the fact it asks for, if known."""
    if plan.prompt is not None:
        return llm.encode(plan.prompt), None
    corpus = replace(plan.subject, text=None).corpus()
    if not corpus.has_marks:
        return corpus.needles(plan.seed, 1, plan.context)[0].prompt, None
    question = make_question(random.Random(f"map {plan.seed}"), plan.context)
    return llm.encode(question.prompt), list(question.needle)


def texts(tokenizer: Any, ids: TokenIds) -> list[str]:
    """Each token's text, or its number without a tokenizer."""
    if tokenizer is None:
        return [f"#{token}" for token in ids]
    return [tokenizer.decode([token]) for token in ids]


def visible(text: str) -> str:
    """The text with marks in place of characters that are invisible or would break the layout."""
    marks = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥", "": "∅"}
    if text in marks:
        return marks[text]
    return "".join(
        marks.get(each, f"<U+{ord(each):04X}>")
        if unicodedata.category(each)[0] in "CZ" and each != " "
        else each
        for each in text
    )


def _changed(policy: Policy) -> Iterable[tuple[str, Any]]:
    """A policy's options that are not the method's own."""
    for name, field in type(policy).__dataclass_fields__.items():
        value = getattr(policy, name)
        if value != field.default:
            yield name, value


def _spans(positions: list[int]) -> Spans:
    """Ascending positions as spans ``[start, stop)``."""
    spans: Spans = []
    for position in positions:
        if spans and spans[-1][1] == position:
            spans[-1][1] += 1
        else:
            spans.append([position, position + 1])
    return spans


def draw_map(found: Survival, path: Path) -> Path:
    """Layers × positions, and each layer's shares next to it."""
    depth, length = found.reached.shape
    figure = Figure(figsize=(13, 1.9 + 0.19 * min(max(depth, 12), 40)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[6, 1], sharey=True)
    image = np.where(found.reached[..., None], np.array(PASSED), np.array(GONE))
    shares = found.shares[..., None]
    image = np.where(shares > 0, (1 - shares) * np.array(PASSED) + shares * np.array(KEPT), image)
    image = image.repeat(24, axis=0)  # blends neighbours along the text only
    left.imshow(
        image,
        aspect="auto",
        interpolation="antialiased",
        origin="upper",
        extent=(0, length, depth - 0.5, -0.5),
    )
    key = [
        Patch(color=KEPT, label="kept (paler: by some KV heads)"),
        Patch(color=PASSED, label="computed, not kept"),
        Patch(color=GONE, label="not computed"),
    ]
    if found.needle is not None:
        start, stop = found.needle
        frame = Rectangle(
            (start - 0.5, -0.5),
            stop - start + 1,
            depth,
            fill=False,
            edgecolor=NEEDLE,
            linewidth=1.2,
            label="the fact asked for",
        )
        key.append(left.add_patch(frame))
    every = -(-depth // 20)
    left.set_yticks(range(0, depth, every), [str(layer) for layer in range(0, depth, every)])
    left.set_xlabel("position in the prompt")
    left.set_ylabel("layer")
    figure.suptitle(found.headline, x=0.01, ha="left", fontsize=11)
    rows = np.arange(depth)
    right.barh(rows, found.reached.mean(1), height=0.8, color=PASSED)
    right.barh(rows, found.shares.mean(1), height=0.8, color=KEPT)
    right.set_xlim(0, 1)
    right.set_xlabel("share of the prompt")
    right.spines[["top", "right"]].set_visible(False)
    figure.legend(handles=key, loc="outside lower left", ncols=len(key), frameon=False, fontsize=9)
    return save(figure, path)


# --- the page -------------------------------------------------------------------------------------


def page(found: Survival) -> str:
    """One self-contained HTML file.  Arrays are base64, layer by layer, token by token:
    a byte (``reached``), a bit per KV head (``kept``), a little-endian float32 (``scores``)."""

    def pack(array: np.ndarray) -> str:
        return base64.b64encode(array.tobytes()).decode()

    def heads(held: np.ndarray) -> str:
        return pack(np.packbits(held.transpose(0, 2, 1), axis=2, bitorder="little"))

    data = {
        "tokens": found.tokens,
        "prompt": found.prompt_len,
        "heads": found.heads,
        "window": found.window,
        "needle": found.needle,
        "reached": pack(found.reached),
        "kept": heads(found.kept),
        "end": heads(found.end),
        "scores": pack(found.scores.astype("<f4")),
    }
    text = json.dumps(data)  # ASCII only
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    parts = {"title": html.escape(found.headline), "data": text}
    frame = (Path(__file__).parents[1] / "assets" / "survival.html").read_text(encoding="utf-8")
    return re.sub("@(title|data)@", lambda match: parts[match[1]], frame)
