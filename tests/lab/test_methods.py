"""Generated pages: what they take from docstrings, policies and results."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pyramidinfer.lab import methods, numbers
from pyramidinfer.lab.methods import answers, options, to_markdown
from pyramidinfer.lab.numbers_studies import (
    load_results,
    paired_difference,
    paired_ratio,
    quality,
)
from pyramidinfer.policies import POLICIES, Policy
from pyramidinfer.policies.retaining import Retaining

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "P", "cores": 2, "threads": 1, "torch": "2", "transformers": "5"}
SUBJECT = {
    "model": "shipped",
    "text": None,
    "dtype": "float32",
    "device": "auto",
    "kv_memory": "512MiB",
}


def row(policy: str, keep: float, right: list[int], **changes: Any) -> dict[str, Any]:
    recall = sum(right) / len(right)
    return {
        "policy": policy,
        "keep": keep,
        "context": 1000,
        "kv_share": keep,
        "prefill_share": 1.0,
        "recall": recall,
        "recall_ci": [recall - 0.1, recall + 0.1],
        "right": right,
        "kl": 0.25,
        "kl_ci": [0.125, 0.5],
        "agreement": None,
        "agreement_ci": None,
        "samples": len(right),
        "passages": 5,
        "reachable": True,
        **changes,
    }


def study(name: str, rows: list[dict[str, Any]], **configuration: Any) -> dict[str, Any]:
    configuration = {"subject": SUBJECT, "seed": 0, **configuration}
    meta = {"commit": "abc", "machine": MACHINE, "study": name, "configuration": configuration}
    return {"meta": {**meta, "command": f"pyramidinfer study {name} --seed 0"}, "rows": rows}


def grid(rows: list[dict[str, Any]], *names: str) -> dict[str, Any]:
    return study(
        "quality",
        rows,
        policies=list(names),
        keeps=[1.0, 0.4],
        contexts=[1000],
        samples=4,
        passages=0.5,
    )


GRID = grid(
    [
        row("full", 1.0, [1, 1, 1, 0]),
        row("snapkv", 0.4, [1, 0, 1, 0], reachable=False),
        row("snapkv:window=8,kernel=1", 0.4, [1, 1, 1, 0], agreement=0.5),
        row("pyramidinfer", 0.4, [0, 0, 1, 0]),
    ],
    "full",
    "snapkv",
    "snapkv:window=8,kernel=1",
    "pyramidinfer",
)


# --- docs/methods.md ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_option_is_described_once(name: str) -> None:
    found = options(POLICIES[name])
    for option in found:
        assert option.text, f"{name}: no docstring says what {', '.join(option.names)} means"
        assert len(option.names) == len(option.defaults)
    named = [each for option in found for each in option.names]
    assert sorted(named) == sorted(each.name for each in fields(POLICIES[name]))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_has_a_section(name: str) -> None:
    page = methods.render(load_results(ROOT))
    assert f"\n## {name}\n" in page and f"](#{name})" in page
    assert "``" not in page.replace("```", "")


def test_every_paper_is_linked() -> None:
    page = methods.render({})
    papers = {
        "2405.12532",
        "2309.17453",
        "2306.14048",
        "2305.17118",
        "2404.14469",
        "2406.02069",
        "2401.06104",
        "2502.01068",
    }
    assert all(f"https://arxiv.org/abs/{paper}" in page for paper in papers)


def test_descriptions_are_inherited_and_overridden() -> None:
    @dataclass(frozen=True)
    class Parent(Retaining):
        """First line.

        window, kernel : of both,
            on two lines.
        keep : see ``Retaining``; ours.

        After.
        """

        window: int = 3
        kernel: int = 5

    @dataclass(frozen=True)
    class Child(Parent):
        """Speaks of ``sinks`` in passing.

        kernel : the child's own.
        """

        sinks: int = 4
        silent: int = 0

    found = {option.names: option.text for option in options(Child)}
    assert found == {
        ("keep",): "see ``Retaining``; ours.",
        ("window",): "of both, on two lines.",
        ("kernel",): "the child's own.",
        ("sinks",): "Speaks of ``sinks`` in passing.",
        ("silent",): "",
    }
    assert options(Parent)[1].names == ("window", "kernel")
    assert options(Parent)[1].defaults == ("3", "5")


def test_answers_come_from_the_policy() -> None:
    said = {name: answers(kind) for name, kind in POLICIES.items()}
    assert said["full"] == ("all", "all", "nothing", "–")
    assert said["fastkv"].propagate == "fewer, from one layer on"
    assert said["pyramidinfer"].retain == "all that reached the layer"
    assert said["pyramidinfer"].evict == "a part of the generated entries"
    assert "falling" in said["pyramidkv"].retain and "rising" in said["scissorhands"].retain
    assert said["h2o"].scores == "all queries so far" and said["tova"].scores == "the newest query"
    assert "selected per KV head" in said["snapkv"].retain
    assert "the same entries in all heads" in said["streaming_llm"].retain


def test_markdown() -> None:
    text = "As ``a|b`` says (arXiv\n2401.06104).  Deviation of 2404.14469\nDeviations: none ``2``."
    assert to_markdown(text) == (
        "As `a|b` says ([arXiv 2401.06104](https://arxiv.org/abs/2401.06104)). Deviation of "
        "[arXiv 2404.14469](https://arxiv.org/abs/2404.14469)\n**Deviations:** none `2`."
    )


def test_measured_rows_stand_with_their_policy() -> None:
    page = methods.render({"quality": GRID})
    section = page[page.index("## snapkv") : page.index("## pyramidkv")]
    assert "Measured on the shipped model" in section
    assert "| `window=8,kernel=1` | 0.4 | 1,000 | 40% | 100% | 0.75 [0.65, 0.85] |" in section
    assert "| 0.25 | – | no |" in section and "| 0.25 | 50% | yes |" in section
    tova = page[page.index("## tova") : page.index("## fastkv")]
    assert "Measured" not in tova, "nothing was measured"


def test_pipes_do_not_break_tables() -> None:
    @dataclass(frozen=True)
    class Piped(Policy):
        """One.

        mode : ``a | b``.
        """

        name: ClassVar[str] = "piped"
        mode: str = "a|b"

    page = methods.render({}, {"piped": Piped})
    assert "| `mode` | `'a\\|b'` | `a \\| b`. |" in page


# --- docs/numbers.md ------------------------------------------------------------------------------


def test_quality_rows() -> None:
    text = quality(GRID)
    assert "| `snapkv` | 0.4 | 0.50 [0.40, 0.60] | 40% * | 100% |" in text
    assert "| `snapkv` window=8, kernel=1 | 0.4 | 0.75 [0.65, 0.85] | 40% | 100% |" in text
    assert "cannot reach this" in text and "at 1,000 tokens 4 questions, 5 passages" in text
    assert "```bash\npyramidinfer study quality --seed 0\n```" in text
    whole = quality(grid([row("full", 1.0, [1])], *POLICIES))
    assert "cannot reach this" not in whole


def test_paired_intervals() -> None:
    """Pairs, not samples: where every answer is the same the difference has no width."""
    answers = [1, 0] * 50
    assert paired_difference(answers, answers) == (0, 0, 0)
    assert paired_ratio(answers, answers) == (1, 1, 1)
    assert paired_ratio(answers, [0] * 100) is None
    ratio, low, high = paired_ratio([1] * 60 + [0] * 40, [1] * 80 + [0] * 20) or (0, 0, 0)
    assert ratio == pytest.approx(0.75) and 0.6 < low < 0.7 < 0.8 < high < 0.9
    rare = paired_ratio([1, 0], [1, 0])  # some resamples have no answer to compare with
    assert rare == (1, 1, 1)
    with pytest.raises(ValueError, match="2 and 3 answers are not pairs"):
        paired_difference([1, 0], [1, 0, 1])


def test_studies_render() -> None:
    """Every section on rows of the studies' own formats; the page holds those that exist."""
    icr = [
        {
            "layer": layer,
            "share": share,
            "ratio": 150.0 if layer else 1.0,
            "tokens": 11,
            "full_perplexity": 1.5,
        }
        for layer in (0, 1)
        for share in (0.1, 1.0)
    ]
    rac = [
        {
            "layer": layer,
            "top": 0.2,
            "mode": mode,
            "distance_low": low,
            "overlap": 0.5 + low,
            "chance": 0.2,
        }
        for layer in (0, 3)
        for mode in ("single", "ensemble")
        for low in (0.0, 0.1)
    ]
    results = {
        "quality": GRID,
        "icr": study(
            "icr", icr, context=1000, continuation=64, samples=3, shares=[0.1, 1.0], layers=[0, 1]
        ),
        "rac": study("rac", rac, context=1000, samples=3, tops=[0.2], bins=2),
        "map": study(
            "map",
            [],
            policy="pyramid",
            prompt_token_ids=[1, 2],
            max_tokens=3,
            options="Pyramid(keep=0.3, profile='auto', window=8)",
        ),
    }
    text = numbers.render(results)
    assert text.count("\n## ") == text.count("How to read it") == len(results)
    assert text.count("Commit `abc`") == len(results)
    assert text.count("```bash\npyramidinfer ") == len(results)
    assert "| 1 | 150 | 150 |" in text and "| 0 | 1.000 | 1.000 |" in text
    assert "| all | 0.55; 0.60 | 0.55; 0.60 |" in text
    assert "one prompt of 2 tokens with `Pyramid(keep=0.3, profile='auto', window=8)`" in text
    for line in text.splitlines():
        if line.startswith("| 0 ") or line.startswith("| 1"):
            assert line.endswith("|")
    del results["rac"]
    assert numbers.render(results).count("\n## ") == len(results)


def test_both_pages_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    numbers.main()
    assert (tmp_path / "docs" / "numbers.md").read_text() == numbers.render({})
    assert (tmp_path / "docs" / "methods.md").read_text() == methods.render({})
    (tmp_path / "docs" / "methods.md").unlink()
    methods.main()
    assert (tmp_path / "docs" / "methods.md").read_text() == methods.render({})


def test_quality_says_where_another_policy_is_better() -> None:
    """Only where the intervals do not touch, on the better side, at the same keep."""
    mine = row("pyramid", 0.5, [1, 1, 0, 0])
    apart = {"recall": 0.9, "recall_ci": [0.8, 1.0]}
    near = {"recall_ci": [0.55, 1.0]}
    worse = {"kl": 2.0, "kl_ci": [1.0, 3.0]}
    better = row("h2o", 0.5, [1, 1, 1, 1], **apart)
    text = quality(
        grid(
            [
                mine,
                better,
                row("tova", 0.5, [1, 1, 1, 0], **near),
                row("snapkv", 0.5, [1, 1, 0, 0], **worse),
            ],
            *POLICIES,
        )
    )
    said = text[text.index("intervals do not overlap") :]
    assert "`h2o`" in said and "recall" in said
    assert "tova" not in said and "snapkv" not in said
    text = quality(grid([mine, row("h2o", 0.5, [1, 1, 0, 0])], *POLICIES))
    assert "In no cell of this grid" in text
