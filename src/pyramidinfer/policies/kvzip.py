"""KVzip: what a model attends to when it repeats the text (Kim et al., 2505.23416).

After prefill, while every layer still holds the whole text, the text's tokens are fed a second
time, after a request to repeat them.  An entry's score is the largest attention weight that any of
these queries gave it.  One threshold over all layers and heads decides what stays, so each head and
layer keeps as many entries as it needs.  The user's question is not used, so it makes no difference
whether it is known yet.  This costs more than a second prefill, because all queries of the second
pass attend to the whole text and are scored; it pays where many questions are asked about one text.
Texts that are added later (``extend``) are scored and cut on their own; generated tokens stay.

Deviations: weights are those of the model's own attention, over the whole text and the tokens of
the second pass; the official code takes a softmax over one chunk's entries.  An entry's score is
therefore the largest over all chunks.  Two newlines replace the chat template between the request
and the repetition, and nothing separates the last tokens of a chunk from the next chunk.  The
official code uses chunks of 2000 tokens and keeps the whole system prompt; as in kvpress, chunks
have 2048 tokens here and the first ``sinks`` tokens stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyramidinfer.config import check_whole, named_options
from pyramidinfer.policies.base import Facts, Forecast, Policy, check_keep
from pyramidinfer.types import Keep, Layers, Needs, Observation, Reduce, State, TokenIds, View

__all__ = ["AGAIN", "KVzip"]

#: The request to repeat the text: before the first chunk, and before each later chunk.
AGAIN = "\n\nRepeat the previous context exactly.\n\n"
FROM = "\n\nRepeat the part of the previous context exactly, starting with"
#: Tokens of the preceding chunk that follow ``FROM``.
TAIL = 8
#: Chunks are at least this long, unless ``chunk_length`` asks for less.
FEWEST = 64


@named_options
@dataclass(frozen=True)
class KVzip(Policy):
    """The entries that are needed most to repeat the text, over all layers and heads together.

    keep : share of a text's entries that stay, over all governed layers; generated tokens are kept
        in addition.
    sinks : number of first tokens of the whole text that always stay.
    min_text : a text shorter than this (a question after a document) stays whole and is read once.
    question : token ids between the text and its repetition, or None for none; ``"auto"`` is
        KVzip's sentence in the model's tokens (none if the model has no tokenizer).
    question_from : the same before every later chunk; the last tokens of the preceding chunk
        follow it.
    chunk_length : most tokens per chunk of the second pass; fewer where the model has too few
        positions left after the text.
    """

    name: ClassVar[str] = "kvzip"

    keep: float | None = 0.3
    sinks: int = 4
    min_text: int = 128
    question: tuple[int, ...] | list[int] | str | None = "auto"
    question_from: tuple[int, ...] | list[int] | str | None = "auto"
    chunk_length: int = 2048

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.keep is None:
            raise ValueError("keep=None: give a share above 0 and at most 1")
        for name, least in (("sinks", 0), ("min_text", 1), ("chunk_length", 1)):
            check_whole(name, getattr(self, name), least)
        for name in ("question", "question_from"):
            value = getattr(self, name)
            if value is None or value == "auto":
                continue
            ids = value if isinstance(value, list | tuple) and value else [None]
            if not all(type(token) is int and token >= 0 for token in ids):
                raise ValueError(f"{name}={value!r} must be token ids, 'auto' or None")
            object.__setattr__(self, name, tuple(ids))

    def bind(self, facts: Facts) -> KVzip:
        if "auto" not in (self.question, self.question_from):
            return self
        encode = facts.encoder()
        texts = {"question": AGAIN, "question_from": FROM}
        found: dict[str, Any] = {
            name: None if encode is None else tuple(encode(text))
            for name, text in texts.items()
            if getattr(self, name) == "auto"
        }
        return replace(self, **found)

    # --- reading again ------------------------------------------------------------------------

    def is_cut(self, length: int) -> bool:
        """Whether a text of this length is read a second time and cut."""
        assert self.keep is not None
        return self.keep < 1 and length >= self.min_text

    def readings(self, text: Sequence[int], room: int, head: int = 0) -> list[TokenIds]:
        if not self.is_cut(len(text)):
            return []
        text = text[head:]
        first, later = (
            [] if isinstance(each, str | None) else list(each)  # unknown until there is a model
            for each in (self.question, self.question_from)
        )
        if len(text) <= self.chunk_length and len(first) + len(text) <= room:
            return [[*first, *text]]
        asked = max(len(first), len(later) + TAIL)
        size, least = min(self.chunk_length, room - asked), min(self.chunk_length, FEWEST)
        if size < least:
            raise ValueError(
                f"policy {self.name!r} reads a text of {len(text)} tokens a second time after it, "
                f"which needs at least {asked + least} positions, and this model has {room} left "
                f"there: shorten the text, or choose a policy that reads it once"
            )
        return [
            [*(later if at else first), *text[max(0, at - TAIL) : at], *text[at : at + size]]
            for at in range(0, len(text), size)
        ]

    def needs(self, view: View) -> Needs:
        if view.phase != "reread" or not view.layers.governed[view.layer]:
            return Needs()
        return Needs(window=view.new_len, reduce=Reduce("kv_max", "max"), retain=True)

    def _looked_at(self, seen: Observation, state: State) -> State:
        """The state with the scores that one pass gave to the entries of a layer."""
        assert seen.scores is not None
        length, places = seen.view.prompt_len, _places(seen)
        found = seen.scores.new_zeros(len(seen.scores), length + 1)
        found.scatter_(1, torch.where(places < 0, length, places), seen.scores)
        name, scores = f"scores.{seen.view.layer}", found[:, :length].float().cpu()
        return {**state, name: torch.maximum(state[name], scores) if name in state else scores}

    # --- cutting ------------------------------------------------------------------------------

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        if seen.view.new_len:
            return Keep(), self._looked_at(seen, state)
        if f"scores.{seen.view.layer}" in state:  # the first layer that is asked about
            state = self._chosen(seen, state)
        state, places = dict(state), _places(seen)
        chosen = state.pop(f"stays.{seen.view.layer}").to(places.device)
        lengths = torch.tensor(seen.view.head_lens, device=places.device)
        there = torch.arange(places.shape[1], device=places.device) < lengths[:, None]
        stays = (places < 0) | chosen.gather(1, places.clamp(min=0)) | seen.protected
        stays &= there
        counts = stays.sum(1)
        order = (~stays).to(torch.int8).argsort(dim=1, stable=True)
        return Keep(order[:, : int(counts.max())], counts.cpu()), state

    def _chosen(self, seen: Observation, state: State) -> State:
        """Replace all scores by which of the text's entries stay: ``stays.LAYER``
        ``[kv_heads, text]``.  Of equal scores the first wins: by layer, head and position."""
        names = sorted((each for each in state if each.startswith("scores.")), key=_layer_of)
        scores = torch.stack([state[name] for name in names])
        forced = self._forced(seen).expand_as(scores)
        ranked = torch.where(forced, torch.inf, scores)
        assert self.keep is not None
        count = max(round(self.keep * ranked.numel()), int(forced.sum()))
        level = ranked.flatten().topk(count, sorted=False).values.min()
        stays, equal = ranked > level, (ranked == level).flatten().nonzero()[:, 0]
        stays.view(-1)[equal[: count - int(stays.sum())]] = True
        rest = {name: value for name, value in state.items() if name not in names}
        for name, layer in zip(names, stays, strict=True):
            rest[f"stays.{_layer_of(name)}"] = layer
        return rest

    def _forced(self, seen: Observation) -> Tensor:
        """Which of the text's tokens stay whatever their score, ``[text]``."""
        places, length = _places(seen)[0].cpu(), seen.view.prompt_len
        forced = torch.arange(seen.view.seen_len - length, seen.view.seen_len) < self.sinks
        mine = seen.protected[0].cpu() & (places >= 0)
        forced[places[mine]] = True
        return forced

    # --- what it promises -----------------------------------------------------------------------

    def forecast(self, prompt_len: int, max_new: int, layers: Layers) -> Forecast:
        even = super().forecast(prompt_len, max_new, layers)
        if not self.is_cut(prompt_len):
            return even
        assert self.keep is not None
        cut, whole = sum(layers.governed), layers.count - sum(layers.governed)
        stays = max(
            round(self.keep * layers.kv_heads * cut * prompt_len),
            min(self.sinks, prompt_len) * layers.kv_heads * cut,
        )
        stays += layers.kv_heads * (whole * prompt_len + layers.count * max_new)
        working = 5 * prompt_len * layers.kv_heads * cut  # a score and a flag per entry
        return even._replace(sum=stays, working_bytes=working)


def _places(seen: Observation) -> Tensor:
    """Positions within the text that was added last; negative for older entries."""
    return seen.positions - (seen.view.seen_len - seen.view.prompt_len)


def _layer_of(name: str) -> int:
    return int(name.partition(".")[2])
