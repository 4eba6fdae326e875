"""Head profiles: what they refuse, how they rank, what their files hold."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pyramidinfer.policies import Pyramid
from pyramidinfer.policies.profile import Calibrated, Centres, Fingerprint, Masks, Profile
from pyramidinfer.types import Layers

MARK = Fingerprint("llama-0123456789ab", ((1.0, 0.5, -0.5), (2.0, 0.0, 1.0)), ((0.02, 1.0, -1.0),))
PROFILE = Profile(
    ((0.25, 0.5), (0.0, 0.0), (0.5, 0.125)),
    (True, False, True),
    "a text",
    (750, 700),
    0.9,
    0.2,
    "abc123",
    MARK,
)
FOUND = Calibrated(0, 0.25, 0.3, 0.98, 0.5, 0.01, 1000, 36, 3)


def test_heads_are_ranked_most_needed_first() -> None:
    assert PROFILE.ranked() == [(0, 1), (2, 0), (0, 0), (2, 1)]
    rng = random.Random(3)
    share = tuple(tuple(rng.choice((0.1, 0.2, 0.3)) for _ in range(5)) for _ in range(7))
    found = replace(PROFILE, share=share, governed=(True,) * 7).ranked()
    assert sorted(found) == [(layer, head) for layer in range(7) for head in range(5)]
    for (a, b), (c, d) in pairwise(found):
        assert share[a][b] > share[c][d] or (share[a][b] == share[c][d] and (a, b) < (c, d))


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "deep" / "heads.json")
    assert Profile.load(path) == Profile.load(str(path)) == PROFILE
    assert hash(Profile.load(path)) == hash(PROFILE)
    assert Profile.from_dict(PROFILE.as_dict()) == PROFILE
    written = json.loads(path.read_text())
    assert written["format"] == "pyramidinfer head profile" and written["version"] == 1
    assert [each.name for each in path.parent.iterdir()] == ["heads.json"]
    other = replace(PROFILE, share=((0.1, 0.30000000000000004), (0.0, 0.0), (1 / 3, 1.0)))
    assert Profile.load(other.save(path)) == other  # in the old one's place
    assert "3 layers, 6 KV heads" in repr(PROFILE)


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = PROFILE.save(tmp_path / "heads.json")
    with pytest.raises(TypeError):
        replace(PROFILE, lengths=_Odd((5,))).save(path)
    assert Profile.load(path) == PROFILE
    assert [each.name for each in tmp_path.iterdir()] == ["heads.json"]
    with pytest.raises(ValueError, match="is a folder; name a file"):
        PROFILE.save(tmp_path)


class _Odd(tuple):  # type: ignore[type-arg]
    """Equal to what it holds, but nothing that JSON knows: asdict rebuilds it with one argument."""

    def __new__(cls, items: Any) -> Any:
        if not isinstance(items, tuple):
            raise TypeError("stop")
        return super().__new__(cls, items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "its format is 'other'"),
        ({"version": 2}, "its version is 2, not 1"),
        ({"share": None}, "share=None is no list"),
        ({"share": []}, "must have at least one layer"),
        ({"share": [[0.1], []]}, "every layer a head"),
        ({"share": [[0.25, 0.5], [0.0, 0.0]]}, "governed has 3 layers, share has 2"),
        ({"share": [[0.25, float("nan")], [0.0, 0.0], [0.5, 0.1]]}, "layer 0, head 1 is nan"),
        ({"share": [[0.25, 1.5], [0.0, 0.0], [0.5, 0.1]]}, "layer 0, head 1 is 1.5"),
        ({"share": [[0.25, "x"], [0.0, 0.0], [0.5, 0.1]]}, "layer 0, head 1 is 'x'"),
        ({"share": [[0.25, True], [0.0, 0.0], [0.5, 0.1]]}, "layer 0, head 1 is True"),
        ({"share": [[0.25, 0.5], [0.0, 0.1], [0.5, 0.1]]}, "layer 1 is not governed"),
        ({"share": [[0.25, 0.5], [0.0], [0.5, 0.1]]}, "layers of 1 and of 2 heads"),
        ({"share": [[0.25, 0.5], [0.0, 0.0], [0.5]]}, "layers of 1 and of 2 heads"),
        ({"share": [[0.0, 0.0]] * 3}, "every head's share is 0"),
        ({"governed": [1, 0, 1]}, "must hold true or false"),
        ({"governed": [False] * 3, "share": [[0, 0]] * 3}, "at least one true"),
        ({"agreement": float("nan")}, "agreement=nan"),
        ({"agreement": 1.2}, "agreement=1.2"),
        ({"kept": 0}, "kept=0 must"),
        ({"lengths": []}, "lengths="),
        ({"lengths": [0.5]}, "lengths="),
        ({"text": ""}, "text=''"),
        ({"commit": 7}, "commit=7"),
        ({"fingerprint": "abc"}, "fingerprint='abc'"),
        ({"fingerprint": {"key": "a", "vectors": [[1.0]], "tables": []}}, "two finite numbers"),
        ({"fingerprint": {"key": "a", "vectors": [], "tables": [[1, float("inf")]]}}, "inf"),
        ({"fingerprint": {"key": "a", "vectors": []}}, "it lacks 'tables'"),
        ({"share": "gone"}, "it lacks 'share'"),
    ],
)
def test_damaged_files_are_told(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    body = {**json.loads(json.dumps(PROFILE.as_dict())), **change}
    if change.get("share") == "gone":
        del body["share"]
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(body))
    with pytest.raises(ValueError) as found:
        Profile.load(path)
    assert message in str(found.value) and str(path) in str(found.value)
    assert "pyramidinfer profile" in str(found.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_files_that_are_none(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="heads.json' is not a .*profile.*make it again"):
        Profile.load(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Profile.load(tmp_path / "none.json")


# --- where queries lie ----------------------------------------------------------------------------

CENTRES = Centres(
    (((0.1, -2.0, 3.5), (1.0, 0.0, -1e-5)),) * 3,
    (((2.1,), (1.0,)), ((), ()), ((0.5,), (0.25,))),  # the second layer has no positions
)
LIES = replace(PROFILE, queries=CENTRES)


def test_centres_are_in_the_same_file_one_line_a_layer(tmp_path: Path) -> None:
    path = LIES.save(tmp_path / "heads.json")
    assert Profile.load(path) == LIES != PROFILE
    assert hash(LIES) == hash(PROFILE)
    assert "   [[0.1,-2.0,3.5],[1.0,0.0,-1e-05]],\n" in path.read_text()
    body = json.loads(path.read_text())
    assert body["version"] == 1
    for gone in ({**body, "queries": None}, {k: v for k, v in body.items() if k != "queries"}):
        assert Profile.from_dict(gone) == PROFILE


@pytest.mark.parametrize(
    ("name", "layer", "rows", "message"),
    [
        ("mean", 0, [], "queries.mean of layer 0 has 0 heads"),
        ("mean", 1, [[1.0, 2.0, 3.0]] * 3, "layer 1 has 3 heads, not a multiple of 2 KV heads"),
        ("sizes", 2, [[1.0]] * 4, "queries.sizes of layer 2 has 4 heads"),
        ("sizes", 0, [[1.0], []], "queries.sizes of layer 0 has heads of unequal sizes"),
        ("mean", 2, [[1.0, 2.0, float("nan")]] * 2, "queries.mean of layer 2 has nan, no number"),
        ("sizes", 2, [["x"], [1.0]], "queries.sizes of layer 2 has 'x', no number"),
        ("sizes", 0, [[1.0, 2.0]] * 2, "queries: layer 0 has 2 pairs of 3 numbers"),
        ("mean", 1, 5, "queries.mean=5 is no list"),
    ],
)
def test_damaged_centres_are_told(name: str, layer: int, rows: Any, message: str) -> None:
    body = json.loads(json.dumps(LIES.as_dict()))
    body["queries"][name][layer] = rows
    with pytest.raises(ValueError) as found:
        Profile.from_dict(body)
    assert message in str(found.value)


def test_centres_that_are_none() -> None:
    body = json.loads(json.dumps(LIES.as_dict()))
    for wrong in (7, "x", [1]):
        with pytest.raises(ValueError, match="queries=.* must be null or have mean and sizes"):
            Profile.from_dict({**body, "queries": wrong})
    with pytest.raises(ValueError, match="queries.sizes has 2 layers, share has 3"):
        Profile.from_dict({**body, "queries": {**body["queries"], "sizes": [[[], []]] * 2}})
    with pytest.raises(ValueError, match="it lacks 'sizes'"):
        Profile.from_dict({**body, "queries": {"mean": body["queries"]["mean"]}})


# --- what calibrate adds --------------------------------------------------------------------------


def test_a_calibration_is_in_the_same_file(tmp_path: Path) -> None:
    made = replace(PROFILE, calibrated=FOUND)
    path = made.save(tmp_path / "heads.json")
    assert Profile.load(path) == made != PROFILE
    body = json.loads(path.read_text())
    assert body["version"] == 1 and body["calibrated"]["start_layer"] == 0
    for gone in (
        {**body, "calibrated": None},
        {k: v for k, v in body.items() if k != "calibrated"},
    ):
        assert Profile.from_dict(gone) == PROFILE
    assert FOUND.going == "after layer 0, at most 25% of the text goes deeper"
    assert replace(FOUND, propagate_ratio=1.0).going == (
        "after layer 0, as much as the fullest deeper head can hold goes deeper"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_layer": 3}, "start_layer=3 is not one of 3 layers"),
        ({"start_layer": -1}, "start_layer=-1 is not one of 3 layers"),
        ({"start_layer": True}, "start_layer=True"),
        ({"start_layer": 1.0}, "start_layer=1.0"),
        ({"propagate_ratio": 0}, "propagate_ratio=0 must be above 0 and at most 1"),
        ({"propagate_ratio": 1.5}, "propagate_ratio=1.5 must"),
        ({"keep": "x"}, "keep='x' must"),
        ({"computed": float("nan")}, "computed=nan must"),
        ({"score": -1}, "score=-1 must be a number of at least 0"),
        ({"score": None}, "score=None must"),
        ({"kl": float("inf")}, "kl=inf must"),
        ({"context": 0}, "context=0 must be a whole number of at least 1"),
        ({"questions": 2.5}, "questions=2.5 must be a whole number"),
        ({"passages": True}, "passages=True must be a whole number"),
    ],
)
def test_damaged_calibrations_are_told(change: dict[str, Any], message: str) -> None:
    body = replace(PROFILE, calibrated=FOUND).as_dict()
    body["calibrated"].update(change)
    with pytest.raises(ValueError) as found:
        Profile.from_dict(body)
    assert str(found.value).startswith(f"calibrated: {message}")


def test_a_calibration_that_is_none() -> None:
    body = replace(PROFILE, calibrated=FOUND).as_dict()
    del body["calibrated"]["kl"]
    with pytest.raises(ValueError, match="it lacks 'kl'"):
        Profile.from_dict(body)
    for wrong in (7, "x", [1], True):
        with pytest.raises(ValueError, match="calibrated=.* must be null or what calibrate writes"):
            Profile.from_dict({**body, "calibrated": wrong})


LAYERS = Layers((True,) * 4, 2)
EVEN = Profile(
    ((0.5, 0.25),) * 4,
    (True,) * 4,
    "a text",
    (750,),
    0.9,
    0.2,
    "abc123",
    MARK,
    replace(FOUND, start_layer=1),
)
BARE = replace(EVEN, calibrated=None)


def going(policy: Pyramid) -> list[int]:
    return [policy.going(layer, 2000, LAYERS) for layer in range(3)]


def test_pyramid_starts_where_it_was_calibrated() -> None:
    mine = Pyramid(keep=0.3, profile=EVEN)
    same = Pyramid(keep=0.3, profile=BARE, start_layer=1, propagate_ratio=0.25)
    assert mine.begin(LAYERS) == 1 and going(mine) == going(same) == [2000, 500, 500]
    assert mine.limits(2000, LAYERS) == same.limits(2000, LAYERS)
    assert mine.rule.endswith("; calibrated: after layer 1, at most 25% of the text goes deeper")
    bare = Pyramid(keep=0.3, profile=BARE)
    assert bare.begin(LAYERS) == 3 and going(bare) == [2000] * 3
    assert bare.rule.endswith("(agreement 0.90); nothing is dropped between layers")
    mine.check(LAYERS)


def test_options_go_before_what_was_calibrated() -> None:
    later = Pyramid(keep=0.3, profile=EVEN, start_layer=2)
    alone = Pyramid(keep=0.3, profile=BARE, start_layer=2)
    assert going(later) == going(alone), "a start of one's own goes without the calibrated ratio"
    assert later.limits(2000, LAYERS) == alone.limits(2000, LAYERS)
    assert later.rule.endswith(
        "; after layer 2, as much as the fullest deeper head can hold goes deeper"
    )
    wider = Pyramid(keep=0.3, profile=EVEN, propagate_ratio=0.5)
    assert wider.begin(LAYERS) == 1 and max(going(wider)[1:]) > 500
    assert "at most 50% of the text" in wider.rule
    whole = Pyramid(keep=1, profile=EVEN)
    assert going(whole) == [2000] * 3 and whole.rule.endswith("; everything is kept")
    full = Pyramid(keep=0.75, profile=EVEN)
    assert full.rule.endswith("; calibrated: after layer 1, at most 50% of the text goes deeper")
    masks = Pyramid(keep=0.3, profile=Masks(((0.5, 0.25),) * 4))
    assert masks.begin(LAYERS) == 3
    assert masks.rule == "what each head needs, by given masks; nothing is dropped between layers"
    assert Pyramid().rule == ""


def test_masks_that_tell_no_head_from_another_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "full_attention_heads.tsv"
    for text in ("0 0\n0 0\n", "-1 0\n0 -2\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="every head's share is 0.*one must be above 0"):
            Masks.load(path)


# --- whose they are -------------------------------------------------------------------------------


def test_rounding_is_forgiven_and_other_weights_are_not() -> None:
    def moved(row: int, place: int, by: float, name: str = "vectors") -> Fingerprint:
        rows = [list(each) for each in getattr(MARK, name)]
        rows[row][place] += by
        return replace(MARK, **{name: tuple(map(tuple, rows))})

    assert MARK.matches(MARK)
    near = [
        moved(0, 0, 0.002),
        moved(1, 2, 0.005),
        moved(0, 0, 0.0005, "tables"),
        moved(0, 1, 0.1, "tables"),
    ]
    far = [
        moved(0, 0, 0.01),
        moved(1, 2, 0.05),
        moved(0, 0, 0.002, "tables"),
        moved(0, 1, 0.6, "tables"),
        replace(MARK, key="llama-1"),
        replace(MARK, vectors=MARK.vectors[:1]),
        replace(MARK, tables=((0.02, 1.0),)),
    ]
    assert all(MARK.matches(each) and each.matches(MARK) for each in near)
    assert not any(MARK.matches(each) or each.matches(MARK) for each in far)
