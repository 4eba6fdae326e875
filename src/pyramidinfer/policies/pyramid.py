"""Pyramid: per-head budgets from a profile, filled by the prompt's last queries (our own method).

Two measurements decide which cache entries stay.  The head ``Profile``, measured once per model,
says which KV heads attend far back.  The attention of the prompt's last queries says which tokens
matter for this prompt.  Each is not enough alone: window attention misses what a later question
will ask for, and a fixed split of heads stores the whole text where a few spans would do.  So each
KV head gets a budget in proportion to its need in the profile, and fills it with the spans that
the last queries attended to most.  A head whose budget covers the whole text keeps everything,
generated tokens included.

A token's score is the largest attention weight that any of the last ``window`` queries of the KV
head's group gave to it or to one of its neighbours.  The pooling is wide (``kernel``) because an
answer is a span of tokens, and queries often attend to the words next to it.  After the last layer
with much need (by the profile), only as many tokens go deeper as the fullest deeper head can hold.
They are chosen by the scores of all heads together, so a single deeper head may miss a token that
it would have kept.  Pooled window scores come from SnapKV (2404.14469), unequal head budgets from
Ada-KV (2407.11550) and DuoAttention (2410.10819), dropping tokens between layers from PyramidInfer
(2405.12532).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from pyramidinfer.config import check_share, check_whole, is_number, named_options
from pyramidinfer.policies.by_head import ALL, ByHead, Limits
from pyramidinfer.policies.profile import Calibrated, what_goes
from pyramidinfer.policies.snapkv import check_kernel
from pyramidinfer.types import Best, Layers, Needs, Reduce, View

__all__ = ["Pyramid"]

#: The deepest layers that together have at most this share of the total need get few tokens.
SPARE = 0.1
SCORES = Reduce("kv_max", "max")


@named_options
@dataclass(frozen=True)
class Pyramid(ByHead):
    """A budget for every KV head in proportion to its need, filled by window attention.

    keep : share of the text's entries that stay, as a mean over the measured heads.  When all heads
        with any need are full, the others share the rest evenly.  Layers that the profile did not
        measure keep everything; heads that keep everything also keep all generated tokens.  At 1
        every head keeps everything, and no token is dropped unless ``propagate_ratio`` is given.
    safeguard : no head's budget falls below this share of the mean budget.
    sharpness : budgets above the safeguard are in proportion to each head's need to this power; a
        higher value gives more to fewer heads.
    start_layer : the first layer after which tokens may be dropped.  None: the calibrated layer, or
        without a calibration the last layer with much need.  If that layer has a sliding window
        shorter than the text, the next layer without one is used.
    propagate_ratio : largest share of the text that goes deeper.  It rises where ``keep`` could
        not be met otherwise.  None: the calibrated share, unless ``start_layer`` is given; without
        either, as much as the fullest deeper head can hold.
    window : newest queries whose attention is scored.
    kernel : neighbours over which scores are max-pooled (odd; 1 turns pooling off).
    """

    name: ClassVar[str] = "pyramid"
    computes_less: ClassVar[bool] = True

    recent: int = 32
    safeguard: float = 0.2
    sharpness: float = 2.0
    start_layer: int | None = None
    propagate_ratio: float | None = None
    window: int = 16
    kernel: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("safeguard", self.safeguard)
        if not (is_number(self.sharpness) and 0 <= self.sharpness <= 8):
            raise ValueError(f"sharpness={self.sharpness!r} must lie between 0 and 8")
        if self.start_layer is not None:
            check_whole("start_layer", self.start_layer, 0)
        if self.propagate_ratio is not None:
            check_share("propagate_ratio", self.propagate_ratio)
        check_whole("window", self.window, 1)
        check_kernel(self.kernel)

    def check(self, layers: Layers) -> None:
        super().check(layers)
        if self.start_layer is not None and self.start_layer >= layers.count:
            raise ValueError(
                f"start_layer={self.start_layer}: the model has {layers.count} layers, 0 to "
                f"{layers.count - 1}"
            )

    # --- budgets ------------------------------------------------------------------------------

    @property
    def window_size(self) -> int:
        """The smallest budget of a head: the entries that always stay, plus room for an eviction
        to free ``stride`` entries, or a quarter."""
        always = self.sinks + self.recent
        return always + max(1, min(self.stride, always // 3))

    @property
    def least_going(self) -> int:
        """The fewest tokens that may go deeper: the scoring queries must exist in every layer."""
        return max(self.window_size, self.sinks + self.window + 1)

    def deal(self, text_len: int, layers: Layers) -> Limits:
        heads, keep = self.heads, self.keep
        assert keep is not None
        limits = [[ALL] * layers.kv_heads for _ in layers.governed]
        places = [place for place in heads.ranked() if layers.governed[place[0]]]
        if keep == 1 or not places:
            return tuple(map(tuple, limits))
        caps = [self._cap(layer, text_len, layers) for layer, _ in places]
        top = max(heads.share[layer][head] for layer, head in places) or 1.0
        weights = [(heads.share[layer][head] / top) ** self.sharpness for layer, head in places]
        floor = max(self.window_size, self.safeguard * keep * text_len)
        sizes = _fill(weights, floor, caps, keep * text_len * len(places))
        for (layer, head), size in zip(places, sizes, strict=True):
            entries = int(size + 1e-6)  # a sum of floats may be slightly below a whole number
            limits[layer][head] = ALL if entries >= text_len else entries
        return tuple(map(tuple, limits))

    @property
    def _calibrated(self) -> Calibrated | None:
        if self.start_layer is not None or self.keep == 1:
            return None
        return getattr(self.profile, "calibrated", None)

    def begin(self, layers: Layers) -> int:
        """The layer after which tokens are dropped, by its scores: the first one without a sliding
        window, from the wanted layer on; ``layers.count`` if there is none."""
        wanted = self._wanted(layers)
        return next((i for i in range(wanted, layers.count) if layers.governed[i]), layers.count)

    def _wanted(self, layers: Layers) -> int:
        if self.start_layer is not None:
            return self.start_layer
        if self._calibrated is not None:
            return self._calibrated.start_layer
        share = self.heads.share
        total = sum(map(sum, share))
        left, layer = 0.0, layers.count - 1
        while layer > 0 and (left := left + sum(share[layer])) <= SPARE * total:
            layer -= 1
        return layer

    def _ratio(self, layers: Layers) -> float | None:
        """The share of a text that goes deeper, if an option or a calibration sets it; it rises
        where ``keep`` could not be met otherwise."""
        ratio = self.propagate_ratio
        if ratio is None and self._calibrated is not None:
            ratio = self._calibrated.propagate_ratio
        if ratio is None or self.keep in (None, 1):
            return ratio
        begin = self.begin(layers)
        measured = [layer for layer, _ in self.heads.ranked() if layers.governed[layer]]
        deep = sum(layer > begin for layer in measured)
        missing = self.keep * len(measured) - (len(measured) - deep)
        return max(ratio, missing / deep) if deep else ratio

    def _cap(self, layer: int, text_len: int, layers: Layers) -> int:
        """Tokens of a text that can reach a layer, if an option or a calibration limits them."""
        ratio = self._ratio(layers)
        if ratio is None or layer <= self.begin(layers):
            return text_len
        return min(text_len, max(self.least_going, int(ratio * text_len + 1e-6)))

    def going(self, layer: int, text_len: int, layers: Layers) -> int:
        if layer < self.begin(layers) or not layers.governed[layer]:
            return text_len
        size = max(text_len, self.min_context)
        held = max(max(row) for row in self.limits(text_len, layers)[layer + 1 :])
        return min(text_len, max(self.least_going, min(held, self._cap(layer + 1, size, layers))))

    @property
    def rule(self) -> str:
        if not (base := super().rule):
            return ""
        share = self.heads.share
        measured = getattr(self.profile, "governed", (True,) * len(share))
        layers = Layers(measured, len(share[0]))
        ratio, begin = self._ratio(layers), self.begin(layers)
        if self.keep == 1 and ratio is None:
            return f"{base}; everything is kept"
        share_said = 1.0 if ratio is None else ratio
        if begin >= layers.count - 1 or (share_said >= 1 and not all(measured[begin + 1 :])):
            return f"{base}; nothing is dropped between layers"
        source = "" if self._calibrated is None else "calibrated: "
        return f"{base}; {source}{what_goes(begin, share_said)}"

    def least(self, limit: int) -> int:
        return limit + 1 - min(self.stride, max(1, limit // 4))

    # --- what was looked at -------------------------------------------------------------------

    def needs(self, view: View) -> Needs:
        keeps_all = self.keep == 1 and self.propagate_ratio is None
        if keeps_all or not view.layers.governed[view.layer]:
            return Needs()
        rule = Best(self.counts(view), "window", self.kernel, "max", self.sinks, self.recent)
        if view.phase == "decode":
            return Needs(self.window, SCORES, retain=rule)
        deeper, is_last = None, view.layer == view.layers.count - 1
        going = view.new_len if is_last else self.going(view.layer, view.prompt_len, view.layers)
        if going < view.new_len:
            deeper = replace(rule, count=going, recent=max(self.recent, self.window))
        stays = rule if self.over(view) else None
        return Needs(self.window, SCORES, remember=True, propagate=deeper, retain=stays)

    def ring(self, prompt_len: int, max_new: int) -> int:
        return self.window


def _fill(
    weights: Sequence[float], floor: float, caps: Sequence[float], wanted: float
) -> list[float]:
    """Sizes in proportion to weights, between the floor and each one's cap, that sum to ``wanted``.

    Entries of weight 0 share the rest evenly once all others are full.
    """
    lows: list[float] = [min(cap, floor) for cap in caps]
    most = [cap if weight else low for weight, low, cap in zip(weights, lows, caps, strict=True)]
    if sum(most) < wanted:
        lows, weights = most, [0.0 if weight else 1.0 for weight in weights]

    def sizes(level: float) -> list[float]:
        return [
            max(low, min(cap, level * weight)) if weight else low
            for weight, low, cap in zip(weights, lows, caps, strict=True)
        ]

    low, high = 0.0, 1.0
    enough = max(caps) / min((weight for weight in weights if weight), default=1.0)
    while sum(sizes(high)) < wanted and high < enough:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(sizes(middle)) > wanted else (middle, high)
    return sizes(low)
