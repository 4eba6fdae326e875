"""Which entries kvpress's methods keep of one text, and the scores they are ranked by.

It runs in kvpress's environment and knows nothing else.  A job::

    {"model": folder, "ids": [ids], "threads": 1, "ratio": share of the entries to be dropped,
     "cases": {name: {"press": class, "options": {…}}}}

An option that is itself ``{"press": …, "options": …}`` is the press that is wrapped.  The answer::

    {"versions": {…}, "logits": [behind the text], "cases": {name: {
        "kept": [layers][kv_heads][positions], "scores": [layers][kv_heads][positions] or None,
        "question": token ids between the text and its repetition, or None}}}
"""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Any

import kvpress
import torch
from drive_transformers import load_model
from driver import reply
from torch import Tensor
from transformers import DynamicCache


def make_press(spec: dict[str, Any]) -> Any:
    """A press from its class's name and options."""
    options = {
        name: make_press(value) if isinstance(value, dict) else value
        for name, value in spec["options"].items()
    }
    return getattr(kvpress, spec["press"])(**options)


class Watch:
    """Takes down what a press does: ``scores`` and ``left`` (positions that an entry's removal
    leaves, ``[kv_heads, kept]``) by layer, and the ``question`` it reads a text again with."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.scores: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}
        self.question: list[int] | None = None
        scorer = getattr(press, "press", press)
        if hasattr(scorer, "score"):
            scorer.score = partial(self._score, scorer.score)
        if hasattr(press, "compress_post"):  # KVzip: all layers at once, after the last reading
            press.prepare = partial(self._prepare, press.prepare)
            press.compress_post = partial(self._compress_post, press.compress_post)
        else:
            press.compress = partial(self._compress, press.compress)

    def _score(self, score: Any, module: Any, *rest: Any, **named: Any) -> Tensor:
        found: Tensor = score(module, *rest, **named)
        self.scores[module.layer_idx] = found[0].clone()  # what wraps it may write into it
        return found

    def _compress(
        self, compress: Any, module: Any, hidden: Tensor, keys: Tensor, *rest: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = compress(module, hidden, keys, *rest, **named)
        if found[0].shape[2] < keys.shape[2]:
            self.left[module.layer_idx] = places_of(found[0][0], keys[0])
        return found

    def _prepare(self, prepare: Any, *rest: Any, **named: Any) -> Any:
        pairs = prepare(*rest, **named)
        chunk, reading = pairs[0]
        self.question = reading[0, : -chunk.shape[1]].tolist()
        return pairs

    def _compress_post(self, compress_post: Any, model: Any) -> None:
        self.scores = {layer: each[0].clone() for layer, each in enumerate(self.press.score_val)}
        compress_post(model)


def places_of(rows: Tensor, among: Tensor) -> Tensor:
    """Where rows ``[heads, k, n]`` stand ``among`` those of their head, ``[heads, k]``."""
    equal = (rows[:, :, None] == among[:, None]).all(-1)
    if not bool((equal.sum(-1) == 1).all()):
        raise RuntimeError("a key that stays is not one, and only one, of the text's")
    return equal.int().argmax(-1)


def kept_of(module: Any, left: Tensor | None, heads: int, length: int) -> list[list[int]]:
    """A layer's positions, ascending, by head: what was not removed, or not masked."""
    stays = torch.ones(heads, length, dtype=torch.bool)
    if left is not None:
        stays = torch.zeros_like(stays).scatter_(1, left, True)
    if module.masked_key_indices is not None:
        _, head, position = module.masked_key_indices
        stays[head, position] = False
    return [head.nonzero()[:, 0].tolist() for head in stays]


def run_case(model: Any, job: dict[str, Any], spec: dict[str, Any]) -> tuple[Tensor, Any]:
    """The logits behind the text, and what one press keeps."""
    ids, press = torch.tensor([job["ids"]]), make_press(spec)
    press.compression_ratio = job["ratio"]
    watch, modules = Watch(press), [each.self_attn for each in model.model.layers]
    for module in modules:
        module.masked_key_indices = None
    with torch.inference_mode(), press(model):
        logits = model(input_ids=ids, past_key_values=DynamicCache(), logits_to_keep=1).logits
    heads, length = model.config.num_key_value_heads, ids.shape[1]
    kept = [
        kept_of(module, watch.left.get(layer), heads, length)
        for layer, module in enumerate(modules)
    ]
    scores = [watch.scores[layer].tolist() for layer in sorted(watch.scores)] or None
    return logits[0, -1], {"kept": kept, "scores": scores, "question": watch.question}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    model = load_model({**job, "dtype": "float32"})
    logits, cases = torch.empty(0), {}
    for name, spec in job["cases"].items():
        logits, cases[name] = run_case(model, job, spec)
    packages = ("kvpress", "transformers", "torch")
    return {
        "versions": {name: version(name) for name in packages},
        "logits": logits.tolist(),
        "cases": cases,
    }


if __name__ == "__main__":
    reply(answer)
