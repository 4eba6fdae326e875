"""The survival map: every kept entry, in figures, picture and page."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyramidinfer import LLM
from pyramidinfer.cli.app import main
from pyramidinfer.lab.samples import Subject
from pyramidinfer.lab.survival import (
    WINDOW,
    MapPlan,
    Survival,
    measure_survival,
    page,
    run_map,
    visible,
)
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import POLICIES, make_policy
from pyramidinfer.types import Trace
from tests.lab.test_rac import attention
from tests.tiny import random_prompt, tiny_model

SHIPPED = Subject(shipped_model(), kv_memory="16MiB")


def embedded(html: str) -> dict[str, Any]:
    """The page's data as a browser reads it: up to the first end of a script."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def entries(data: dict[str, Any], name: str, layer: int, head: int) -> list[int]:
    """Positions that a KV head holds, out of the page's bits."""
    bits = np.frombuffer(base64.b64decode(data[name]), dtype=np.uint8)
    bits = bits.reshape(len(data["heads"]), len(data["tokens"]), -1)
    held = bits[layer, :, head // 8] >> (head % 8) & 1
    positions: list[int] = held.nonzero()[0].tolist()
    return positions


def opened(spans: list[list[int]]) -> list[int]:
    return [position for start, stop in spans for position in range(start, stop)]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_kept_entry_is_there(name: str, tmp_path: Path) -> None:
    policy = make_policy(name) if name == "full" else make_policy(name, 0.6)
    out = tmp_path / "map.json"
    picture, html = run_map(MapPlan(SHIPPED, context=150, max_tokens=6), policy, out)
    assert picture.read_bytes().startswith(b"\x89PNG")
    entry = json.loads(out.read_text())
    meta, rows = entry["meta"], entry["rows"]
    data = embedded(html.read_text(encoding="utf-8"))
    llm = SHIPPED.llm(policy)
    trace: Trace = llm.trace(meta["configuration"]["prompt_token_ids"], 6)
    assert meta["generated_token_ids"] == trace.token_ids
    assert [row["layer"] for row in rows] == list(range(12))
    for row in rows:
        layer = row["layer"]
        assert len(opened(row["reached"])) == trace.computed_by_layer[layer]
        for key, field, kept in (
            ("kept", "kept", trace.prefill_positions),
            ("end", "kept_at_end", trace.kept_positions),
        ):
            for head, wanted in enumerate(each.tolist() for each in kept[layer]):
                assert opened(row[field][head]) == wanted == entries(data, key, layer, head)
    reached = np.frombuffer(base64.b64decode(data["reached"]), dtype=np.uint8).reshape(12, -1)
    assert reached.sum(1).tolist() == trace.computed_by_layer[:12]  # the first time
    kept_share = np.mean([row["kept_share"] for row in rows])
    assert f"<h1>{name}" in html.read_text(encoding="utf-8")
    assert f"{reached.mean():.0%} of layer-tokens computed, {kept_share:.0%} kept" in (
        html.read_text(encoding="utf-8")
    )
    start, stop = data["needle"]
    assert data["tokens"][start] == "The" and data["tokens"][stop - 1] == "."


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_scores_are_attention_from_the_newest_queries(family: str) -> None:
    model, prompt = tiny_model(family, torch.float64), random_prompt(3, 70)
    llm = LLM(model, policy="full", kv_memory="4MiB", prefill_chunk=48)
    _, rows = measure_survival(llm, prompt, 0)
    for row, weights in zip(rows, attention(model, prompt), strict=True):
        np.testing.assert_allclose(row["scores"], weights[-WINDOW:].mean(0), rtol=1e-3, atol=1e-6)


def test_a_token_that_did_not_get_to_a_layer_has_no_score_there() -> None:
    llm = LLM(
        tiny_model("llama", torch.float64),
        policy=make_policy("pyramidinfer", 0.6),
        kv_memory="4MiB",
    )
    _, rows = measure_survival(llm, random_prompt(3, 200), 0)
    assert len(opened(rows[-1]["reached"])) < 200
    for row in rows:
        there = [place for place, score in enumerate(row["scores"]) if score is not None]
        assert there == opened(row["reached"])


def test_the_page_is_safe_whatever_a_token_says() -> None:
    hostile = [
        "</script><script>alert(1)</script>",
        "<!--",
        "'\"&",
        "\x00\x1b\n",
        "\u202e\u2028",
        "@data@",
        "\ud800",
    ]
    held = np.ones((2, 9, len(hostile)), dtype=bool)
    found = Survival(
        "x <b> @data@",
        [visible(token) for token in hostile],
        len(hostile),
        [9, 9],
        np.ones((2, len(hostile)), dtype=bool),
        held,
        held,
        np.zeros((2, len(hostile)), dtype=np.float32),
        WINDOW,
        None,
    )
    html = page(found)
    assert "alert" not in html.replace("\\u003cscript\\u003ealert", "")
    assert html.count("</script>") == 2  # the data's and the program's
    assert "<b>" not in html and "x &lt;b&gt; @data@" in html
    data = embedded(html)
    assert data["tokens"][0] == hostile[0] and data["tokens"][2] == hostile[2]
    assert data["tokens"][3:5] == ["<U+0000><U+001B>⏎", "<U+202E><U+2028>"]
    assert entries(data, "kept", 1, 8) == list(range(len(hostile)))
    assert not re.search(r"(src|href|url)\s*[=(]", html)  # it needs nothing from elsewhere
    assert "default-src 'none'" in html
    html.encode("utf-8")


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, out = tmp_path / "prompt.txt", tmp_path / "m.json"
    prompt.write_text("The old baker walked to the market . " * 6)
    command = ["pyramidinfer", "study", "map", "--json", str(out), "--kv-memory", "8MiB"]
    given = [
        *command,
        "--policy",
        "snapkv",
        "-o",
        "capacity=20",
        "-o",
        "window=4",
        "--prompt-file",
        str(prompt),
        "--max-tokens",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert capsys.readouterr().out.split() == [
        str(out),
        str(out.with_suffix(".png")),
        str(out.with_suffix(".html")),
    ]
    entry = json.loads(out.read_text())
    assert all(len(opened(head)) == 20 for row in entry["rows"] for head in row["kept"])
    assert "snapkv window=4 capacity=20" in " ".join(out.with_suffix(".html").read_text().split())
    monkeypatch.setattr(sys, "argv", [*command, "--prompt", "x", "--prompt-file", str(prompt)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "give --prompt or --prompt-file, not both" in capsys.readouterr().err
