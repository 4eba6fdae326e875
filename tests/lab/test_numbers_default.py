"""The section on the default policy: what is pooled, and which policies are compared."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer.lab.numbers_default import default_section, pooled, rivals


def row(policy: str, task: str, protocol: str, scores: list[float], **changes: Any) -> dict:
    keep = 1.0 if policy == "full" else float(policy.partition("keep=")[2].partition(",")[0])
    return {
        "length": 2000,
        "policy": policy,
        "keep": keep,
        "task": task,
        "protocol": protocol,
        "score": sum(scores) / len(scores),
        "scores": scores,
        "kv_share": keep,
        "prefill_share": 1.0,
        "samples": len(scores),
        **changes,
    }


def grid(rows: list[dict], model: str = "smollm2") -> dict[str, Any]:
    return {"meta": {"configuration": {"subject": {"model": model}}}, "rows": rows}


def one_task(task: str, full: list[float], mine: list[float], **changes: Any) -> list[dict]:
    return [
        row(policy, task, protocol, scores, **(changes if policy != "full" else {}))
        for protocol in ("inside", "after")
        for policy, scores in (("full", full), ("pyramid:keep=.5", mine))
    ]


def test_tasks_of_all_grids_count_alike() -> None:
    """Two grids with different numbers of samples: a task of either has the same weight."""
    results = {
        "heads_ruler": grid(one_task("a", [1, 1, 1, 1], [1, 0, 0, 0])),
        "kv_dtype_ruler": grid(one_task("b", [1, 0], [1, 1])),
    }
    (key, cell), *rest = pooled(results).items()
    assert key == ("smollm2", 2000, 0.5, "auto")
    assert not rest
    value, low, high = cell["after"].of_other
    assert value == pytest.approx((0.25 + 1.0) / (1.0 + 0.5))
    assert low < value < high


def test_kv_dtypes_models_and_tasks_that_full_cannot_do_stay_apart() -> None:
    results = {
        "heads_ruler": grid(
            [*one_task("a", [1, 1], [1, 0]), *one_task("hopeless", [0, 0], [1, 1])]
        ),
        "kv_dtype_ruler": grid(one_task("a", [1, 1], [0, 0], kv_dtype="int8")),
        "gemma_ruler": grid(one_task("a", [1, 1], [1, 1]), "gemma3-270m"),
    }
    found = {key: cell["inside"].of_other[0] for key, cell in pooled(results).items()}
    assert found == {
        ("smollm2", 2000, 0.5, "auto"): 0.5,
        ("smollm2", 2000, 0.5, "int8"): 0.0,
        ("gemma3-270m", 2000, 0.5, "auto"): 1.0,
    }


def test_a_variant_is_another_policy_and_bytes_decide_who_is_compared() -> None:
    rows = [
        *one_task("a", [1, 1], [1, 0]),
        row("pyramid:keep=.5,kernel=7", "a", "after", [0, 0]),
        row("duo:keep=.3", "a", "after", [1, 1]),
    ]
    ((mine, other, pairs),) = rivals(grid(rows))
    assert (mine["policy"], other["policy"]) == ("pyramid:keep=.5", "pyramid:keep=.5,kernel=7")
    assert list(pairs) == ["after"]
    assert pairs["after"].difference[0] == 0.5


@pytest.mark.parametrize(("computed", "told"), [(1.0, "`duo`"), (1.1, "No policy")])
def test_a_policy_that_is_better_is_named_unless_it_computes_more(
    computed: float, told: str
) -> None:
    better = row("duo:keep=.5", "a", "after", [1, 1, 1], prefill_share=computed)
    rows = [*one_task("a", [1, 1, 1], [0, 0, 0]), better]
    (text,) = default_section({"heads_ruler": grid(rows)})
    assert told in text.rstrip().splitlines()[-1]


def test_no_section_without_results() -> None:
    assert default_section({}) == []
