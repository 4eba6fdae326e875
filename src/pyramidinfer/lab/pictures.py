"""Pictures of the studies, and the frame of the page that ``study map`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from pyramidinfer.lab.study import Row

__all__ = ["PAGE", "draw_icr", "draw_rac", "save"]


def draw_icr(rows: list[Row], path: Path) -> Path:
    """Perplexity over the share kept, a line per layer; and the divergence of every cell."""
    layers = sorted({row["layer"] for row in rows})
    shares = sorted({row["share"] for row in rows})
    cells = {(row["layer"], row["share"]): row for row in rows}
    figure = Figure(figsize=(12.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.1, 1])
    colours, norm = colormaps["viridis"], Normalize(min(layers), max(layers) * 1.08 + 1)
    for layer in layers:
        _redundancy_curve(left, [cells[layer, share] for share in shares], colours(norm(layer)))
    left.axhline(rows[0]["full_perplexity"], color="0.25", linestyle="--", linewidth=1)
    _name_worst(left, cells, layers, shares)
    _share_axis(left, shares)
    if max(row["perplexity"] for row in rows) > 1.6 * min(row["perplexity"] for row in rows):
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        left.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        left.yaxis.set_minor_locator(NullLocator())
    left.set_ylabel("perplexity of the continuation (band: 95 %)")
    left.set_title(
        f"One layer pruned, the others whole; dashed: full cache, {rows[0]['full_perplexity']:.4g}",
        loc="left", fontsize=11,
    )  # fmt: skip
    left.spines[["top", "right"]].set_visible(False)
    _depth_bar(figure, left, layers, colours, norm)
    _divergence_map(figure, right, cells, layers, shares)
    return save(figure, path)


def _redundancy_curve(axis: Any, rows: list[Row], colour: Any) -> None:
    shares = [row["share"] for row in rows]
    axis.plot(shares, [row["perplexity"] for row in rows], marker="o", markersize=3,
              linewidth=1.4, color=colour)  # fmt: skip
    if rows[0]["log_ratio_low"] is None:
        return
    full = rows[0]["full_perplexity"]
    low, high = (
        [full * np.exp(row[name]) for row in rows] for name in ("log_ratio_low", "log_ratio_high")
    )
    axis.fill_between(shares, low, high, color=colour, alpha=0.12, linewidth=0)


def _name_worst(axis: Any, cells: dict[tuple[int, float], Row], layers: list[int],
                shares: list[float]) -> None:  # fmt: skip
    """Write their number beside the curves that suffer most at the smallest share."""
    placed: list[float] = []
    for layer in sorted(layers, key=lambda layer: -cells[layer, shares[0]]["log_ratio"])[:4]:
        change = cells[layer, shares[0]]["log_ratio"]
        most = max(cells[each, shares[0]]["log_ratio"] for each in layers)
        if change < 0.1 * most or any(abs(change - other) < 0.07 * most for other in placed):
            continue
        placed.append(change)
        at = (shares[0], cells[layer, shares[0]]["perplexity"])
        axis.annotate(f"layer {layer} ", at, ha="right", va="center", fontsize=9)
    if placed:
        axis.set_xlim(left=shares[0] * 0.62)


def _share_axis(axis: Any, shares: list[float]) -> None:
    axis.set_xscale("log")
    axis.set_xlim(right=1.1)
    named = shares[-1:]
    for share in reversed(shares[:-1]):
        if share * 1.3 < named[-1]:
            named.append(share)
    axis.set_xticks(named, [f"{share * 100:g}" for share in named])
    axis.minorticks_off()
    axis.set_xlabel("share of the layer's context entries kept, %")


def _depth_bar(figure: Figure, axis: Any, layers: list[int], colours: Any, norm: Any) -> None:
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axis, pad=0.02, fraction=0.05)
    bar.ax.set_ylim(min(layers), max(max(layers), min(layers) + 1))
    bar.set_ticks(layers[:: -(-len(layers) // 12)])
    bar.set_label("layer")


def _divergence_map(figure: Figure, axis: Any, cells: dict[tuple[int, float], Row],
                    layers: list[int], shares: list[float]) -> None:  # fmt: skip
    values = np.array([[cells[layer, share]["kl"] for share in shares] for layer in layers])
    low = 1e-4
    image = axis.imshow(
        np.maximum(values, low), aspect="auto", origin="upper", cmap="magma_r",
        norm=LogNorm(low, max(float(values.max()), 10 * low)),
    )  # fmt: skip
    axis.set_xticks(range(len(shares)), [f"{share * 100:g}" for share in shares])
    every = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axis.set_xlabel("share kept, %")
    axis.set_ylabel("pruned layer")
    axis.set_title("Divergence from the full cache, nats a token", loc="left", fontsize=11)
    bar = figure.colorbar(image, ax=axis, pad=0.02, fraction=0.05, extend="min")
    bar.set_label("KL divergence")
    if len(layers) > 20 or len(shares) > 10:
        return
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        shown = "" if value < low else f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
        dark = image.norm(max(value, low)) > 0.55
        axis.text(column, row, shown.replace("e-0", "e-"), ha="center", va="center", fontsize=7.5,
                  color="white" if dark else "0.25")  # fmt: skip


def draw_rac(rows: list[Row], path: Path) -> Path:
    """Layer × distance, single tokens left and ensembles right; a line of maps for each top."""
    tops = sorted({row["top"] for row in rows}, reverse=True)
    layers = sorted({row["layer"] for row in rows})
    figure = Figure(figsize=(12, 0.9 + 4.1 * len(tops)), layout="constrained")
    axes = figure.subplots(len(tops), 2, squeeze=False, sharey=True)
    for line, top in enumerate(tops):
        mine = [row for row in rows if row["top"] == top]
        low, chance = min(row["overlap"] for row in mine), mine[0]["chance"]
        norm = Normalize(min(low, chance), 1.0)
        for axis, mode in zip(axes[line], ("single", "ensemble"), strict=True):
            image = _consistency_map(axis, [r for r in mine if r["mode"] == mode], layers, norm)
        axes[line, 0].set_ylabel(f"top {top:.0%} of the context\n\nlayer")
        bar = figure.colorbar(image, ax=list(axes[line]), pad=0.02, fraction=0.04)
        bar.set_label("overlap with the last token's set")
        bar.ax.axhline(chance, color="0.2", linewidth=2)
        bar.ax.text(-0.25, chance, "chance", ha="right", va="center", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("relative distance from the end, %")
    return save(figure, path)


def _consistency_map(axis: Any, rows: list[Row], layers: list[int], norm: Any) -> Any:
    edges = sorted({row["distance_low"] for row in rows})
    values = np.zeros((len(layers), len(edges)))
    for row in rows:
        values[layers.index(row["layer"]), edges.index(row["distance_low"])] = row["overlap"]
    end = max(row["distance_high"] for row in rows) * 100
    image = axis.imshow(values, aspect="auto", origin="upper", cmap="viridis", norm=norm,
                        extent=(0, end, len(layers) - 0.5, -0.5))  # fmt: skip
    every = -(-len(layers) // 16)
    axis.set_yticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    what = {"single": "Single token", "ensemble": "Ensemble of a 20 % window"}[rows[0]["mode"]]
    axis.set_title(
        f"{what}: mean {values.mean():.1%} (chance {rows[0]['chance']:.1%})",
        loc="left", fontsize=11,
    )  # fmt: skip
    return image


def save(figure: Figure, path: Path) -> Path:
    """Write a picture, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130)
    return path


#: The page of ``study map``; ``@title@`` and ``@data@`` are filled in by ``lab.survival.page``.
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>@title@</title>
<style>
:root { color-scheme: light dark; --page: 255 255 255; --text: 28 32 38; --soft: 88 96 108;
  --line: 208 212 220; --gone: 237 239 243; --passed: 190 199 212; --kept: 44 92 160;
  --mark: 214 50 26; }
@media (prefers-color-scheme: dark) { :root { --page: 20 22 26; --text: 230 232 236;
  --soft: 164 172 182; --line: 64 70 80; --gone: 34 37 43; --passed: 76 84 97;
  --kept: 112 172 245; --mark: 255 118 90; } }
body { margin: 1.2rem auto; max-width: 84rem; padding: 0 1rem; background: rgb(var(--page));
  color: rgb(var(--text)); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.2rem; }
.bar { display: flex; flex-wrap: wrap; gap: .4rem 1.4rem; align-items: center; margin: .6rem 0; }
.grid { display: flex; gap: .4rem; }
#labels { color: rgb(var(--soft)); font-size: 11px; text-align: right; }
#scroll { flex: 1; min-width: 0; overflow-x: auto; }
canvas { display: block; }
:focus-visible { outline: 2px solid rgb(var(--mark)); outline-offset: 2px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; min-height: 10rem; }
dt, .note { color: rgb(var(--soft)); }
.note { font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
#text { max-height: 16rem; overflow: auto; border: 1px solid rgb(var(--line)); padding: .5rem;
  font: 13px/1.7 ui-monospace, monospace; position: relative; }
#text bdi { display: inline-block; margin-right: .45em; cursor: pointer; }
#text bdi[hidden] { display: none; }
#text .on { outline: 2px solid rgb(var(--mark)); }
#text .needle { border-bottom: 2px solid rgb(var(--mark)); }
.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .35em -.1em 0; }
</style>
<h1>@title@</h1>
<p class="note" id="help">Layers run down, positions run right. Point at a cell, or focus the map
and use the arrow keys (Shift: ten at a time; Page Up, Page Down: a hundred; Home, End).</p>
<div class="bar">
<label>Colour <select id="mode"><option value="kept">what is kept</option>
<option value="score">score, relative to the layer's highest</option></select></label>
<label id="when">Cache <select id="view"><option value="kept">after the prompt</option>
<option value="end">at the end, generated tokens included</option></select></label>
<label>Zoom <input id="zoom" type="range" min="1" max="16" step="0.5" value="1"></label>
<label>Find a token <input id="find" type="search" size="12"></label>
</div>
<div class="grid"><div id="labels" aria-hidden="true"></div><div id="scroll">
<canvas id="map" tabindex="0" role="application" aria-label="map of layers and positions"
 aria-describedby="help"></canvas></div></div>
<p class="note" id="key"></p>
<dl id="info" aria-live="polite"></dl>
<p class="note">The text as the selected layer keeps it (the paler, the fewer KV heads):</p>
<div id="text"></div>
<noscript>This page draws with JavaScript; the PNG beside it shows the map.</noscript>
<script type="application/json" id="data">@data@</script>
<script>
"use strict";
const byId = name => document.getElementById(name);
const data = JSON.parse(byId("data").textContent);
const bytes = text => Uint8Array.from(atob(text), each => each.charCodeAt(0));
const all = data.tokens.length, prompt = data.prompt, depth = data.heads.length;
const reached = bytes(data.reached), scores = new Float32Array(bytes(data.scores).buffer);
const held = { kept: bytes(data.kept), end: bytes(data.end) };
const wide = held.kept.length / (depth * all);  // bytes a token
const high = Math.max(8, Math.min(26, Math.round(360 / depth)));
let layer = 0, at = data.needle ? data.needle[0] : 0;

const columns = () => byId("view").value === "end" ? all : prompt;
function headsAt(layer, at) {
  const found = [], first = (layer * all + at) * wide, bits = held[byId("view").value];
  for (let head = 0; head < data.heads[layer]; head++)
    if (bits[first + (head >> 3)] >> (head & 7) & 1) found.push(head);
  return found;
}
const share = (layer, at) => headsAt(layer, at).length / data.heads[layer];
const isReached = (layer, at) => at >= prompt || reached[layer * prompt + at] === 1;
const scoreOf = (layer, at) => at < prompt ? scores[layer * prompt + at] : NaN;
const ranked = layer => scores.subarray(layer * prompt, (layer + 1) * prompt)
  .filter(score => !Number.isNaN(score)).sort().reverse();
const tops = data.heads.map((_, layer) => ranked(layer)[0] || 1);
const colour = name => getComputedStyle(document.documentElement)
  .getPropertyValue("--" + name).trim().split(" ").map(Number);
const mix = (from, to, share) => from.map((value, i) => value + (to[i] - value) * share);

const picture = document.createElement("canvas");
function paint() {
  const count = columns(), pixels = new ImageData(count, depth * high);
  const [gone, passed, kept] = ["gone", "passed", "kept"].map(colour);
  for (let layer = 0; layer < depth; layer++) for (let at = 0; at < count; at++) {
    const score = scoreOf(layer, at), weight = Math.max(0, 1 + Math.log10(score / tops[layer]) / 4);
    const shown = byId("mode").value === "kept"
      ? mix(isReached(layer, at) ? passed : gone, kept, share(layer, at))
      : mix(gone, kept, weight || 0);
    for (let line = layer * high; line < (layer + 1) * high - 1; line++)
      pixels.data.set([...shown, 255], 4 * (line * count + at));
  }
  [picture.width, picture.height] = [count, depth * high];
  picture.getContext("2d").putImageData(pixels, 0, 0);
  draw();
}
function draw() {
  const canvas = byId("map"), count = columns(), ratio = window.devicePixelRatio || 1;
  const width = Math.min(16000 / ratio, byId("scroll").clientWidth * byId("zoom").value);
  canvas.style.width = width + "px";
  canvas.style.height = high * depth + 18 + "px";
  canvas.width = width * ratio;
  canvas.height = (high * depth + 18) * ratio;
  const pen = canvas.getContext("2d"), one = width / count;
  pen.scale(ratio, ratio);
  pen.imageSmoothingEnabled = one < 1;
  pen.drawImage(picture, 0, 0, width, high * depth);
  const css = name => "rgb(" + colour(name).join(" ") + ")";
  pen.fillStyle = css("soft");
  pen.font = "11px system-ui, sans-serif";
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000].find(s => s * one > 50) || 5000;
  for (let tick = 0; tick < count; tick += step)
    pen.fillText(tick, Math.min(tick * one, width - 30), high * depth + 13);
  pen.strokeStyle = css("mark");
  if (data.needle) pen.strokeRect(data.needle[0] * one - 1, .5,
    (data.needle[1] - data.needle[0]) * one + 2, high * depth - 1);
  pen.strokeStyle = pen.fillStyle = css("text");
  pen.fillRect(at * one, 0, 1, high * depth);
  pen.lineWidth = 2;
  pen.strokeRect(at * one - 1, layer * high, Math.max(one, 3) + 2, high - 1);
}
function tell() {
  const heads = headsAt(layer, at), score = scoreOf(layer, at), order = ranked(layer);
  const layers = data.heads.map((_, l) => l), last = list => list.length ? list.pop() : "none";
  const rows = [["token", data.tokens[at]],
    ["position", at + (at < prompt ? " of " + prompt + " in the prompt" : ", generated")],
    ["layer", layer + " (" + order.length + " of " + prompt + " tokens computed)"],
    ["in this layer", !isReached(layer, at) ? "not computed" : "kept by " + heads.length + " of "
      + data.heads[layer] + " KV heads" + (heads.length ? ": " + heads.join(", ") : "")],
    ["score", Number.isNaN(score) ? "none" : score.toPrecision(3) + ", rank "
      + (order.findIndex(other => other <= score) + 1) + " of " + order.length
      + " (mean attention from the newest " + Math.min(data.window, prompt) + " queries)"],
    ["deepest layer", "computed in " + last(layers.filter(l => isReached(l, at)))
      + ", kept in " + last(layers.filter(l => share(l, at) > 0))]];
  byId("info").replaceChildren(...rows.flatMap(([name, value]) => {
    const pair = ["dt", "dd"].map(tag => document.createElement(tag));
    [pair[0].textContent, pair[1].textContent] = [name, value];
    return pair;
  }));
}
const chips = data.tokens.map((token, index) => {
  const chip = document.createElement("bdi");
  chip.textContent = token;
  if (data.needle && index >= data.needle[0] && index < data.needle[1]) chip.className = "needle";
  chip.onclick = () => select(layer, index);
  return chip;
});
byId("text").append(...chips);
function fade() {
  chips.forEach((chip, index) => {
    chip.hidden = index >= columns();
    chip.style.opacity = .22 + .78 * share(layer, index);
  });
}
function select(row, column, follow) {
  const before = layer;
  chips[at].classList.remove("on");
  layer = Math.max(0, Math.min(depth - 1, row));
  at = Math.max(0, Math.min(columns() - 1, column));
  chips[at].classList.add("on");
  if (before !== layer) fade();
  if (follow) {
    const one = byId("map").clientWidth / columns(), scroll = byId("scroll");
    const hidden = at * one - scroll.scrollLeft;
    if (hidden < 0 || hidden > scroll.clientWidth - one) scroll.scrollLeft += hidden - 200;
  }
  byId("text").scrollTop = chips[at].offsetTop - 60;
  draw();
  tell();
}
byId("map").onpointermove = event => {
  const one = byId("map").clientWidth / columns();
  select(Math.floor(event.offsetY / high), Math.floor(event.offsetX / one));
};
byId("map").onkeydown = event => {
  const far = event.shiftKey ? 10 : 1;
  const moves = { ArrowLeft: [0, -far], ArrowRight: [0, far], ArrowUp: [-far, 0],
    ArrowDown: [far, 0], PageUp: [0, -100], PageDown: [0, 100], Home: [0, -all], End: [0, all] };
  if (!(event.key in moves)) return;
  event.preventDefault();
  select(layer + moves[event.key][0], at + moves[event.key][1], true);
};
byId("find").onkeydown = event => {
  const wanted = byId("find").value.toLowerCase();
  if (event.key !== "Enter" || !wanted) return;
  for (let step = 1; step <= columns(); step++) {
    const next = (at + step) % columns();
    if (data.tokens[next].toLowerCase().includes(wanted)) return select(layer, next, true);
  }
};
function legend() {
  const score = byId("mode").value === "score";
  const parts = score ? [["kept", "the layer's highest score, fading by powers of ten"],
    ["gone", "a ten-thousandth of it, or not computed"]] : [["kept", "kept (paler: by some heads)"],
    ["passed", "computed, not kept"], ["gone", "not computed"]];
  if (data.needle) parts.push(["mark", "frame: the fact asked for"]);
  byId("key").replaceChildren(...parts.flatMap(([name, text]) => {
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = "rgb(var(--" + name + "))";
    return [swatch, text + "\u2003"];
  }));
}
function start() {
  data.heads.forEach((_, row) => {
    const label = document.createElement("div");
    label.style.cssText = "height:" + high + "px;line-height:" + high + "px";
    label.textContent = row % Math.ceil(14 / high) ? "" : row;
    byId("labels").append(label);
  });
  byId("when").hidden = all === prompt;
  byId("mode").onchange = () => { legend(); paint(); };
  byId("view").onchange = () => { paint(); fade(); select(layer, at); };
  byId("zoom").oninput = window.onresize = draw;
  matchMedia("(prefers-color-scheme: dark)").onchange = paint;
  [legend, paint, fade].forEach(each => each());
  select(depth - 1, at);
}
start();
</script>
</html>
"""
