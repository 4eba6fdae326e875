"""A head profile: how much of a text each KV head of one model needs, and whose model that is.

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
#: Raise when a file means something else than before: older ones are then refused.
VERSION = 1
#: How far the same weights may lie apart after a conversion: 16 bits for vectors (no format of
#: quantized weights touches them), four bits a weight for tables.
VECTORS, TABLES = (0.003, 0.01), (0.03, 0.2)
NOTHING_TOLD = "every head's share is 0, which tells none from another; one must be above 0"
AGAIN = "make it again: pyramidinfer profile MODEL --output FILE"

Numbers = tuple[tuple[float, ...], ...]
#: Numbers of every query head of every layer.
ByLayer = tuple[Numbers, ...]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells one model's weights from another's (``models/fingerprint.py`` works it out).

    key : the model's kind and a hash of its sizes.  Then for every tensor that was looked at its
    root mean square and how far it points in some fixed directions (1 is what chance gives):
    vectors : of norms and biases;  tables : of embeddings.  Without either it tells no weights
    from others: a profile made by hand, for any model of its layers and heads.
    """

    key: str
    vectors: Numbers
    tables: Numbers

    def matches(self, other: Fingerprint) -> bool:
        """Whether both are of the same weights, in whatever precision each was stored."""
        return (
            self.key == other.key
            and _are_near(self.vectors, other.vectors, *VECTORS)
            and _are_near(self.tables, other.tables, *TABLES)
        )


def _are_near(mine: Numbers, others: Numbers, size: float, turn: float) -> bool:
    """Whether tensors differ by no more than the share ``size`` in length, and ``turn`` (root mean
    square over the directions) in where they point."""
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
    """After which layer tokens may be dropped, as ``pyramidinfer calibrate`` found it.

    start_layer, propagate_ratio : after this layer such a share of the text goes deeper (1: as much
        as the fullest deeper head holds).
    keep : of the policy meanwhile;  score : share of the right answers that it gives where nothing
        is dropped between layers before;  computed : share of layer-tokens;  kl : divergence of
        text from the full cache's, nats a token.
    context, questions, passages : tokens of a prompt, and how many were measured.
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
        else "as much as the fullest deeper head holds"
    )
    return f"after layer {start_layer} {share} goes deeper"


@dataclass(frozen=True)
class Centres:
    """What every layer's queries are like before rotation, times the scale of their softmax
    (TriAttention, arXiv 2604.04921, calls the means their centres).

    mean : ``[layers][heads][key_dim]``;  sizes : ``[layers][heads][pairs]`` the mean length of each
    pair of numbers that rotate together, number ``f`` and number ``f + pairs`` of a head (none in a
    layer without rotary positions).
    """

    mean: ByLayer
    sizes: ByLayer


@dataclass(frozen=True, repr=False)
class Profile:
    """What every KV head needs, as it was measured.

    share : ``[layers][kv_heads]`` the share of a head's entries that are among the best ``kept``
        of all governed heads' entries together; 0 in layers that are not governed.
    governed : ``[layers]``, False where a sliding window bounds the layer and nothing was measured.
    text, lengths : the texts measured on, and the tokens of each passage.
    agreement : Spearman's rank correlation of the heads' shares in one half of the passages with
        those in the other half, which are of another text.
    kept : see ``share``.
    commit : of the code it was made with, or that code's version.
    calibrated : what ``pyramidinfer calibrate`` added, or None.
    queries : where the queries of the texts lie, in all layers; None in profiles made before that
        was measured.  Of no account to the hash: profiles that differ in nothing else are rare.
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
        """``ValueError`` unless it is of the model with this fingerprint, or of any."""
        mine = self.fingerprint
        if (mine.vectors or mine.tables) and not mine.matches(mark):
            others = (
                f"{mine.key}, not {mark.key}" if mine.key != mark.key else f"another {mark.key}"
            )
            raise ValueError(
                f"the profile is of other weights ({others}): make this model's own (pyramidinfer "
                f"profile MODEL --output FILE), or leave profile=FILE out to have it found"
            )

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, head) of every governed head, most needed first; of equals the earlier one."""
        return [place for place in _ranked(self.share) if self.governed[place[0]]]

    def as_dict(self) -> dict[str, Any]:
        """What a file of it holds."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, found: Any) -> Profile:
        """The way back; ``ValueError`` with what is wrong."""
        try:
            return _from(found)
        except KeyError as error:
            raise ValueError(f"it lacks {error}") from None
        except TypeError as error:
            raise ValueError(str(error)) from None

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, making the folder; the file is there whole or not at all."""
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
        """Read a profile; ``ValueError`` with the file, what is wrong and the way out."""
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"profile {str(path)!r} cannot be read: {error.strerror}; {AGAIN}"
            ) from None
        except ValueError as error:  # no JSON, or no UTF-8
            raise ValueError(f"{str(path)!r} is no head profile ({error}); {AGAIN}") from None
        try:
            return cls.from_dict(found)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no usable head profile: {error}; {AGAIN}") from None


@dataclass(frozen=True)
class Masks:
    """DuoAttention's own answer to what each head is for (arXiv 2410.10819, section 2.2).

    share : ``[layers][kv_heads]`` how much of full attention the optimised mask gives each head.
    """

    share: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not self.share or len({len(row) for row in self.share}) != 1 or not self.share[0]:
            raise ValueError("it must be a table of layers by KV heads, all rows equally long")
        for layer, row in enumerate(self.share):
            for head, value in enumerate(row):
                if not (is_number(value) and math.isfinite(value)):
                    raise ValueError(f"layer {layer}, head {head} is {value!r:.60}, no number")
        if all(value <= 0 for row in self.share for value in row):
            raise ValueError(NOTHING_TOLD)

    def ranked(self) -> list[tuple[int, int]]:
        """As ``Profile.ranked``."""
        return _ranked(self.share)

    @classmethod
    def load(cls, path: str | Path) -> Masks:
        """Read ``full_attention_heads.tsv``: a line a layer, a number a KV head, below 0 as 0 and
        above 1 as 1; ``ValueError`` with the file and what is wrong."""
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
            rows = [[float(each) for each in line.split()] for line in lines if line.strip()]
            raw = cls(tuple(map(tuple, rows)))
            return cls(tuple(tuple(min(1.0, max(0.0, each)) for each in row) for row in raw.share))
        except OSError as error:
            raise ValueError(f"masks {str(path)!r} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{str(path)!r} are no masks of DuoAttention's: {error}") from None


def check_target(path: str | Path, what: str) -> Path:
    """The path of a file to be written; ``ValueError`` where it cannot be, before any work."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file for {what}")
    folder = next(each for each in path.absolute().parents if each.exists())
    if not folder.is_dir():
        raise ValueError(f"{str(path)!r}: {str(folder)!r} is no folder; name a file for {what}")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{str(path)!r}: {str(folder)!r} cannot be written; name another file")
    return path


def load_heads(path: str | Path) -> Profile | Masks:
    """A profile, or DuoAttention's masks where the file is a ``.tsv``."""
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
    """What is wrong with it, in words."""
    if not profile.share or not all(profile.share):
        return f"share={profile.share!r:.60} must have a layer, and every layer a head"
    if len({len(row) for row in profile.share}) != 1:
        sizes = sorted({len(row) for row in profile.share})
        return f"share has layers of {sizes[0]} and of {sizes[-1]} heads, all must have as many"
    if len(profile.governed) != len(profile.share):
        return f"governed has {len(profile.governed)} layers, share has {len(profile.share)}"
    if not all(isinstance(each, bool) for each in profile.governed) or not any(profile.governed):
        return f"governed={profile.governed!r:.60} must be true or false, and true somewhere"
    for layer, row in enumerate(profile.share):
        for head, value in enumerate(row):
            if not (is_number(value) and 0 <= value <= 1):
                return f"share of layer {layer}, head {head} is {value!r:.60}, not within 0 and 1"
            if value and not profile.governed[layer]:
                return f"layer {layer} is not governed, but head {head} has the share {value!r:.60}"
    if not any(map(any, profile.share)):
        return f"share: {NOTHING_TOLD}"
    if not (is_number(profile.kept) and 0 < profile.kept < 1):
        return f"kept={profile.kept!r:.60} must lie between 0 and 1"
    if not (is_number(profile.agreement) and -1 <= profile.agreement <= 1):
        return f"agreement={profile.agreement!r:.60} must lie within -1 and 1"
    if not profile.lengths or not all(type(n) is int and n > 0 for n in profile.lengths):
        return f"lengths={profile.lengths!r:.60} must be tokens of each passage"
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
        return f"calibrated: start_layer={found.start_layer!r:.60} is no layer of {layers}"
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
                return f"{where} has {len(rows)} heads, which {kv_heads} KV heads cannot share"
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
    """JSON with a line for every layer or tensor, not for every number."""
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
