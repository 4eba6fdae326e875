"""The module paths of each supported family, and its computations around the decoder layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "find_family"]

Embed = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]
Finish = Callable[[nn.Module, Any, Tensor], Tensor]
Window = Callable[[Any, nn.Module], int | None]


def _embed_plain(body: nn.Module, config: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = body.embed_tokens(ids)  # type: ignore[operator]
    return embedded


def _embed_granite(body: nn.Module, config: Any, ids: Tensor, positions: Tensor) -> Tensor:
    scaled: Tensor = body.embed_tokens(ids) * config.embedding_multiplier  # type: ignore[operator]
    return scaled


def _embed_neox(body: nn.Module, config: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = body.embed_in(ids)  # type: ignore[operator]
    return embedded


def _embed_opt(body: nn.Module, config: Any, ids: Tensor, positions: Tensor) -> Tensor:
    embedded: Tensor = body.embed_tokens(ids)  # type: ignore[operator]
    if body.project_in is not None:
        embedded = body.project_in(embedded)  # type: ignore[operator]
    learned: Tensor = body.embed_positions(None, position_ids=positions)  # type: ignore[operator]
    return embedded + learned


def _finish_norm(body: nn.Module, config: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = body.norm(hidden)  # type: ignore[operator]
    return normed


def _finish_neox(body: nn.Module, config: Any, hidden: Tensor) -> Tensor:
    normed: Tensor = body.final_layer_norm(hidden)  # type: ignore[operator]
    return normed


def _finish_opt(body: nn.Module, config: Any, hidden: Tensor) -> Tensor:
    for part in (body.final_layer_norm, body.project_out):
        if part is not None:
            hidden = part(hidden)  # type: ignore[operator]
    return hidden


def _logits_plain(config: Any, logits: Tensor) -> Tensor:
    return logits


def _logits_granite(config: Any, logits: Tensor) -> Tensor:
    scaled: Tensor = logits / config.logits_scaling
    return scaled


def _logits_softcap(config: Any, logits: Tensor) -> Tensor:
    cap = config.final_logit_softcapping
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _window_none(config: Any, attention: nn.Module) -> int | None:
    return None


def _window_of_config(config: Any, attention: nn.Module) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _window_of_layer(config: Any, attention: nn.Module) -> int | None:
    window: int | None = attention.sliding_window  # type: ignore[assignment]
    return window


@dataclass(frozen=True)
class Family:
    """How to drive one ``model_type`` of transformers.

    ``body``: path to the module that holds the layers; ``attention``: the attention module's
    name in a layer; ``grouped``: whether it can have fewer KV heads than query heads;
    ``rotary_by_type``: whether rotary tables differ by layer type (Gemma 3);  ``plain``: whether
    layers have the structure of Llama's or Gemma 3's (``models/fused.py``);  ``split``: how linears
    are split over ranks, if transformers has no plan or a different one (``models/sharding.py``);
    ``stages``: parts of the body in the order of execution, if transformers has no plan for it
    (``models/stages.py``).
    """

    title: str
    body: str = "model"
    attention: str = "self_attn"
    embed: Embed = _embed_plain
    finish: Finish = _finish_norm
    logits: Callable[[Any, Tensor], Tensor] = _logits_plain
    window: Window = _window_none
    grouped: bool = True
    rotary: bool = True
    rotary_by_type: bool = False
    plain: bool = False
    split: dict[str, str] = field(default_factory=dict)
    stages: tuple[str, ...] = ()


#: The plans of transformers would gather all heads on every rank.
SPLIT_PHI3 = {
    "layers.*.self_attn.qkv_proj": "packed",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_up_proj": "packed",
    "layers.*.mlp.down_proj": "rowwise",
}
SPLIT_OLMO2 = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    **{f"layers.*.self_attn.{name}_norm": "norm" for name in "qk"},
    "layers.*.self_attn.o_proj": "rowwise",
}
#: transformers has none.
SPLIT_OPT = {
    **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
    "layers.*.self_attn.out_proj": "rowwise",
    "layers.*.fc1": "colwise",
    "layers.*.fc2": "rowwise",
}

#: transformers' ``model_type`` → how to drive it.
FAMILIES: dict[str, Family] = {
    "llama": Family("Llama", plain=True),
    "mistral": Family("Mistral", window=_window_of_config, plain=True),
    "qwen2": Family("Qwen2", window=_window_of_layer, plain=True),
    "qwen3": Family("Qwen3", window=_window_of_layer, plain=True),
    "phi3": Family("Phi-3", window=_window_of_config, plain=True, split=SPLIT_PHI3),
    "gemma2": Family("Gemma 2", window=_window_of_layer, logits=_logits_softcap),
    "gemma3_text": Family(
        "Gemma 3 (text)",
        window=_window_of_layer,
        logits=_logits_softcap,
        rotary_by_type=True,
        plain=True,
    ),
    "smollm3": Family("SmolLM3", window=_window_of_layer, plain=True),
    "olmo2": Family("OLMo2", split=SPLIT_OLMO2),
    "granite": Family("Granite", embed=_embed_granite, logits=_logits_granite),
    "gpt_neox": Family(
        "GPT-NeoX",
        body="gpt_neox",
        attention="attention",
        embed=_embed_neox,
        finish=_finish_neox,
        grouped=False,
    ),
    "opt": Family(
        "OPT",
        body="model.decoder",
        embed=_embed_opt,
        finish=_finish_opt,
        grouped=False,
        rotary=False,
        split=SPLIT_OPT,
        stages=(
            "embed_tokens",
            "embed_positions",
            "project_in",
            "layers",
            "final_layer_norm",
            "project_out",
        ),
    ),
}


def find_family(config: Any) -> Family:
    """The family of a transformers config; ``ValueError`` that lists the supported ones
    otherwise."""
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str) or kind not in FAMILIES:
        titles = ", ".join(family.title for family in FAMILIES.values())
        raise ValueError(f"model type {kind!r:.80} is not supported; supported families: {titles}")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{kind} with bidirectional attention is not supported")
    return FAMILIES[kind]
