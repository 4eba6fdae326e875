"""LoRA adapters for tests: random ones of the tiny models, in folders as peft saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch

from tests.tiny import tiny_model

#: Linears of a family's layers, in two halves: adapters of different targets.
TARGETS = {
    "phi3": (["qkv_proj", "down_proj"], ["o_proj", "gate_up_proj"]),
    "gpt_neox": (["query_key_value", "dense_h_to_4h"], ["dense", "dense_4h_to_h"]),
    "opt": (["q_proj", "fc1"], ["v_proj", "out_proj", "fc2"]),
}
USUAL = (["q_proj", "v_proj", "up_proj"], ["k_proj", "o_proj", "gate_proj", "down_proj"])
FIRST = {"r": 4, "lora_alpha": 8}
SECOND = {"r": 9, "lora_alpha": 5, "use_rslora": True}


def adapted(family: str, which: int, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model in peft's wrapper with the first or second adapter of its family."""
    options: dict[str, Any] = {**(FIRST, SECOND)[which], "init_lora_weights": False}
    targets = TARGETS.get(family, USUAL)[which]
    if which:
        options |= {"rank_pattern": {targets[-1]: 3}, "alpha_pattern": {targets[0]: 7}}
    model = tiny_model(family, dtype)
    model.generation_config.eos_token_id = None
    torch.manual_seed(which)
    config = peft.LoraConfig(**{**options, "target_modules": targets, **changes})
    return peft.get_peft_model(model, config).eval()


def save_adapter(folder: Path, family: str, which: int, **changes: Any) -> str:
    """Its folder."""
    adapted(family, which, **changes).save_pretrained(folder)
    return str(folder)
