"""``study codecs``: what is stored, what is compared with what, the table made of it."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyramidinfer.cli.app import main
from pyramidinfer.codec import CODECS
from pyramidinfer.lab import codecs
from pyramidinfer.lab.codecs import VARIANTS, CodecsPlan, Stored, run_codecs
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import Full

PLAN = CodecsPlan(Subject(), 100, 2)
NOTHING = torch.zeros(1)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [16, 64, 80, 128])
def test_the_first_of_all_is_what_the_engine_stores(name: str, size: int) -> None:
    """... so what the study says of it holds for the engine."""
    x = drawn(5, 2, size)
    codec = CODECS[name]
    expected = codec.decode(*codec.encode(x), torch.float32)
    torch.testing.assert_close(Stored(name).read(x, NOTHING), expected, atol=1e-6, rtol=1e-5)
    assert Stored(name).bytes(size) == codec.entry_bytes(size)


def test_what_each_is_for() -> None:
    """A channel that is large, one that is far from zero: who loses what there."""
    plain, large, far = drawn(400, 64), drawn(400, 64), drawn(400, 64)
    large[:, 3] *= 40
    far += 5

    def off(stored: Stored, x: torch.Tensor) -> float:
        mean = x.mean(0, keepdim=True)
        return float((stored.read(x, mean) - x).norm() / (x - mean).norm())

    rotated = Stored("int4")
    unturned = replace(rotated, rotated=False)
    assert off(rotated, large) < 0.5 * off(unturned, large)
    assert off(unturned, plain) == pytest.approx(off(rotated, plain), rel=0.1)
    assert off(replace(rotated, group=16), plain) < off(rotated, plain)
    assert off(replace(unturned, minimum=True), far) < 0.5 * off(unturned, far)
    assert off(replace(unturned, centred=True), far) < 0.5 * off(unturned, far)
    assert not Stored("int4").read(torch.zeros(2, 64), NOTHING).any()


def test_bytes_count_scales_and_minima() -> None:
    found = {each.name: each.bytes(64) for each in VARIANTS}
    assert found["int8, rotated"] == found["fp8, not rotated"] == 2 * (64 + 2)
    assert found["int4, rotated"] == found["int4, only keys rotated"] == 2 * (32 + 2)
    assert found["int4, rotated, keys less their mean"] == 2 * (32 + 2)
    assert found["int4, rotated, keys alone"] == 32 + 2 + 128
    assert found["int4, rotated, a minimum beside each scale"] == 2 * (32 + 4)
    assert found["int4, rotated, a scale per 32"] == 2 * (32 + 4)
    assert len(found) == len(VARIANTS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rows by variant, and what was written; begun, interrupted and gone on with."""
    out = tmp_path_factory.mktemp("codecs") / "codecs.json"
    left, measure = 5, codecs.measure

    def interrupted(*args: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return measure(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt, match="5 of 28 done"):
            run_codecs(PLAN, out)
        left = 1000
        rows = run_codecs(PLAN, out)
    assert 1000 - left == 2 * len(VARIANTS) - 5
    written = json.loads(out.read_text())
    assert written["rows"] == rows and written["meta"]["study"] == "codecs"
    return {row["variant"]: row for row in rows}, written


def test_fewer_bits_cost_more(measured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    rows, written = measured
    assert list(rows) == [each.name for each in VARIANTS]
    kl = {name: row["kl"] for name, row in rows.items()}
    assert 0 < kl["int8, rotated"] < kl["fp8, rotated"] < kl["int4, rotated"]
    assert kl["int4, rotated, keys alone"] > 0 and kl["int4, rotated, values alone"] > 0
    for row in rows.values():
        assert row["kl_ci"][0] <= row["kl"] <= row["kl_ci"][1]
        assert 0.5 < row["agreement"] <= 1 and row["samples"] == 2
    assert rows["int8, rotated"]["agreement"] > 0.95
    assert written["meta"]["configuration"]["subject"]["source"] == "generated text"


def test_figures_are_those_of_the_engine(measured: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The engine with the same codec says as much of the same passages."""
    subject = Subject(kv_memory="16MiB")
    passages = subject.corpus().passages(0, 3, 100, 1)[:2]
    apart = []
    for passage in passages:
        found = []
        for kv_dtype in ("auto", "int4"):
            llm = replace(subject, kv_dtype=kv_dtype).llm(Full())
            head, rest = passage.context[:1], passage.context[1:]
            (score,) = llm.score([head], [rest], logits=True)
            assert score.logits is not None
            found.append(score.logits.double().log_softmax(-1))
        p, q = found
        apart.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert measured[0]["int4, rotated"]["kl"] == pytest.approx(sum(apart) / 2, rel=0.15)


def test_the_command_and_its_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codecs, "VARIANTS", VARIANTS[:2])
    out = tmp_path / "c.json"
    for words, code in (
        (["--context", "80", "--samples", "1"], 0),
        (["--context", "20"], 2),
        (["--samples", "0"], 2),
    ):
        command = ["pyramidinfer", "study", "codecs", "--json", str(out), *words]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert int(stopped.value.code or 0) == code
    said = capsys.readouterr()
    assert "int8, not rotated" in said.out and str(out) in said.out
    assert "--context 20 is too short" in said.err and "--samples 0 must be" in said.err
