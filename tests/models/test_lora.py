"""Adapters of the peft library: models that hold one, and folders that are one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.cli.app import app
from tests.tiny import model_greedy, random_prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
NEW, PROMPT = 10, random_prompt(1, 30)
TARGETS = ["q_proj", "v_proj", "up_proj"]
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_dropout=0.5,
        init_lora_weights=False,
        target_modules=TARGETS,
    ),
    "dora": lambda: peft.LoraConfig(
        r=4,
        init_lora_weights=False,
        use_dora=True,
        use_rslora=True,
        target_modules=TARGETS,
    ),
    "saved": lambda: peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        init_lora_weights=False,
        target_modules=TARGETS,
        modules_to_save=["lm_head"],
    ),
    "loha": lambda: peft.LoHaConfig(
        task_type="CAUSAL_LM", r=4, init_weights=False, target_modules=TARGETS
    ),
    "ia3": lambda: peft.IA3Config(
        task_type="CAUSAL_LM",
        init_ia3_weights=False,
        target_modules=["k_proj", "down_proj"],
        feedforward_modules=["down_proj"],
    ),
}


def adapted(kind: str, base: Any) -> Any:
    torch.manual_seed(5)
    model = peft.get_peft_model(base, CONFIGS[kind]())
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "modules_to_save" in name:
                each += torch.randn_like(each) * 0.1
    return model.eval()


def greedy(model: Any, **options: Any) -> list[int]:
    llm = LLM(model, policy="full", kv_memory="1MiB", **options)
    return llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save(kind: str, base: Path) -> tuple[Path, list[int]]:
    """A folder with an adapter, and the tokens that peft gives with it."""
    model = adapted(kind, AutoModelForCausalLM.from_pretrained(base))
    folder = base.parent / "adapter"
    model.save_pretrained(folder)
    return folder, model_greedy(model, PROMPT, NEW)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_a_peft_model_runs_with_its_adapter(kind: str) -> None:
    """Without the adapter's dropout, and in training mode it is left."""
    model = adapted(kind, tiny_model("llama"))
    expected = model_greedy(model, PROMPT, NEW)
    assert expected != model_greedy(tiny_model("llama"), PROMPT, NEW)
    assert greedy(model) == expected
    model.train()
    assert greedy(model, backend="reference") == expected
    assert model.training and model.base_model.model.training
    with model.disable_adapter():
        assert greedy(model) == model_greedy(tiny_model("llama"), PROMPT, NEW)


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_an_adapters_folder_is_merged_into_its_base(kind: str, base: Path) -> None:
    folder, expected = save(kind, base)
    llm = LLM(str(folder), policy="full", kv_memory="1MiB")
    assert llm.generate([PROMPT], SamplingParams(max_tokens=NEW))[0].token_ids == expected
    assert llm.name == str(folder)
    layer: nn.Module = llm.engine.runner.body.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear, "merged, so the layers stay plain"


def test_prompt_tuning_is_refused() -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(ValueError, match="of the kind 'PROMPT_TUNING'; supported are: LORA"):
        LLM(model)


def configure(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"base_model_name_or_path": "/no/where"}, r"'/no/where' does not exist.*merge_and_unload"),
        ({"base_model_name_or_path": None}, r"names no base model.*merge_and_unload"),
        (
            {"base_model_name_or_path": "owner/base"},
            r"base model 'owner/base'.*not on this machine",
        ),
        (
            {"base_model_name_or_path": "smollm3"},
            r"'smollm3' does not exist; did you mean 'smollm2",
        ),
        ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING'"),
        ({"peft_type": "os.system"}, "of the kind 'os.system'"),
        ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS'"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"r": 5}, "cannot merge adapter"),
        ({"target_modules": ["q_proj", "v_proj"]}, "it has no place for .*up_proj"),
        ({"target_modules": [*TARGETS, "o_proj"]}, "it lacks the tensor .*o_proj"),
    ],
)
def test_adapters_that_cannot_be_merged(
    base: Path, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder, _ = save("lora", base)
    configure(folder, **keys)
    with pytest.raises(ValueError, match=message) as caught:
        LLM(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_an_adapter_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="one tensor in the base"):
        LLM(str(tmp_path / "adapter"))


def test_an_adapters_weights_are_whole(base: Path) -> None:
    folder, _ = save("lora", base)
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    save_file({key: each for key, each in tensors.items() if key != name}, weights)
    with pytest.raises(ValueError, match=f"lacks the tensor {name.removesuffix('.weight')}"):
        LLM(str(folder))
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="is a git-lfs pointer"):
        LLM(str(folder))
    weights.unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        LLM(str(folder))


def test_without_peft_the_command_says_what_to_install(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    folder, _ = save("lora", base)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "peft" else find(name, *rest),
    )
    result = CliRunner().invoke(app, ["generate", "--model", str(folder), "--prompt", "a"])
    assert result.exit_code == 2
    assert "pip install 'pyramidinfer[peft]'" in result.stderr
