"""What lies in a model's folder: every tensor and key is used, or refused by its name."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.loading import load_config, load_model
from tests.tiny import model_greedy, random_prompt, tiny_model

Tensors = dict[str, torch.Tensor]
NEW = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder: Path, drop: str = "", **keys: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | keys
    raw.pop(drop, None)
    path.write_text(json.dumps(raw))


def greedy(model: Any, prompt: list[int], **options: Any) -> list[int]:
    llm = LLM(model, policy="full", kv_memory="1MiB", **options)
    return llm.generate([prompt], SamplingParams(max_tokens=NEW))[0].token_ids


# --- tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(32), "attention_bias"),
        ("model.layers.0.self_attn.q_proj.weight_scale", torch.ones(1), "quantization_config"),
        ("model.layers.4.mlp.up_proj.weight", torch.ones(48, 32), "belong to different models"),
    ],
)
def test_a_tensor_without_a_place_is_refused(
    folder: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(ValueError, match=rf"has the tensor {name}, for which.*{message}"):
        LLM(str(folder))


def test_several_tensors_without_a_place_are_counted(folder: Path) -> None:
    names = [f"model.layers.{layer}.self_attn.k_proj.bias" for layer in range(3)]
    change(folder, lambda tensors: tensors.update({name: torch.ones(16) for name in names}))
    with pytest.raises(ValueError, match=rf"has the tensor {names[0]} \(and 2 more\)"):
        LLM(str(folder))


def test_buffers_that_are_worked_out_anew_are_harmless(folder: Path) -> None:
    expected = greedy(str(folder), [5, 6, 7])
    change(
        folder,
        lambda tensors: tensors.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.self_attn.masked_bias": torch.ones(1),
                "model.layers.0.attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
                "model.embeddings.position_ids": torch.arange(4)[None],
            }
        ),
    )
    with pytest.raises(ValueError, match="embeddings"):  # see that it is looked at
        change(folder, lambda tensors: tensors.update({"model.embeddings.x": torch.ones(1)}))
        LLM(str(folder))
    change(folder, lambda tensors: tensors.pop("model.embeddings.x"))
    assert greedy(str(folder), [5, 6, 7]) == expected


def test_a_tied_head_that_is_saved_too_is_harmless(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    change(
        tmp_path,
        lambda tensors: tensors.update(
            {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
        ),
    )
    assert greedy(str(tmp_path), [5, 6, 7]) == model_greedy(model, [5, 6, 7], NEW)


def test_integers_are_no_weights(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(ValueError, match=rf"has {name} in I8, which is no plain floating-point"):
        LLM(str(folder))


def test_a_checkpoint_without_a_dtype_loads_as_it_is_stored(folder: Path) -> None:
    change(
        folder,
        lambda tensors: tensors.update(
            {name: each.bfloat16() for name, each in tensors.items() if "norm" not in name}
        ),
    )
    configure(folder, drop="dtype")
    assert load_config(str(folder)).dtype is torch.bfloat16
    assert load_model(str(folder)).dtype is torch.bfloat16
    assert load_model(str(folder), dtype="float32").dtype is torch.float32


def test_a_dtype_that_is_none_to_compute_in_is_refused(folder: Path) -> None:
    configure(folder, dtype="int8")
    with pytest.raises(ValueError, match="dtype='int8'"):
        LLM(str(folder))


# --- files ------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_git_lfs_pointers_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(ValueError, match=rf"{name}' is a git-lfs pointer.*`git lfs pull`"):
        LLM(str(folder))


def test_a_gguf_that_is_a_pointer(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text(POINTER)
    with pytest.raises(ValueError, match=r"model.gguf' is a git-lfs pointer"):
        LLM(str(tmp_path / "model.gguf"))


def test_an_index_may_name_files_of_its_folder_only(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = folder / "model.safetensors.index.json"
    for place in (
        "../other.safetensors",
        str(tmp_path / "other.safetensors"),
        "a/b.safetensors",
        "weights.bin",
        5,
    ):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": place}}))
        (folder / "some.safetensors").touch()
        with pytest.raises(ValueError, match=r"it may only name safetensors files of its own"):
            LLM(str(folder))
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "gone.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks its weights file 'gone.safetensors'"):
        LLM(str(folder))
    for text in ("{}", "[]", "{", '{"weight_map": 5}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"is not a readable index of weights"):
            LLM(str(folder))


def test_a_checkpoint_in_shards(folder: Path) -> None:
    expected = greedy(str(folder), [5, 6, 7])
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert greedy(str(folder), [5, 6, 7]) == expected


def test_a_hub_id_in_the_cache_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    expected = greedy(str(folder), [5, 6, 7])
    kept = tmp_path / "hub" / "models--owner--cached-model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("0" * 40)
    (kept / "snapshots").mkdir()
    folder.rename(kept / "snapshots" / ("0" * 40))
    llm = LLM("owner/cached-model", policy="full", kv_memory="1MiB")
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=NEW))[0].token_ids == expected
    assert llm.name == "owner/cached-model"


def test_of_a_hub_id_only_what_is_read_is_fetched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small files first, so that a model that cannot run is refused before weights come."""
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = {each.name for each in folder.glob("*.safetensors")}
    asked: list[set[str]] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert (name, ignore_patterns) == ("owner/new-model", ["*/*"])
        asked.append(set(allow_patterns))
        return str(folder)

    monkeypatch.setattr("pyramidinfer.models.folder.snapshot_download", download)
    LLM("owner/new-model", policy="full", kv_memory="1MiB")
    small = {"*.json", "*.model", "*.txt", "*.jinja"}
    assert asked == [small, small | shards]


@pytest.mark.parametrize(
    "command", ["generate", "inspect", "profile", "chat", "serve", "verify", "calibrate"]
)
def test_a_hub_id_without_a_network_fails_at_once(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from pyramidinfer.cli.app import app

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    words = {
        "generate": ["--model", "owner/some-model", "--prompt", "a"],
        "inspect": ["--model", "owner/some-model"],
    }
    began = time.monotonic()
    result = CliRunner().invoke(app, [command, *words.get(command, ["owner/some-model"])])
    assert result.exit_code == 2
    assert time.monotonic() - began < 10
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert "model 'owner/some-model' is not on this machine, and the Hugging Face Hub" in lines[0]


# --- config.json ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_implementation", "owner/kernel:attention"),
        ("_attn_implementation", "owner/kernel"),
        ("_attn_implementation_internal", "owner/kernel"),
        ("attn_implementation", {"": "sdpa", "text_config": "owner/kernel"}),
        ("experts_implementation", "owner/kernel"),
        ("quantization_config", {"nested": [{"attn_implementation": "owner/kernel"}]}),
        ("text_config", {"_attn_implementation": "owner/kernel"}),
        ("fusion_config", {"a": True}),
        ("transformers_weights", "../other.safetensors"),
        ("configuration_files", ["config.4.0.json"]),
    ],
)
def test_a_config_chooses_no_code(
    folder: Path, key: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import hub_kernels

    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: pytest.fail("code was fetched"))
    configure(folder, **{key: value})
    last = "attn_implementation" if key == "quantization_config" else key
    with pytest.raises(ValueError, match=rf"config.json' has {last}=.*take the key out"):
        LLM(str(folder))


def test_what_many_configs_carry_is_harmless(folder: Path) -> None:
    """transformers' own attention, and remote code for what transformers has by now."""
    expected = greedy(str(folder), [5, 6, 7])
    configure(
        folder,
        _attn_implementation="flash_attention_2",
        attn_implementation="eager",
        _attn_implementation_autoset=True,
        num_labels=10**9,
        auto_map={"AutoConfig": "owner/code--a.B", "AutoModelForCausalLM": "modeling.Evil"},
    )
    (folder / "modeling.py").write_text("raise SystemExit('remote code was run')")
    llm = LLM(str(folder), policy="full", kv_memory="1MiB")
    assert llm.generate([[5, 6, 7]], SamplingParams(max_tokens=NEW))[0].token_ids == expected
    assert not hasattr(llm.engine.runner.config, "auto_map")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head_dim", 0, "head_dim=0; it must be a whole number between 1"),
        ("head_dim", -8, "head_dim=-8"),
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000; .* between 1 and 1024"),
        ("num_hidden_layers", None, "num_hidden_layers=None"),
        ("num_attention_heads", "4", "num_attention_heads='4'"),
        ("num_key_value_heads", 3, "num_key_value_heads=3 does not divide"),
        ("hidden_size", 2.5, "hidden_size=2.5"),
        ("vocab_size", 10**15, "vocab_size=10000"),
        ("max_position_embeddings", -1, "max_position_embeddings=-1"),
        ("hidden_act", "gleu", "hidden_act='gleu'; did you mean '.elu'"),
        ("hidden_act", ["silu"], "hidden_act"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, "rope_type='spiral'"),
        ("rope_parameters", {"rope_type": "linear", "factor": "8"}, "factor='8'"),
        ("quantization_config", {"quant_method": "foo"}, "quant_method='foo'"),
        ("layer_types", 5, "config.json|no model can be built"),
        ("rms_norm_eps", "x", "config.json|no model can be built"),
    ],
)
def test_absurd_configs(folder: Path, key: str, value: Any, message: str) -> None:
    configure(folder, **{key: value})
    began = time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        LLM(str(folder))
    assert len(str(caught.value).splitlines()) == 1
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_broken_files_beside_the_weights_are_named(folder: Path, name: str) -> None:
    for text in ("{", "[]", "[" * 100_000):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name}' is not a readable"):
            LLM(str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_that_nests_too_deeply(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    deep = '{"model_type": "llama", "weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (folder / name).write_text(deep)
    with pytest.raises(ValueError, match=f"{name}' is not a readable"):
        LLM(str(folder))


def test_mistral_with_layer_types_is_another_family(tmp_path: Path) -> None:
    tiny_model("mistral").save_pretrained(tmp_path)
    configure(tmp_path, layer_types=["full_attention", "sliding_attention"] * 2)
    with pytest.raises(ValueError, match="'ministral' is not supported"):
        LLM(str(tmp_path))


# --- models that are handed in ----------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_training_mode_runs_without_dropout(backend: str) -> None:
    prompt = random_prompt(3, 20)
    for family in ("llama", "opt"):
        model = tiny_model(family, attention_dropout=0.5, dropout=0.5)
        expected = model_greedy(model, prompt, NEW)
        model.train()
        assert greedy(model, prompt, backend=backend) == expected
        assert all(module.training for module in model.modules()), "its mode is left"


def test_training_mode_that_comes_later() -> None:
    model = tiny_model("gpt_neox", hidden_dropout=0.5)
    prompt = random_prompt(3, 20)
    expected = model_greedy(model, prompt, NEW)
    llm = LLM(model, policy="full", kv_memory="1MiB")
    model.train()
    assert llm.generate([prompt], SamplingParams(max_tokens=NEW))[0].token_ids == expected
    assert model.training


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": 128}, "sliding_window=128 has no effect"),
        (
            {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
            "rope_theta=5.0 has no effect next to rope_parameters",
        ),
    ],
)
def test_keys_without_effect(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    folder = tmp_path / "model"
    tiny_model("llama", torch.float32).save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=named):
        LLM(str(folder), "full", kv_memory="4MiB")
