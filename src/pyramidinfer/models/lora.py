"""Models with an adapter (LoRA and related kinds, trained and saved by the ``peft`` library)."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from pyramidinfer.models.catalog import check_path, find_model
from pyramidinfer.models.folder import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    check_pointer,
    model_folder,
    one_line,
    read_json,
)

__all__ = ["base_of", "merge_adapter", "unwrap"]

#: Kinds that change only the weights of a model's linears.
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")
WAY_OUT = (
    "put the base model there or correct base_model_name_or_path, or merge the two with peft "
    "(merge_and_unload) and save the whole model"
)
#: Keys of an adapter's config that name code to import, or need to see the prompt's tokens.
REFUSED = ("megatron_config", "alora_invocation_tokens")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a ``PeftModel``, with its adapters; any other model unchanged.

    ``ValueError`` for adapters that change more than linears (such as prompt tuning).
    """
    if not any(each.__module__.startswith("peft.") for each in type(model).__mro__):
        return model
    for name, config in getattr(model, "peft_config", {}).items():
        _check_kind(f"adapter {name!r}", _plain(config))
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


def base_of(folder: Path, name: str) -> str:
    """The base model that an adapter's folder names: an existing path, or a hub id.

    ``ValueError`` with a remedy if it names none, the base is missing, or this kind of adapter
    cannot be merged.
    """
    raw = read_json(folder / ADAPTER, "adapter config")
    _check_kind(f"adapter {name!r}", raw)
    base = raw.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"adapter {name!r} names no base model ({ADAPTER}); {WAY_OUT}")
    if importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"{name!r} is an adapter for {base!r}; loading it needs the peft library: "
            f"pip install 'pyramidinfer[peft]'"
        )
    try:
        below = model_folder(check_path(find_model(base)))
    except ValueError as error:
        raise ValueError(
            f"adapter {name!r} is for the base model {base!r}: {one_line(error)}; {WAY_OUT}"
        ) from None
    if (below / ADAPTER).is_file():
        raise ValueError(f"adapter {name!r} is for {base!r}, an adapter too; {WAY_OUT}")
    return base


def merge_adapter(model: Any, folder: Path, name: str) -> Any:
    """The base model with a folder's adapter merged into its weights, every tensor of it used."""
    from peft import PeftConfig, PeftModel

    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ValueError(f"adapter {name!r} has no {ADAPTER_WEIGHTS}; other formats are not loaded")
    check_pointer(weights)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # their subject is checked below
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            wrapped = PeftModel(model, config)
            report = wrapped.load_adapter(str(folder), "default", torch_device="cpu")
            _check_tied(model, wrapped, name)
            merged = wrapped.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ValueError(f"cannot merge adapter {name!r}: {one_line(error)}") from error
    odd = sorted({*report.missing_keys, *report.unexpected_keys})
    if odd:
        what = "lacks the tensor" if odd[0] in report.missing_keys else "has no place for"
        more = f" (and {len(odd) - 1} more)" if odd[1:] else ""
        raise ValueError(f"cannot merge adapter {name!r}: it {what} {odd[0]}{more}")
    return merged


def _check_tied(model: Any, wrapped: Any, name: str) -> None:
    """Merging into the head would also change the embeddings if they are one tensor."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    changed = any(hasattr(each, "base_layer") for each in (head, embeddings))
    weights = [getattr(each, "base_layer", each).weight for each in (head, embeddings)]
    if changed and weights[0] is weights[1]:
        raise ValueError("it changes the head or the embeddings, which are one tensor in the base")


def _plain(config: Any) -> dict[str, Any]:
    """A peft config as it is in the file."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    plain["peft_type"] = getattr(config.peft_type, "value", config.peft_type)
    plain["task_type"] = getattr(config.task_type, "value", config.task_type)
    return plain


def _check_kind(what: str, raw: dict[str, Any]) -> None:
    kind, task = raw.get("peft_type"), raw.get("task_type")
    if kind not in KINDS:
        raise ValueError(f"{what} is of the kind {kind!r:.80}; supported are: {', '.join(KINDS)}")
    if task not in (None, "CAUSAL_LM"):
        raise ValueError(f"{what} is for the task {task!r:.80}, not for generating text")
    for key in REFUSED:
        if raw.get(key):
            raise ValueError(f"{what} has {key}={raw[key]!r:.80}, which is not supported")
