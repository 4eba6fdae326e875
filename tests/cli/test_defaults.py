"""What the commands take from a model's own files, and tell of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.commands import command, run
from tests.server.live import byte_tokenizer
from tests.tiny import tiny_model

TEMPLATE = (
    "{% if not enable_thinking | default(true) %}/no_think {% endif %}{% for m in messages %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
)
TOLD = "sampling defaults of the model: temperature 0.5, top_k 3, max_tokens 6 (its generation_"
SMALL = ("--policy", "full", "--kv-memory", "4MiB")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose makers say how to sample and when to think."""
    place, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer))
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=3, max_new_tokens=6)
    model.save_pretrained(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    return place


def test_generate(folder: Path) -> None:
    ask = ("generate", "--model", str(folder), *SMALL, "--chat", "--prompt", "Hi", "--json")
    code, out, err = run(*ask)
    plain = json.loads(out)
    assert code == 0 and TOLD in err and len(plain["token_ids"]) <= 6
    options = ("--chat-template-kwargs", '{"enable_thinking": false}', "--max-tokens", "2")
    code, out, err = run(*ask, *options, "--generation-config", "none")
    other = json.loads(out)
    assert code == 0 and "sampling defaults" not in err and len(other["token_ids"]) <= 2
    assert len(other["prompt_token_ids"]) > len(plain["prompt_token_ids"])


def test_chat(folder: Path) -> None:
    code, _, err = run("chat", str(folder), *SMALL, text="Hi\n")
    assert code == 0 and TOLD in err
    # whatever it says, it ends before it has said anything
    stops = [f"--stop={letter}" for letter in map(chr, range(33, 127))]
    options = ("--generation-config", "none", "--chat-template-kwargs", '{"enable_thinking": 0}')
    code, out, err = run("chat", str(folder), *SMALL, *stops, *options, text="Hi\n")
    assert code == 0 and "sampling defaults" not in err
    assert not set(out) & set(map(chr, range(33, 127)))


def test_batch(folder: Path, tmp_path: Path) -> None:
    source, body = tmp_path / "in.jsonl", {"prompt": "Hi", "ignore_eos": True}
    source.write_text(json.dumps({"custom_id": "a", "url": "/v1/completions", "body": body}))
    for name, options, count in (("a", (), 6), ("b", ("--generation-config", "none"), 256)):
        target = tmp_path / name
        code, _, err = run("batch", str(source), str(target), str(folder), *SMALL, *options)
        assert code == 0 and (TOLD in " ".join(err.split())) == (not options)
        usage = json.loads(target.read_text())["response"]["body"]["usage"]
        assert usage["completion_tokens"] == count


def test_serve(folder: Path) -> None:
    with command("serve", str(folder), *SMALL, "--port", "0") as begun:
        begun.says(r"serves .* at (http://\S+)")
        assert TOLD in begun.err


def test_serve_names_a_key_that_it_cannot_do(folder: Path) -> None:
    file = folder / "generation_config.json"
    kept = file.read_text()
    file.write_text(json.dumps({"no_repeat_ngram_size": 3}))
    try:
        code, out, err = run("serve", str(folder), *SMALL, "--port", "0")
    finally:
        file.write_text(kept)
    (line,) = err.strip().splitlines()
    assert (code, out) == (2, "") and line.startswith("error: generation_config.json of ")
    assert "no_repeat_ngram_size=3 is not supported" in line
