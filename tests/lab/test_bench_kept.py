"""The comparison with kvpress, on made-up answers and a made-up kvpress."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyramidinfer.lab import numbers_real
from pyramidinfer.lab.bench import kept
from pyramidinfer.lab.bench.kept import CASES, HEAD, Case, KeptPlan, agreement, ranks, run_kept
from pyramidinfer.lab.samples import SHIPPED
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES
from pyramidinfer.policies.registry import parse_policy

DRIVERS = Path(__file__).parents[2] / "benchmarks" / "peers"
PLAN = KeptPlan(SHIPPED, length=150, keep=0.4)


def chosen(*heads: list[int], length: int = 6) -> np.ndarray:
    """One layer's heads as bool ``[1, heads, length]``."""
    found = np.zeros((1, len(heads), length), dtype=bool)
    for head, positions in enumerate(heads):
        found[0, head, positions] = True
    return found


def test_entries_that_both_keep() -> None:
    ours, theirs = chosen([0, 1, 2, 3], [0, 5]), chosen([0, 1, 4, 5], [0, 5])
    assert agreement(ours, theirs, "head") == {
        "same": {"mean": 0.75, "least": 0.5},
        "at_most": 1.0,
    }
    assert agreement(ours, theirs, "layer")["same"] == {"mean": 4 / 6, "least": 4 / 6}
    fewer = chosen([0, 1], [0, 1, 2, 5])
    assert agreement(ours, fewer, "head") == {
        "same": {"mean": 0.5, "least": 0.5},
        "at_most": 0.5,
    }
    assert agreement(ours, fewer, "model") == {
        "same": {"mean": 4 / 6, "least": 4 / 6},
        "at_most": 1.0,
    }


def test_ranks_compare_what_shares_a_budget() -> None:
    """Scores of a head on another scale: the head's own ranks agree, the layer's do not."""
    ours = np.array([[[1.0, 2, 3, 4], [5.0, 6, 7, 8]], [[1.0, 2, 3, 4], [5.0, 6, 7, 8]]])
    scaled = ours * np.array([[[9.0], [0.1]], [[1.0], [1.0]]])
    assert ranks(ours, scaled, "head")["least"] == pytest.approx(1)
    by_layer = ranks(ours, scaled, "layer")
    assert by_layer["least"] < 0 < by_layer["mean"] < 1
    assert ranks(ours, -ours, "model")["mean"] == pytest.approx(-1)


def test_cases_name_policies_and_have_whole_options() -> None:
    for case in CASES:
        policy = parse_policy(case.policy, 0.3)
        assert policy.name in POLICIES
        if case.last:
            assert case.last == policy.window  # type: ignore[attr-defined]
    assert len({case.policy for case in CASES}) == len(CASES)
    adaptive = next(case for case in CASES if case.policy == "snapkv:adaptive=True")
    assert adaptive.theirs == "AdaKVPress(SnapKVPress)"


# --- a kvpress that is made up --------------------------------------------------------------------

#: Answers as the driver would: the newest entries, and of "keydiff" the first ones.
FAKE = """
from driver import reply

def answer(job):
    length, count = len(job["ids"]), round((1 - job["ratio"]) * len(job["ids"]))
    newest = [*range(4), *range(length - count + 4, length)]
    def keeps(name):
        return list(range(count)) if name == "keydiff" else newest
    def case(name):
        kept = [[keeps(name)] * HEADS] * LAYERS
        scores = [[[float(each) for each in range(length)]] * HEADS] * LAYERS
        question = [5, 6, 7] if "kvzip" in name else None
        return {"kept": kept, "scores": scores, "question": question}
    cases = {name: case(name) for name in job["cases"]}
    return {"versions": {"kvpress": "0", "transformers": "0"}, "logits": [0.0] * VOCAB,
            "cases": cases}

reply(answer)
"""


@pytest.fixture
def sizes() -> tuple[int, int, int]:
    """Layers, KV heads and words of the shipped model."""
    config = json.loads((Path(shipped_model()) / "config.json").read_text())
    return config["num_hidden_layers"], config["num_key_value_heads"], config["vocab_size"]


@pytest.fixture
def folders(tmp_path: Path, sizes: tuple[int, int, int]) -> dict[str, Path]:
    """Drivers with a made-up one, and an environment whose Python is this one."""
    drivers, python = tmp_path / "drivers", tmp_path / "peers" / "kvpress" / "bin" / "python"
    drivers.mkdir()
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (drivers / "driver.py").write_text((DRIVERS / "driver.py").read_text())
    layers, heads, words = sizes
    code = FAKE.replace("HEADS", str(heads)).replace("LAYERS", str(layers))
    (drivers / "keep_kvpress.py").write_text(code.replace("VOCAB", str(words)))
    return {"drivers": drivers, "environments": tmp_path / "peers"}


def test_ours_beside_what_is_said(tmp_path: Path, folders: dict[str, Path]) -> None:
    cases = [
        Case("streaming_llm", ("StreamingLLMPress", {"n_sink": 4})),
        Case("keydiff", ("KeyDiffPress", {}), why="all"),
        Case(
            "snapkv:adaptive=True", ("AdaKVPress", {"press": ("SnapKVPress", {})}), "layer", last=32
        ),
        Case("kvzip:sinks=0,chunk_length=70", ("KVzipPress", {}), "model"),
    ]
    out = tmp_path / "kept.json"
    result = run_kept(PLAN, cases, out, tmp_path / "work", **folders)
    streaming, keydiff, adaptive, kvzip = result["rows"]
    assert streaming["kept"] == [60, 60] and streaming["ranks"] is None
    assert streaming["same"] == {"mean": 1, "least": 1} and streaming["at_most"] == 1
    assert keydiff["kept"] == [60, 60] and 0 < keydiff["same"]["mean"] < 1
    assert -1 < adaptive["ranks"]["least"] < adaptive["ranks"]["mean"] < 1
    assert -1 < kvzip["ranks"]["mean"] == kvzip["ranks"]["least"] < 1
    assert kvzip["kept"][0] == pytest.approx(60, abs=0.1)
    assert result["logits_apart"] > 0
    job = json.loads((tmp_path / "work" / "job.json").read_text())
    assert job["ratio"] == 0.6 and len(job["ids"]) == 150
    assert job["cases"]["snapkv:adaptive=True"] == {
        "press": "AdaKVPress",
        "options": {"press": {"press": "SnapKVPress", "options": {}}},
    }
    assert not (Path(job["model"]) / "chat_template.jinja").exists()

    entry = json.loads(out.read_text())
    assert entry["result"] == result
    page = numbers_real.kept(entry)
    assert "| `streaming_llm` | StreamingLLMPress | head | 60.0 | 60.0 | 100.0% |" in page
    assert "- `keydiff`: all." in page and "`streaming_llm`:" not in page
    assert all(len(cells) == len(HEAD) for cells in kept.kept_rows(result))


def test_the_question_of_theirs_is_asked(tmp_path: Path) -> None:
    """KVzip's scores, and so its entries, are those of the question that kvpress asked."""
    case = Case("kvzip:sinks=0", ("KVzipPress", {}), "model")
    ids = PLAN.subject.corpus().passages(0, 1, 150, 1)[0].context
    found = [kept._ours(PLAN, case, ids, question)[0] for question in ([5, 6, 7], [9], [5, 6, 7])]
    assert found[0].scores is not None and found[1].scores is not None
    assert np.array_equal(found[0].kept, found[2].kept)
    assert not np.array_equal(found[0].scores, found[1].scores)
    level = np.sort(found[0].scores.ravel())[-found[0].kept.sum()]
    assert (found[0].kept == (found[0].scores >= level)).all()


def test_scores_are_those_entries_are_kept_by() -> None:
    """What ``snapkv`` is said to rank by is what it keeps by, beside its window."""
    case, length = Case("snapkv", ("SnapKVPress", {}), last=32), 150
    ids = PLAN.subject.corpus().passages(0, 1, length, 1)[0].context
    ours, _ = kept._ours(PLAN, case, ids, None)
    assert ours.scores is not None and ours.kept[..., -32:].all()
    count = round(PLAN.keep * length) - 32
    for held, scores in zip(
        ours.kept.reshape(-1, length), ours.scores.reshape(-1, length), strict=True
    ):
        best = np.argsort(-scores[:-32], kind="stable")[:count]
        assert set(best) == set(held[:-32].nonzero()[0])


#: As kvpress's classes are built: one removes entries, one masks them, one reads the text again.
PRESSES = """
from contextlib import contextmanager
import torch

class Press:
    def __init__(self, shift=0):
        self.shift, self.compression_ratio = shift, 0.0
    def score(self, module, hidden, keys, values, attentions, kwargs):
        places = torch.arange(keys.shape[2], dtype=torch.float32)
        return ((places + self.shift) % keys.shape[2]).expand(1, keys.shape[1], -1).clone()
    def compress(self, module, hidden, keys, values, attentions, kwargs):
        scores = self.score(module, hidden, keys, values, attentions, kwargs)
        best = scores.topk(int(keys.shape[2] * (1 - self.compression_ratio)), -1).indices
        best = best[..., None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, best), values.gather(2, best)
    def hook(self, module, args, kwargs, output):
        cache = next(each for each in kwargs.values() if hasattr(each, "layers"))
        held = cache.layers[module.layer_idx]
        held.keys, held.values = self.compress(
            module, None, held.keys, held.values, None, kwargs)
    @contextmanager
    def __call__(self, model):
        hooks = [each.self_attn.register_forward_hook(self.hook, with_kwargs=True)
                 for each in model.model.layers]
        yield
        for each in hooks:
            each.remove()

class Masking(Press):
    def __init__(self, press):
        self.press = press
    def compress(self, module, hidden, keys, values, attentions, kwargs):
        scores = self.press.score(module, hidden, keys, values, attentions, kwargs)
        scores *= 0
        module.masked_key_indices = (torch.zeros(3, dtype=int), torch.zeros(3, dtype=int),
                                     torch.tensor([2, 5, 7]))
        return keys, values

class Again(Press):
    def prepare(self, model, tokenizer):
        text = torch.arange(6)[None]
        return [(text, torch.cat([torch.tensor([[3, 4]]), text], 1))]
    def compress_post(self, model):
        for each in model.model.layers:
            each.self_attn.masked_key_indices = (torch.tensor([0]), torch.tensor([1]),
                                                 torch.tensor([6]))
    @contextmanager
    def __call__(self, model):
        yield
        self.read = self.prepare(model, None)
        sizes = (len(model.model.layers), 1, model.config.num_key_value_heads, 20)
        self.score_val = torch.full(sizes, float(self.read[0][1].shape[1]))
        self.compress_post(model)
        self.score_val = None
"""


def test_the_driver_reads_what_is_removed_and_what_is_masked(
    tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    (tmp_path / "kvpress.py").write_text(PRESSES)
    about = tmp_path / "kvpress-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: kvpress\nVersion: 0.1\n")
    plain = {"press": "Press", "options": {"shift": 3}}
    job = {
        "model": shipped_model(),
        "ids": list(range(10, 30)),
        "threads": 1,
        "ratio": 0.75,
        "cases": {
            "removed": plain,
            "masked": {"press": "Masking", "options": {"press": plain}},
            "again": {"press": "Again", "options": {}},
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, str(DRIVERS / "keep_kvpress.py"), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    layers, heads, words = sizes
    cases, every = said["cases"], list(range(20))
    assert said["versions"]["kvpress"] == "0.1" and len(said["logits"]) == words
    ranked = [float((each + 3) % 20) for each in every]
    assert cases["removed"]["kept"] == [[[12, 13, 14, 15, 16]] * heads] * layers
    assert cases["removed"]["scores"] == [[ranked] * heads] * layers
    without = [each for each in every if each not in (2, 5, 7)]
    assert cases["masked"]["kept"] == [[without, *[every] * (heads - 1)]] * layers
    assert cases["masked"]["scores"] == cases["removed"]["scores"], "as they were ranked by"
    assert cases["again"]["question"] == [3, 4] and cases["removed"]["question"] is None
    assert cases["again"]["scores"] == [[[8.0] * 20] * heads] * layers, "six tokens and a question"
    assert cases["again"]["kept"][0][1] == [each for each in every if each != 6]


def test_what_is_missing_is_said(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--json", str(tmp_path / "x.json"), "--work", str(tmp_path / "work")]
    where += ["--environments", str(tmp_path), "--model", shipped_model()]
    for words, message in (
        ([], "kvpress: not installed: "),
        (["--only", "keydif"], "run `make peers`"),
        (["--only", "keydifff"], "did you mean 'keydiff'"),
        (["--keep", "0"], "keep=0.0 must be above 0"),
        (["--length", "10"], "length=10"),
        (["--model", "somebody/something"], "must be a folder or a fetched model"),
    ):
        with pytest.raises(SystemExit) as stopped:
            kept.main([*where, *words])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
    (folders["drivers"] / "keep_kvpress.py").write_text("raise RuntimeError('no such press')")
    with pytest.raises(ValueError, match="kvpress: failed: RuntimeError: no such press"):
        run_kept(PLAN, CASES[:1], tmp_path / "x.json", tmp_path / "work", **folders)


def test_other_shapes_are_refused() -> None:
    found = kept.Found(np.ones((2, 1, 6), dtype=bool), None)
    other = kept.Found(np.ones((2, 2, 6), dtype=bool), None)
    with pytest.raises(ValueError, match=r"\(2, 1, 6\) here, \(2, 2, 6\) there"):
        kept._row(CASES[0], found, other)
