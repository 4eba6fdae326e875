"""Checks that every tensor of a checkpoint has a place in the model, and vice versa."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pyramidinfer.models.folder import FLOATS

__all__ = ["check_report", "check_tensors"]

#: Buffers that older versions of transformers saved and that are recomputed: rotary frequencies,
#: position ids, and causal masks (GPT-NeoX) with their fill value.
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attention\.bias|masked_bias)$")
#: Ends of tensors' names → the missing key of a config that has no place for them.
HINTS = {
    "bias": "a config with biases says so (attention_bias, mlp_bias)",
    "scale": "quantized weights need their quantization_config",
    "scale_inv": "quantized weights need their quantization_config",
    "zero_point": "quantized weights need their quantization_config",
    "qweight": "quantized weights need their quantization_config",
}


def check_tensors(name: str, config: Any, headers: dict[str, tuple[str, int]]) -> None:
    """``ValueError`` with the name of a tensor that is not plain floats, if weights are not
    quantized.

    headers : tensor → (safetensors' name of its dtype, number of elements).
    """
    if getattr(config, "quantization_config", None) is not None:
        return
    odd = {tensor: kind for tensor, (kind, _) in headers.items() if kind not in FLOATS}
    first, more = _first(odd)
    if first:
        raise ValueError(
            f"model {name!r} has {first} in {odd[first]}{more}, which is no plain floating-point "
            f"type, and its config has no quantization_config that says what the numbers mean"
        )


def check_report(name: str, report: dict[str, Any]) -> None:
    """``ValueError`` if transformers left tensors at random values, or dropped some.

    report : its loading info.
    """
    missing, more = _first(report.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"model {name!r} lacks the tensor {missing}{more}; its files are not complete"
        )
    shapes = {key: (found, wanted) for key, found, wanted in report.get("mismatched_keys") or ()}
    odd, more = _first(shapes)
    if odd:
        found, wanted = (list(each) for each in shapes[odd])
        raise ValueError(
            f"model {name!r} has a wrong shape for {odd}: {found}, expected {wanted}{more}; its "
            f"files are not complete"
        )
    extra, more = _first(report.get("unexpected_keys") or ())
    if extra:
        hint = next(
            (hint for end, hint in HINTS.items() if extra.endswith(end)),
            "the config and the weights belong to different models",
        )
        raise ValueError(
            f"model {name!r} has the tensor {extra}{more}, for which its config has no place: "
            f"{hint}"
        )


def _first(names: Iterable[str]) -> tuple[str, str]:
    """The first relevant name and the number of further ones; empty if there is none."""
    found = sorted(each for each in names if not HARMLESS.search(each))
    return (found[0] if found else ""), (f" (and {len(found) - 1} more)" if found[1:] else "")
