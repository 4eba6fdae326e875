"""Reading LoRA adapters that are served with their base model (``lora_modules``)."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from pyramidinfer.models.adapters import Adapter, Part
from pyramidinfer.models.catalog import CATALOG, check_path, fetched
from pyramidinfer.models.families import find_family
from pyramidinfer.models.folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    check_pointer,
    model_folder,
    one_line,
    read_json,
)

__all__ = ["read_adapters"]

WAY_OUT = "merge it into its base instead: give its folder as the model"
CONFIG = "config.json"
#: Keys of an adapter's config that change its effect, and their meaning.
REFUSED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules in addition to low ranks",
    "lora_bias": "biases",
    "trainable_token_indices": "embeddings of some tokens",
    "target_parameters": "parameters outside of linears",
    "layer_replication": "layers used twice",
    "megatron_config": "Megatron's layers",
    "alora_invocation_tokens": "tokens that activate it",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal parts",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "a router",
    "kasa_config": "KaSA",
}
#: Initializations that do not change the base's weights.
BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
#: Config keys that must agree if two models use the same adapter.
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size")
#: Heads and embeddings of the families.
TABLES = ("lm_head", "embed_out", "embed_tokens", "embed_in", "embed_positions")
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def read_adapters(
    modules: Mapping[str, str], body: nn.Module, config: Any, like: Tensor
) -> dict[str, Adapter]:
    """Adapters by name, each from its folder or hub id, checked against the base model (which needs
    no weights), with tensors like ``like``.

    ``ValueError`` that names the adapter if it cannot be served with the base.
    """
    found = {}
    for name, path in modules.items():
        try:
            found[name] = _Reader(name, path, body, config).adapter(like)
        except ValueError as error:
            raise ValueError(f"adapter {name!r} ({path}): {error}") from None
    return found


class _Reader:
    """One adapter's folder."""

    def __init__(self, name: str, path: str, body: nn.Module, config: Any) -> None:
        self.name, self.path, self.config = name, path, config
        self.folder = model_folder(check_path(path), weights=True)
        if not (self.folder / ADAPTER).is_file():
            raise ValueError(f"it has no {ADAPTER}: this is not an adapter's folder")
        self.raw = read_json(self.folder / ADAPTER, "adapter config")
        self.inside = find_family(config).body
        self.linears = {
            place: each
            for place, each in body.named_modules()
            if place.startswith("layers.") and hasattr(each, "in_features")
        }

    def adapter(self, like: Tensor) -> Adapter:
        self._check()
        self._check_base()
        pairs = self._pairs()
        parts: dict[int, dict[str, Part]] = {}
        digest = hashlib.sha256()
        for place, (down, up) in sorted(pairs.items()):
            scale = self._scale(place, down, up)
            _, number, inside = place.split(".", 2)
            parts.setdefault(int(number), {})[inside] = Part(down.to(like), up.to(like), scale)
            digest.update(f"{place} {tuple(down.shape)} {scale}\n".encode())
            for each in (down, up):
                digest.update(each.float().contiguous().numpy().tobytes())
        self._check_targets(pairs)
        return Adapter(self.name, self.path, digest.hexdigest()[:32], parts)

    def _check(self) -> None:
        """``ValueError`` if the adapter is more than low-rank matrices for linears."""
        raw = self.raw
        if raw.get("peft_type") != "LORA":
            raise ValueError(
                f"it is of the kind {raw.get('peft_type')!r:.80}, and only LORA is served with "
                f"the base; {WAY_OUT}"
            )
        if raw.get("task_type") not in (None, "CAUSAL_LM"):
            raise ValueError(
                f"it is for the task {raw['task_type']!r:.80}, not for generating text"
            )
        if raw.get("bias", "none") != "none":
            raise ValueError(f"bias={raw['bias']!r:.80}: biases are not changed; {WAY_OUT}")
        for key, what in REFUSED.items():
            if raw.get(key):
                raise ValueError(
                    f"{key}={raw[key]!r:.80}: {what}, which cannot be served with the base; "
                    f"{WAY_OUT}"
                )
        if raw.get("init_lora_weights", True) not in BEGINNINGS:
            raise ValueError(
                f"init_lora_weights={raw['init_lora_weights']!r:.80} also changes the base's "
                f"weights; {WAY_OUT}"
            )

    def _check_base(self) -> None:
        """``ValueError`` if its base is available and a different model."""
        base = self.raw.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            return
        folder = fetched(base) if base in CATALOG else Path(base).expanduser()
        if folder is None or not (folder / CONFIG).is_file():
            return  # only its shapes are checked
        theirs = read_json(folder / CONFIG, "config")
        for key in SIZES:
            mine = getattr(self.config, key, None)
            if key in theirs and theirs[key] != mine:
                raise ValueError(
                    f"it is for the base model {base!r}, whose {key} is {theirs[key]!r:.40}; here "
                    f"it is {mine!r:.40}: serve it with that model"
                )

    def _pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Both tensors of every linear, by its place in the body (``layers.0.mlp.up_proj``)."""
        weights = self.folder / ADAPTER_WEIGHTS
        if not weights.is_file():
            raise ValueError(f"it has no {ADAPTER_WEIGHTS}; other formats are not loaded")
        check_pointer(weights)
        found: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(weights, "pt") as tensors:
                for key in sorted(tensors.keys()):
                    place, which = self._place(key)
                    found.setdefault(place, {})[which] = tensors.get_tensor(key)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"cannot load {str(weights)!r}: {one_line(error)}") from None
        for place, both in found.items():
            for which in "AB":
                if which not in both:
                    raise ValueError(f"it lacks the tensor {place}.lora_{which}")
        if not found:
            raise ValueError("it holds no tensor")
        return {place: (both["A"], both["B"]) for place, both in found.items()}

    def _place(self, key: str) -> tuple[str, str]:
        """The linear of the body that a tensor belongs to, and whether it is A or B."""
        table = next((each for each in TABLES if each in key.split(".")), None)
        if table is not None:
            raise ValueError(
                f"it changes {table}, and adapters on heads and embeddings are not served; "
                f"{WAY_OUT}"
            )
        match = KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{key} is not a low-rank matrix of a linear; {WAY_OUT}")
        place = match[1].removeprefix(f"{self.inside}.")
        if place == match[1] or place not in self.linears:
            raise ValueError(f"it changes {match[1]}, which is not a linear of this model's layers")
        if type(self.linears[place]) is not nn.Linear:
            kind = type(self.linears[place])
            raise ValueError(
                f"{match[1]} of the model is a {kind.__module__}.{kind.__name__}, not a plain "
                f"linear: unload its adapter first"
            )
        return place, match[2]

    def _scale(self, place: str, down: Tensor, up: Tensor) -> float:
        """The scale of its products; ``ValueError`` for wrong shapes."""
        raw, linear = self.raw, self.linears[place]
        rank = self._of(place, "rank_pattern", raw.get("r", 8))
        wanted = [(rank, linear.in_features), (linear.out_features, rank)]
        for which, tensor, shape in zip("AB", (down, up), wanted, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{place}.lora_{which} has the shape {tuple(tensor.shape)}; by its config and "
                    f"this model's linear it should be {shape}: is its base another model?"
                )
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise ValueError(f"{place}.lora_{which} has values that are not finite")
        alpha = self._of(place, "alpha_pattern", raw.get("lora_alpha", 8))
        return float(alpha / (math.sqrt(rank) if raw.get("use_rslora") else rank))

    def _of(self, place: str, key: str, usual: Any) -> Any:
        """A number of the config for one linear, with peft's rules."""
        name, patterns = f"{self.inside}.{place}", self.raw.get(key) or {}
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                usual = value
                break
        if not isinstance(usual, int | float) or isinstance(usual, bool) or usual <= 0:
            raise ValueError(f"{key.partition('_')[0]} {usual!r:.40} must be a number above 0")
        return usual

    def _check_targets(self, pairs: Mapping[str, Any]) -> None:
        """``ValueError`` if its config names linears for which it has no tensors."""
        targets, raw = self.raw.get("target_modules"), self.raw
        if not isinstance(targets, list) or raw.get("layers_to_transform") is not None:
            return
        excluded = raw.get("exclude_modules") or []
        for place in self.linears.keys() - pairs.keys():
            names = [each for each in targets if place == each or place.endswith(f".{each}")]
            if names and not excluded:
                raise ValueError(f"it lacks the tensor {place}.lora_A")
