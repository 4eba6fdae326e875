"""``bench step``: where the time of a decode step goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyramidinfer.lab.bench import step
from pyramidinfer.lab.bench.step import STEP_PARTS, StepPlan, run_step
from pyramidinfer.lab.bench.table import step_table
from pyramidinfer.lab.samples import Subject
from pyramidinfer.native.library import PARTS


def plan(backend: str = "auto") -> StepPlan:
    return StepPlan(
        Subject(kv_memory="32MiB", backend=backend),
        weights=("auto", "int8"),
        batches=(1, 2),
        prompt_len=20,
        output_len=6,
        repeats=2,
    )


def test_a_step_is_the_sum_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part takes time, and none is counted twice; the decoder is left as it was."""
    passes, llms, out = [], [], tmp_path / "step.json"
    run, decoder_of = step._pass, step._decoder
    monkeypatch.setattr(step, "READ", 2**20)
    monkeypatch.setattr(step, "_pass", lambda *given: passes.append(run(*given)) or passes[-1])
    monkeypatch.setattr(step, "_decoder", lambda llm: llms.append(llm) or decoder_of(llm))
    result = run_step(plan(), out)
    assert json.loads(out.read_text())["result"] == result
    assert [(row["weights"], row["batch"]) for row in result["rows"]] == [
        (name, batch) for batch in (1, 2) for name in ("auto", "int8")
    ]
    for steps in passes:
        assert steps.shape == (5, len(PARTS) + 3) and steps.min() >= 0
        assert (steps[:, : len(PARTS) + 1] > 0).all()
    own, eight = result["rows"][:2]
    assert own["bytes"] > 3 * eight["bytes"]  # 32 bits against 8.5
    for row in result["rows"]:
        assert list(row["parts"]) == list(STEP_PARTS)
        rate = row["bytes"] / row["step_seconds"]["max"] / row["read_per_second"]["max"]
        assert 0 < rate <= row["share_of_read_bandwidth"]["min"]
    for llm in llms:
        runner = llm.engine.runner
        assert not {"step", "logits", "forward"} & {*vars(runner), *vars(runner.decoder)}
        assert runner.decoder.ops.seconds is None
    assert len(step_table(result).rows) == 4


def test_steps_that_the_kernels_do_not_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--backend auto or cpu"):
        run_step(plan("reference"), tmp_path / "step.json")
