"""A head profile: how much of a text each KV head of one model needs, with its fingerprint.

``engine/profiling.py`` measures it; ``pyramidinfer profile`` writes it as JSON.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pyramidinfer.config import is_number

__all__ = [
    "FORMAT",
    "VERSION",
    "Calibrated",
    "Centres",
    "Fingerprint",
    "Masks",
    "Profile",
    "check_target",
    "load_heads",
    "what_goes",
]

FORMAT = "pyramidinfer head profile"
#: Raise this when the meaning of the file changes: older files are then refused.
VERSION = 1
#: Tolerances between conversions of the same weights: 16 bits for vectors (quantized formats do
#: not change them), four bits per weight for tables.
VECTORS, TABLES = (0.003, 0.01), (0.03, 0.2)
NOTHING_TOLD = "every head's share is 0, so heads cannot be ranked; one must be above 0"
AGAIN = "make it again: pyramidinfer profile MODEL --output FILE"

Numbers = tuple[tuple[float, ...], ...]
#: Values per query head of every layer.
ByLayer = tuple[Numbers, ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identifies a model's weights (computed by ``models/fingerprint.py``).

    key : the model's type and a hash of its sizes.  For each examined tensor follow its root mean
    square and its projections on some fixed directions (1 is what chance gives):
    vectors : of norms and biases;  tables : of embeddings.  Without both, the fingerprint matches
    any model with these layers and heads (a profile made by hand).
    """

    key: str
    vectors: Numbers
    tables: Numbers

    def matches(self, other: Fingerprint) -> bool:
        """Whether both belong to the same weights, whatever the precision of each."""
        return (
            self.key == other.key
            and _are_near(self.vectors, other.vectors, *VECTORS)
            and _are_near(self.tables, other.tables, *TABLES)
        )


def _are_near(mine: Numbers, others: Numbers, size: float, turn: float) -> bool:
    """Whether tensors differ by at most the share ``size`` in norm and by ``turn`` (root mean
    square over the directions) in direction."""
    if [len(row) for row in mine] != [len(row) for row in others]:
        return False
    for (length, *ways), (other, *other_ways) in zip(mine, others, strict=True):
        if abs(length - other) > size * max(length, other):
            return False
        if math.dist(ways, other_ways) > turn * math.sqrt(len(ways)):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Calibrated:
    """After which layer tokens may be dropped, as measured by ``pyramidinfer calibrate``.

    start_layer, propagate_ratio : after this layer, this share of the text goes deeper (1: as much
        as the fullest deeper head can hold).
    keep : the policy's budget during calibration;  score : right answers, relative to the same
        policy with nothing dropped between layers;  computed : share of layer-tokens computed;
        kl : divergence from the full cache on running text, nats per token.
    context, questions, passages : tokens per prompt, and the number of questions and passages.
    """

    start_layer: int
    propagate_ratio: float
    keep: float
    score: float
    computed: float
    kl: float
    context: int
    questions: int
    passages: int

    @property
    def going(self) -> str:
        """What goes deeper, in words."""
        return what_goes(self.start_layer, self.propagate_ratio)


def what_goes(start_layer: int, propagate_ratio: float) -> str:
    """What goes deeper, in words."""
    share = (
        f"at most {propagate_ratio:.0%} of the text"
        if propagate_ratio < 1
        else "as much as the fullest deeper head can hold"
    )
    return f"after layer {start_layer}, {share} goes deeper"


@dataclass(frozen=True)
class Centres:
    """Statistics of every layer's queries before rotation, times the softmax scale
    (TriAttention, arXiv 2604.04921, calls the means centres).

    mean : ``[layers][heads][key_dim]``;  sizes : ``[layers][heads][pairs]``, the mean norm of each
    pair of channels that rotate together, ``f`` and ``f + pairs`` of a head (empty in a layer
    without rotary positions).
    """

    mean: ByLayer
    sizes: ByLayer


@dataclass(frozen=True, repr=False)
class Profile:
    """The measured need of every KV head.

    share : ``[layers][kv_heads]``, the share of a head's entries that are among the best ``kept``
        of all governed heads' entries together; 0 in layers that are not governed.
    governed : ``[layers]``, False where a sliding window bounds the layer and nothing was measured.
    text, lengths : the texts that were used, and the tokens of each passage.
    agreement : Spearman's rank correlation between the heads' shares in one half of the passages
        and in the other half, which comes from another text.
    kept : see ``share``.
    commit : commit or version of the code that made it.
    calibrated : the result of ``pyramidinfer calibrate``, or None.
    queries : statistics of the queries in all layers; None in older profiles.  Not part of the
        hash, because profiles that differ in nothing else are rare.
    """

    share: tuple[tuple[float, ...], ...]
    governed: tuple[bool, ...]
    text: str
    lengths: tuple[int, ...]
    agreement: float
    kept: float
    commit: str
    fingerprint: Fingerprint
    calibrated: Calibrated | None = None
    queries: Centres | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if (wrong := _wrong(self)) is not None:
            raise ValueError(wrong)

    def __repr__(self) -> str:
        heads = sum(len(row) for row in self.share)
        return (
            f"Profile({self.layers} layers, {heads} KV heads, best {self.kept:g}, agreement "
            f"{self.agreement:.2f}, {self.fingerprint.key})"
        )

    @property
    def layers(self) -> int:
        return len(self.share)

    def check_model(self, mark: Fingerprint) -> None:
        """Raise ``ValueError`` unless it belongs to the model with this fingerprint, or to any."""
        mine = self.fingerprint
        if (mine.vectors or mine.tables) and not mine.matches(mark):
            others = (
                f"{mine.key}, not {mark.key}" if mine.key != mark.key else f"another {mark.key}"
            )
            raise ValueError(
                f"the profile belongs to other weights ({others}): make one of this model "
                f"(pyramidinfer profile MODEL --output FILE), or leave profile=FILE out to use the "
                f"model's own"
            )

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, head) of every governed head, most needed first; ties go to the earlier head."""
        return [place for place in _ranked(self.share) if self.governed[place[0]]]

    def as_dict(self) -> dict[str, Any]:
        """The content of its file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, found: Any) -> Profile:
        """The inverse; raises ``ValueError`` that says what is wrong."""
        try:
            return _from(found)
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from None
        except TypeError as error:
            raise ValueError(str(error)) from None

    def save(self, path: str | Path) -> Path:
        """Write it as JSON and create the folder; the file is written whole or not at all."""
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; name a file for the profile")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_lines(self.as_dict()))
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile; raises ``ValueError`` with the file, the cause and the remedy."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"profile {str(path)!r} cannot be read: {error.strerror}; {AGAIN}"
            ) from None
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{str(path)!r} is not a head profile ({error}); {AGAIN}") from None
        try:
            return cls.from_dict(found)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not a valid profile: {error}; {AGAIN}") from None


@dataclass(frozen=True)
class Masks:
    """DuoAttention's optimised masks (arXiv 2410.10819, section 2.2).

    share : ``[layers][kv_heads]``, the weight of full attention in each head's mask.
    """

    share: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.share or len({len(row) for row in self.share}) != 1 or not self.share[0]:
            raise ValueError("it must be a table of layers by KV heads, with rows of equal length")
        for layer, row in enumerate(self.share):
            for head, value in enumerate(row):
                if not (is_number(value) and math.isfinite(value)):
                    raise ValueError(f"layer {layer}, head {head} is {value!r:.60}, not a number")
        if all(value <= 0 for row in self.share for value in row):
            raise ValueError(NOTHING_TOLD)

    def ranked(self) -> list[tuple[int, int]]:
        """As ``Profile.ranked``."""
        return _ranked(self.share)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read ``full_attention_heads.tsv``: one line per layer, one number per KV head, clipped
        to 0..1.  Raises ``ValueError`` with the file and the cause."""
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
            rows = [[float(each) for each in line.split()] for line in lines if line.strip()]
            raw = cls(tuple(map(tuple, rows)))
            return cls(tuple(tuple(min(1.0, max(0.0, each)) for each in row) for row in raw.share))
        except OSError as error:
            raise ValueError(f"masks {str(path)!r} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{str(path)!r} does not hold DuoAttention masks: {error}") from None


def check_target(path: str | Path, what: str) -> Path:
    """The path of a file to write; raises ``ValueError`` if it cannot be written."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file for {what}")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise ValueError(f"{str(path)!r}: {str(folder)!r} is not a folder; name a file for {what}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{str(path)!r}: {str(folder)!r} cannot be written; name another file")
    return path


def load_heads(path: str | Path) -> Profile | Masks:
    """Read a profile, or DuoAttention's masks if the file is a ``.tsv``."""
    return Masks.load(path) if Path(path).suffix == ".tsv" else Profile.load(path)


def _ranked(share: Numbers) -> list[tuple[int, int]]:
    heads = [(layer, head) for layer, row in enumerate(share) for head in range(len(row))]
    return sorted(heads, key=lambda place: (-share[place[0]][place[1]], place))


def _from(found: Any) -> Profile:
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else found
        raise ValueError(f"its format is {kind!r:.60}, not {FORMAT!r}")
    if found.get("version") != VERSION:
        raise ValueError(f"its version is {found.get('version')!r:.60}, not {VERSION}")
    mark = found["fingerprint"]
    if not isinstance(mark, dict):
        raise ValueError(f"fingerprint={mark!r:.60} is none")
    return Profile(
        _rows(found["share"], "share"),
        _row(found["governed"], "governed"),
        found["text"],
        _row(found["lengths"], "lengths"),
        found["agreement"],
        found["kept"],
        found["commit"],
        Fingerprint(
            mark["key"], _rows(mark["vectors"], "vectors"), _rows(mark["tables"], "tables")
        ),
        _calibrated(found.get("calibrated")),
        _centres(found.get("queries")),
    )


def _centres(found: Any) -> Centres | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"queries={found!r:.60} must be null or have mean and sizes")
    mean, sizes = (
        tuple(_rows(layer, f"queries.{name}") for layer in _row(found[name], f"queries.{name}"))
        for name in ("mean", "sizes")
    )
    return Centres(mean, sizes)


def _calibrated(found: Any) -> Calibrated | None:
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"calibrated={found!r:.60} must be null or what calibrate writes")
    return Calibrated(**{each.name: found[each.name] for each in fields(Calibrated)})


def _row(value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}={value!r:.60} is no list")
    return tuple(value)


def _rows(value: Any, name: str) -> tuple[tuple[Any, ...], ...]:
    return tuple(_row(each, f"a row of {name}") for each in _row(value, name))


def _wrong(profile: Profile) -> str | None:
    """What is wrong with the profile, in words."""
    if not profile.share or not all(profile.share):
        return f"share={profile.share!r:.60} must have at least one layer, and every layer a head"
    if len({len(row) for row in profile.share}) != 1:
        sizes = sorted({len(row) for row in profile.share})
        return f"share has layers of {sizes[0]} and of {sizes[-1]} heads; all must be equal"
    if len(profile.governed) != len(profile.share):
        return f"governed has {len(profile.governed)} layers, share has {len(profile.share)}"
    if not all(isinstance(each, bool) for each in profile.governed) or not any(profile.governed):
        return f"governed={profile.governed!r:.60} must hold true or false, with at least one true"
    for layer, row in enumerate(profile.share):
        for head, value in enumerate(row):
            if not (is_number(value) and 0 <= value <= 1):
                return f"share of layer {layer}, head {head} is {value!r:.60}, not between 0 and 1"
            if value and not profile.governed[layer]:
                return f"layer {layer} is not governed, but head {head} has the share {value!r:.60}"
    if not any(map(any, profile.share)):
        return f"share: {NOTHING_TOLD}"
    if not (is_number(profile.kept) and 0 < profile.kept < 1):
        return f"kept={profile.kept!r:.60} must lie between 0 and 1"
    if not (is_number(profile.agreement) and -1 <= profile.agreement <= 1):
        return f"agreement={profile.agreement!r:.60} must lie between -1 and 1"
    if not profile.lengths or not all(type(n) is int and n > 0 for n in profile.lengths):
        return f"lengths={profile.lengths!r:.60} must be the tokens of each passage"
    if profile.calibrated is not None and (wrong := _wrong_start(profile.calibrated, profile)):
        return wrong
    if profile.queries is not None and (wrong := _wrong_centres(profile.queries, profile)):
        return wrong
    mark = profile.fingerprint
    for name, text in (("text", profile.text), ("commit", profile.commit), ("key", mark.key)):
        if not isinstance(text, str) or not text:
            return f"{name}={text!r:.60} must be a text"
    return _wrong_numbers("vectors", mark.vectors) or _wrong_numbers("tables", mark.tables)


def _wrong_start(found: Calibrated, profile: Profile) -> str | None:
    layers = len(profile.share)
    if type(found.start_layer) is not int or not 0 <= found.start_layer < layers:
        return f"calibrated: start_layer={found.start_layer!r:.60} is not one of {layers} layers"
    for name in ("propagate_ratio", "keep", "computed"):
        if not (is_number(value := getattr(found, name)) and 0 < value <= 1):
            return f"calibrated: {name}={value!r:.60} must be above 0 and at most 1"
    for name in ("context", "questions", "passages"):
        if type(value := getattr(found, name)) is not int or value < 1:
            return f"calibrated: {name}={value!r:.60} must be a whole number of at least 1"
    for name in ("score", "kl"):
        if not (is_number(value := getattr(found, name)) and 0 <= value < math.inf):
            return f"calibrated: {name}={value!r:.60} must be a number of at least 0"
    return None


def _wrong_centres(found: Centres, profile: Profile) -> str | None:
    layers, kv_heads = len(profile.share), len(profile.share[0])
    for name in ("mean", "sizes"):
        table: ByLayer = getattr(found, name)
        if len(table) != layers:
            return f"queries.{name} has {len(table)} layers, share has {layers}"
        for layer, rows in enumerate(table):
            where = f"queries.{name} of layer {layer}"
            if not rows or len(rows) % kv_heads or len(rows) != len(found.mean[0]):
                return f"{where} has {len(rows)} heads, not a multiple of {kv_heads} KV heads"
            if len({len(row) for row in rows}) != 1:
                return f"{where} has heads of unequal sizes"
            for value in (value for row in rows for value in row):
                if not (is_number(value) and math.isfinite(value)):
                    return f"{where} has {value!r:.60}, no number"
    for layer, (mean, sizes) in enumerate(zip(found.mean, found.sizes, strict=True)):
        if 2 * len(sizes[0]) > len(mean[0]):
            return f"queries: layer {layer} has {len(sizes[0])} pairs of {len(mean[0])} numbers"
    return None


def _wrong_numbers(name: str, rows: Sequence[Sequence[float]]) -> str | None:
    for row in rows:
        if len(row) < 2 or not all(is_number(n) and math.isfinite(n) for n in row):
            return f"fingerprint: {row!r:.60} in {name} must be two finite numbers or more"
    return None


def _lines(body: dict[str, Any]) -> str:
    """JSON with one line per layer or tensor, not per number."""
    mark = body["fingerprint"]

    def rows(many: Any, blanks: str, signs: tuple[str, str] = (", ", ": ")) -> str:
        lines = ",\n".join(blanks + json.dumps(row, separators=signs) for row in many)
        return f"[\n{lines}\n{blanks[1:]}]"

    parts = {name: json.dumps(value) for name, value in body.items()}
    parts["share"] = rows(body["share"], "  ")
    parts["fingerprint"] = (
        "{\n"
        + ",\n".join(
            [
                f'  "key": {json.dumps(mark["key"])}',
                f'  "vectors": {rows(mark["vectors"], "   ")}',
                f'  "tables": {rows(mark["tables"], "   ")}',
            ]
        )
        + "\n }"
    )
    if (queries := body["queries"]) is not None:
        tight = (",", ":")
        parts["queries"] = (
            "{\n"
            + ",\n".join(
                f'  "{name}": {rows(queries[name], "   ", tight)}' for name in ("mean", "sizes")
            )
            + "\n }"
        )
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"
