"""Reading and checking a model's ``config.json``, so that it sets sizes and never selects code."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from pyramidinfer.config import DTYPES, nearest
from pyramidinfer.models.families import Family, find_family
from pyramidinfer.models.folder import read_json

__all__ = ["read_config"]

#: Keys that choose an implementation.  The values of transformers (the attention of the model that
#: saved the config) are ignored, because this engine has its own attention; others are hub code.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
OWN = {
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
    "grouped_mm",
    "batched_mm",
    "pyramidinfer",
}
#: Names remote code, which is never run; the families' code in transformers is used.
REMOTE = "auto_map"
#: Keys that choose code or files, or nest another model.
REFUSED = (
    "fusion_config",
    "kernel_config",
    "use_kernels",
    "custom_generate",
    "custom_pipelines",
    "transformers_weights",
    "configuration_files",
    "per_layer_config",
    "text_config",
    "text_encoder",
    "decoder",
    "generator",
)
#: Keys of classification models: no effect here.
LABELS = ("num_labels", "id2label", "label2id")
#: Sizes: whole numbers of at least 1, with the maximum that is accepted.
SIZES = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "ffn_dim": 2**24,
    "word_embed_proj_dim": 2**20,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "vocab_size": 2**26,
    "max_position_embeddings": 2**28,
    "sliding_window": 2**31,
    "original_max_position_embeddings": 2**28,
}
#: Sizes that may be null.
OPTIONAL = {
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "word_embed_proj_dim",
    "original_max_position_embeddings",
}
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")


def read_config(folder: Path) -> Any:
    """The transformers config of a folder, of a supported family; ``ValueError`` with the
    name of a key that cannot be used."""
    file = folder / "config.json"
    raw = read_json(file, "config")
    kind = raw.pop("model_type", None)
    find_family(SimpleNamespace(model_type=kind))
    if kind == "mistral" and raw.get("layer_types"):
        find_family(SimpleNamespace(model_type="ministral"))  # the class that transformers selects
    try:
        _check_code(raw, file)
    except RecursionError:
        raise ValueError(f"{str(file)!r} is not a readable config: it nests too deeply") from None
    _check_sizes(raw, file)
    _check_dtype(raw, file)
    _check_quantization(raw, file)
    plain = {
        key: value
        for key, value in raw.items()
        if key != REMOTE and key not in LABELS and not _chooses_implementation(key)
    }
    plain["_name_or_path"] = str(folder)
    try:
        config = AutoConfig.for_model(kind, **plain)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{str(file)!r} cannot be used: {reason:.300}") from error
    find_family(config)
    _check_sizes({key: getattr(config, key, 1) for key in SIZES}, file)
    _check_parts(config, file)
    _check_effect(raw, config, file)
    return config


def _check_effect(raw: dict[str, Any], config: Any, file: Path) -> None:
    """Refuse keys that contradict the model."""
    theta = (raw.get("rope_parameters") or {}).get("rope_theta")
    if None not in (theta, raw.get("rope_theta")) and theta != raw["rope_theta"]:
        raise ValueError(
            f"{str(file)!r}: rope_theta={raw['rope_theta']!r} has no effect next to "
            f"rope_parameters, which has {theta!r}: leave one of them out"
        )
    if raw.get("sliding_window") and find_family(config).window is Family.window:
        raise ValueError(
            f"{str(file)!r}: sliding_window={raw['sliding_window']!r} has no effect, as models of "
            f"type {config.model_type!r} have no window; leave it out"
        )


def _chooses_implementation(key: str) -> bool:
    return any(name in key for name in IMPLEMENTATIONS)


def _check_code(value: Any, file: Path) -> None:
    """At any depth: no key may choose code."""
    if isinstance(value, list):
        for each in value:
            _check_code(each, file)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        if key in REFUSED and item not in (None, False, {}, []):
            raise ValueError(
                f"{str(file)!r} has {key}={item!r:.80}, which would choose code or files; "
                f"nothing in a model folder may: take the key out"
            )
        if _chooses_implementation(key):
            for name in item.values() if isinstance(item, dict) else [item]:
                if not (name is None or isinstance(name, bool) or name in OWN):
                    raise ValueError(
                        f"{str(file)!r} has {key}={item!r:.80}: code from a hub is never run; take "
                        f"the key out"
                    )
        if key != REMOTE:
            _check_code(item, file)


def _check_sizes(raw: dict[str, Any], file: Path) -> None:
    for key, most in SIZES.items():
        value = raw.get(key, 1)
        if value is None and key in OPTIONAL:
            continue
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(
                f"{str(file)!r} has {key}={value!r:.80}; it must be a whole number between 1 and "
                f"{most}"
            )


def _check_dtype(raw: dict[str, Any], file: Path) -> None:
    for key in ("dtype", "torch_dtype"):
        kind = raw.get(key)
        if kind is not None and str(kind).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"{str(file)!r} has {key}={kind!r:.80}; {nearest(str(kind), DTYPES)}")


def _check_quantization(raw: dict[str, Any], file: Path) -> None:
    """transformers loads unknown methods as if the model were not quantized."""
    given = raw.get("quantization_config")
    if given is None:
        return
    method = str(given.get("quant_method") if isinstance(given, dict) else given)
    known = set(AUTO_QUANTIZATION_CONFIG_MAPPING)
    by_bits = isinstance(given, dict) and (given.get("load_in_4bit") or given.get("load_in_8bit"))
    if method not in known and not by_bits:
        raise ValueError(
            f"{str(file)!r} has quantization_config with quant_method={method!r:.80}; "
            f"{nearest(method, known)}"
        )


def _check_parts(config: Any, file: Path) -> None:
    """Check names of components, because transformers would raise while building the model."""
    for key in ACTIVATIONS:
        name = getattr(config, key, None)
        if name is not None and (not isinstance(name, str) or name not in ACT2FN):
            raise ValueError(f"{str(file)!r} has {key}={name!r:.80}; {nearest(str(name), ACT2FN)}")
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise ValueError(
            f"{str(file)!r} has num_attention_heads={heads}, which num_key_value_heads={groups} "
            f"does not divide"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        name = each.get("rope_type", "default")
        if name != "default" and str(name) not in ROPE_INIT_FUNCTIONS:
            raise ValueError(
                f"{str(file)!r} has rope_type={name!r:.80}; "
                f"{nearest(str(name), ['default', *ROPE_INIT_FUNCTIONS])}"
            )
        for key in ("factor", "rope_theta"):
            number = each.get(key)
            if number is not None and not (
                isinstance(number, int | float) and not isinstance(number, bool) and number > 0
            ):
                raise ValueError(f"{str(file)!r} has {key}={number!r:.80}; it must be above 0")
