"""Head profiles, which say how much each KV head of a model needs: measured once, stored and looked
up.

The measurement is KVzip's (arXiv 2505.23416, section 3.2): a model that repeats a text attends to
everything that it needs of the text.  Each passage is prefilled with the full cache, then fed again
after the request to repeat it; the score of an entry is the largest attention weight that any query
of its KV head's group gave to it in the second pass.  One threshold applies to all heads, and a
head's share is the share of a passage's entries above it.  KVzip uses scores per entry; here, they
are summarized per head, because such shares hardly differ between texts.

The prefill of passages also records the means of every layer's queries before rotation
(TriAttention, arXiv 2604.04921, section 3).
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyramidinfer.cache import Layout, Pool
from pyramidinfer.engine.passages import Passages, passages_for
from pyramidinfer.engine.readings import is_long
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models import ModelRunner, Prefill
from pyramidinfer.models.batch import Batch, Sequence, Work
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.native.build import cache_folder
from pyramidinfer.policies import Policy
from pyramidinfer.policies.profile import Centres, Fingerprint, Profile
from pyramidinfer.types import (
    Keep,
    Needs,
    Observation,
    Reduce,
    State,
    TokenIds,
    View,
)

__all__ = [
    "KEPT",
    "Found",
    "ensure_profile",
    "find_profile",
    "head_shares",
    "look_up",
    "profile_model",
    "profiles_folder",
    "progress_bar",
    "rank_correlation",
    "shipped_folder",
    "store_profile",
    "watch",
]

#: The share of all heads' entries above the threshold.
KEPT = 0.2
#: A passage's first tokens do not count: every head attends to them for any text, and their queries
#: are outliers.
SINKS = 4
#: Tokens of a step, so that a bar moves.
STEP = 256

Tell = Callable[[int], None]


# --- measuring ------------------------------------------------------------------------------------


class Means(NamedTuple):
    """Means of a layer's queries before rotation: ``[heads, key_dim]``, and ``[heads, pairs]`` of
    the norms of their rotated pairs."""

    mean: Tensor
    sizes: Tensor


class Watched(NamedTuple):
    """The measurements of a passage and its repetition.

    scores : layer → ``[kv_heads, passage]``, of the layers that are governed;  queries : layer →
    means of the passage's own, of all layers.
    """

    scores: dict[int, Tensor]
    queries: dict[int, Means]


@dataclass(frozen=True, eq=False)
class _Watching(Policy):
    """Keeps everything, lets ``again`` be read after the text, and records the scores of the text's
    entries from these queries, and statistics of the text's own queries.

    found : layer → scores ``[kv_heads, text]``, on the host, of the layers that are ``governed``.
    queries : layer → means, on the host, of all layers.
    """

    name: ClassVar[str] = "watching"

    again: TokenIds = field(default_factory=list)
    governed: tuple[bool, ...] = ()
    found: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Means] = field(default_factory=dict)

    def readings(self, text: Items[int], room: int, head: int = 0) -> list[TokenIds]:
        return [self.again] if self.again else []

    def needs(self, view: View) -> Needs:
        if view.phase == "prefill":
            return Needs(queries_from=SINKS, retain=True)
        if view.phase != "reread" or not self.governed[view.layer]:
            return Needs()
        return Needs(window=view.new_len, reduce=Reduce("kv_max", "max"), retain=True)

    def retain(self, seen: Observation, state: State) -> tuple[Keep, State]:
        if seen.queries is not None:
            mean, _, sizes = seen.queries
            self.queries[seen.view.layer] = Means(mean.double().cpu(), sizes.double().cpu())
        if seen.scores is not None:
            self.found[seen.view.layer] = seen.scores.cpu()
        return Keep(), state


def profile_model(
    shared: Shared, passages: Passages | None = None, progress: bool | None = None
) -> Profile:
    """Measure the heads of an engine's model, in a separate cache.

    passages : None for real English, or random tokens without a tokenizer
    (``passages_for``);  progress : a bar on standard error; None shows it in a terminal.
    ``ValueError`` if the model's positions do not allow reading a passage twice, or if every layer
    has a sliding window.
    """
    runner = shared.runner
    passages = passages or passages_for(runner, shared.tokenizer)
    longest = max(len(each) + len(passages.repeated(each)) for each in passages.all)
    governed = runner.layers_for(longest + 1).governed
    if not any(governed):
        raise ValueError(
            "every layer of this model has a sliding window that is shorter than the passages, so "
            "no head can be profiled: the window limits their memory already; use policy 'full'"
        )
    pool = _pool_for(shared, longest)
    work = runner.depth * sum(len(each) + len(passages.repeated(each)) for each in passages.all)
    halves = []
    with progress_bar("what each head needs", work, progress) as tell:
        for half in passages.halves:
            halves.append(
                [watch(runner, pool, each, passages.repeated(each), tell) for each in half]
            )
    heads = [shape.kv_heads for shape in runner.shapes]
    shares = [[head_shares(each.scores) for each in half] for half in halves]
    first, second = (_flat(_mean(half)) for half in shares)
    return Profile(
        _rows(_mean(shares[0] + shares[1]), heads),
        governed,
        passages.name,
        tuple(len(each) for each in passages.all),
        round(rank_correlation(first, second), 4),
        KEPT,
        _version(),
        fingerprint(runner),
        queries=_centres([each.queries for half in halves for each in half]),
    )


def watch(
    runner: ModelRunner,
    pool: Pool,
    passage: TokenIds,
    repeated: TokenIds,
    tell: Tell = lambda _: None,
) -> Watched:
    """The largest weight that any query of ``repeated``, which follows the passage, gave to each of
    its entries, and the passage's own queries.  ``tell`` receives finished layer-tokens."""
    length = len(passage)
    layers = runner.layers_for(length + len(repeated) + 1)
    watching = _Watching(repeated, layers.governed)
    far = is_long(runner, watching, length, length, 1)
    nothing = torch.zeros(0, dtype=torch.int64, device=runner.device)
    table = pool.new_table(length)
    protected = torch.zeros(length, dtype=torch.bool, device=runner.device)
    sequence = Sequence(
        policy=watching, cache=table, layers=layers, protected=protected, is_long=far
    )
    tokens, again = (torch.tensor(each, device=runner.device) for each in (passage, repeated))
    prefill = Prefill(sequence, tokens, 0, [length] * runner.depth, readings=[again])
    try:
        while not prefill.finished:
            work = Work(prefill, STEP * runner.depth)
            stepped = runner.forward(pool, Batch([], nothing, [work]))
            tell(STEP * runner.depth - work.budget)
    finally:
        pool.release(table)
    if not bool(stepped.logits.isfinite().all()):
        raise ValueError(
            "the model cannot be profiled: its logits are not finite numbers (NaN or infinity)"
        )
    found = Watched({}, {})
    for scores, queries in runner.stages.gather((watching.found, watching.queries)):
        found.scores.update(scores)
        found.queries.update(queries)
    return found


def head_shares(scores: dict[int, Tensor], kept: float = KEPT) -> dict[int, list[float]]:
    """Per layer, each head's share of entries among the best ``kept`` of all heads together.

    scores : layer → ``[kv_heads, passage]``.  Among equal scores, the earlier entry wins.
    """
    rows = torch.cat([each[:, SINKS:] for each in scores.values()])
    best = rows.flatten().argsort(descending=True, stable=True)[: round(kept * rows.numel())]
    counts = (best // rows.shape[1]).bincount(minlength=len(rows)).tolist()
    heads = iter(count / rows.shape[1] for count in counts)
    return {layer: [next(heads) for _ in each] for layer, each in scores.items()}


def rank_correlation(first: Items[float], second: Items[float]) -> float:
    """Spearman's correlation; equal values share their mean rank.  If one has no order: 1 if both
    have none."""
    ranks = _ranks(first), _ranks(second)
    flat = [bool(np.ptp(each) == 0) for each in ranks]
    if any(flat):
        return float(all(flat))
    return float(np.clip(np.corrcoef(*ranks)[0, 1], -1, 1))


def _ranks(values: Items[float]) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle: np.ndarray = counts.cumsum() - (counts - 1) / 2
    return middle[places]


def _mean(many: list[dict[int, list[float]]]) -> dict[int, list[float]]:
    return {layer: np.mean([each[layer] for each in many], axis=0).tolist() for layer in many[0]}


def _centres(found: list[dict[int, Means]]) -> Centres:
    """The mean over passages, to four digits."""

    def rows(layer: int, name: str) -> tuple[tuple[float, ...], ...]:
        mean = torch.stack([getattr(each[layer], name) for each in found]).mean(0)
        return tuple(tuple(float(f"{value:.4g}") for value in row) for row in mean.tolist())

    layers = sorted(found[0])
    return Centres(*(tuple(rows(i, name) for i in layers) for name in ("mean", "sizes")))


def _flat(shares: dict[int, list[float]]) -> list[float]:
    return [share for row in shares.values() for share in row]


def _rows(shares: dict[int, list[float]], heads: list[int]) -> tuple[tuple[float, ...], ...]:
    """``[layers][kv_heads]``, with zeros for layers that were not measured."""
    return tuple(
        tuple(round(share, 5) for share in shares[layer]) if layer in shares else (0.0,) * count
        for layer, count in enumerate(heads)
    )


def _pool_for(shared: Shared, longest: int) -> Pool:
    """Memory for a passage and its reading, together ``longest`` tokens."""
    specs, page = [spec.plain for spec in shared.pool.layout.specs], shared.config.page_size
    smallest = Layout.smallest(specs, page)
    runner, old = shared.runner, shared.pool.layout
    budget = smallest.budget * (int(smallest.pages_for(longest)) + 1)
    layout = Layout(specs, budget, page, places=old.places, rank=old.rank)
    return Pool(layout, runner.device, mover=shared.pool.mover)


@contextmanager
def progress_bar(title: str, work: int, wanted: bool | None = None) -> Iterator[Tell]:
    """A bar on standard error with the time left; None shows it in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    shown = sys.stderr.isatty() if wanted is None else wanted
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
    with bar:
        task = bar.add_task("", total=work)
        yield lambda done: bar.advance(task, done)


def _version() -> str:
    try:
        return version("pyramidinfer")
    except PackageNotFoundError:
        return "unknown"


# --- finding --------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A profile and its file."""

    profile: Profile
    path: Path


def shipped_folder() -> Path:
    """The folder of the package's profiles."""
    return Path(str(files("pyramidinfer") / "assets" / "profiles"))


def profiles_folder() -> Path:
    """The folder of measured profiles: ``profiles`` in the user's cache folder."""
    return cache_folder() / "profiles"


def look_up(runner: ModelRunner) -> Found | None:
    """The profile of a model and its file: the package's, else one in the user's cache folder.

    Damaged files cause a ``RuntimeWarning`` and are ignored.
    """
    mark = fingerprint(runner)
    return _look_in(shipped_folder(), mark) or _look_in(profiles_folder(), mark)


def find_profile(shared: Shared) -> Profile | None:
    """The profile of a model, if there is one (see ``look_up``)."""
    found = look_up(shared.runner)
    return None if found is None else found.profile


def ensure_profile(shared: Shared, progress: bool | None = None) -> Profile:
    """The profile of a model; if there is none, it is measured on real English and stored.

    A profile from random tokens (without a tokenizer) is not stored, because another user may have
    the tokenizer.  If the folder is not writable, there is a ``RuntimeWarning`` and the profile is
    still used.
    """
    if (profile := find_profile(shared)) is not None:
        return profile
    profile = profile_model(shared, progress=progress)
    if shared.tokenizer is None:
        return profile
    try:
        store_profile(profile)
    except OSError as error:
        warnings.warn(
            f"the head profile cannot be stored in {profiles_folder()} ({error.strerror}) and will "
            f"be measured again; set PYRAMIDINFER_CACHE to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
    return profile


def store_profile(profile: Profile) -> Path:
    """Write a profile into the user's cache folder, replacing any other of this model."""
    folder, mark = profiles_folder(), profile.fingerprint
    digest = hashlib.sha256(json.dumps([mark.vectors, mark.tables]).encode()).hexdigest()
    path = profile.save(folder / f"{mark.key}-{digest[:12]}.json")
    for other in _files(folder, mark):
        try:
            old = other == path or not Profile.load(other).fingerprint.matches(mark)
        except ValueError:
            old = False
        if not old:
            other.unlink(missing_ok=True)
    return path


def _files(folder: Path, mark: Fingerprint) -> list[Path]:
    return sorted(folder.glob(f"{mark.key}-*.json"))


def _look_in(folder: Path, mark: Fingerprint) -> Found | None:
    for path in _files(folder, mark):
        try:
            profile = Profile.load(path)
        except ValueError as error:
            warnings.warn(f"passed over: {error}", RuntimeWarning, stacklevel=3)
            continue
        if profile.fingerprint.matches(mark):
            return Found(profile, path)
    return None
