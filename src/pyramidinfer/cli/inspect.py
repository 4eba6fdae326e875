"""``pyramidinfer inspect``: a policy's forecast for a model, from its config and head profile."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from pyramidinfer.cache import Layout
from pyramidinfer.cli.choices import InspectOptions
from pyramidinfer.cli.common import human_bytes
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import LLM, Engine
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.profiling import ensure_profile, find_profile
from pyramidinfer.engine.readings import readings
from pyramidinfer.engine.text import encoder_of
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.catalog import check_path, find_model
from pyramidinfer.models.device import choose_device
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.models.folder import model_folder
from pyramidinfer.models.gguf_weights import coded_model
from pyramidinfer.models.loading import (
    empty_model,
    find_tokenizer,
    quiet_transformers,
    shipped_model,
)
from pyramidinfer.models.weights import stored_bytes
from pyramidinfer.policies import Full, Policy
from pyramidinfer.policies.base import Facts, Forecast
from pyramidinfer.policies.profile import Profile
from pyramidinfer.types import Layers

__all__ = ["run_inspect"]


def run_inspect(
    model: str | None,
    chosen: Policy,
    dtype: str,
    engine: EngineConfig,
    asked: InspectOptions,
) -> None:
    """Print the forecast per layer: tokens computed, entries kept, bytes.

    Bytes of the full cache count 16 bits per number if ``kv_dtype`` has fewer.
    """
    prompt_len, max_tokens = asked.prompt_len, asked.max_tokens
    kv_dtype, weights = engine.kv_dtype, engine.weights
    quiet_transformers()
    path = model or shipped_model()
    runner, weight_bytes = _without_weights(path, dtype, weights)
    specs = runner.group_specs(kv_dtype)  # refuses an invalid value at once
    if isinstance(getattr(chosen, "profile", None), Profile):
        chosen.check(runner.layers_for(1))  # before weights are read
    chosen = _bound(chosen, path, dtype)
    longest = prompt_len + max_tokens
    if longest > runner.max_positions:
        raise ValueError(
            f"{prompt_len} prompt tokens and {max_tokens} generated ones exceed the model's "
            f"{runner.max_positions} positions"
        )
    layers = runner.layers_for(longest)
    chosen.check(layers)
    layout = Layout.smallest(specs, engine.page_size, chosen.uses_scores)
    cost = Ledger(layout, runner).cost(chosen, prompt_len, max_tokens, layers, 0)
    again = sum(map(len, readings(runner, chosen, range(prompt_len), prompt_len, max_tokens)))
    assert cost.after_prefill is not None
    in_pages = layout.bytes_of(cost.after_prefill.pages)
    overhead = cost.after_prefill.bytes - in_pages
    caps = [  # sliding-window layers hold at most this, under any policy
        longest if shape.window is None or governed else shape.window + engine.page_size
        for shape, governed in zip(runner.shapes, layers.governed, strict=True)
    ]
    forecast = chosen.forecast(prompt_len, max_tokens, layers)
    rows = _rows(forecast, layout, [min(longest, cap) for cap in caps], caps, runner.kv_heads)
    if asked.as_json:
        found = {
            "model": path,
            "policy": repr(chosen),
            "rule": chosen.rule,
            "prompt_len": prompt_len,
            "max_tokens": max_tokens,
            "kv_dtype": kv_dtype,
            "weights": weights,
            "weight_bytes": weight_bytes,
            "layers": rows,
            "tokens_read_again": again,
            "bytes": in_pages,
            "ring_and_state_bytes": overhead,
            "admission_bytes": cost.bytes,
        }
        print(json.dumps(found))
        return
    after = _After.of(chosen, prompt_len, layers, runner.kv_heads, caps)
    told = "" if weights == "auto" else f", stored in {weights}"
    size = f"weights{told}: {human_bytes(weight_bytes)}"
    _print(
        rows,
        chosen,
        prompt_len,
        max_tokens,
        kv_dtype,
        again,
        in_pages,
        overhead,
        cost.bytes,
        after,
        size,
    )


def _without_weights(path: str, dtype: str, weights: str) -> tuple[ModelRunner, int]:
    """A runner over a model without weights, and the bytes that its weights would take."""
    empty, place = empty_model(path, dtype)
    runner = ModelRunner(empty, "reference")  # builds nothing
    if weights != "auto":
        runner.check_weights(weights, choose_device("auto", place, runner.dtype, weights))
    if weights == "gguf":
        folder = Path(check_path(find_model(path)))
        empty = coded_model(folder, empty.config, runner.dtype)
    return runner, stored_bytes(empty, weights)


def _bound(policy: Policy, path: str, dtype: str) -> Policy:
    return policy.bind(
        Facts(
            lambda: _profile(path, dtype),
            lambda given: given.check_model(fingerprint(_reference(path, dtype).runner)),
            lambda: encoder_of(find_tokenizer(model_folder(find_model(path)), "auto")),
        )
    )


def _rows(
    forecast: Forecast, layout: Layout, full: list[int], caps: list[int], kv_heads: int
) -> list[dict[str, Any]]:
    """One row per layer;  full : entries of the full cache in each head."""
    rows = []
    for layer, heads in enumerate(forecast.by_head(kv_heads)):
        kept = np.minimum(heads, caps[layer])
        together, pages = int(kept.sum()), int(layout.pages_for(kept).sum())
        if forecast.total is not None:  # each head may have one partly filled page
            together = min(together, forecast.total[layer])
            pages = min(pages, forecast.total[layer] // layout.page_size + kv_heads)
        whole = layout.pages_for(full[layer]) * kv_heads
        rows.append(
            {
                "layer": layer,
                "computed": forecast.reach[layer],
                "kept": kept.tolist(),
                "kept_together": together,
                "bytes": pages * int(layout.layer_page_bytes[layer]),
                "full_bytes": whole * int(layout.uncoded_page_bytes[layer]),
            }
        )
    return rows


class _After(NamedTuple):
    """Entries kept after prefill.

    share : of the full cache's entries;  governed : of the entries of layers without a sliding
    window;  budget : mean over the layers that ``keep`` applies to;  sliding : number of layers
    with a sliding window.
    """

    share: float
    governed: float
    budget: float
    sliding: int

    @classmethod
    def of(
        cls, policy: Policy, prompt_len: int, layers: Layers, kv_heads: int, caps: list[int]
    ) -> _After:
        forecast = policy.forecast(prompt_len, 0, layers)
        held = forecast.by_head(kv_heads).mean(1)
        if forecast.total is not None:  # entries of all heads of a layer
            held = np.minimum(held, np.array(forecast.total) / kv_heads)
        if forecast.sum is not None:  # entries of all governed layers
            rule = np.array(layers.governed)
            held[rule] = (forecast.sum / kv_heads - held[~rule].sum()) / rule.sum()
        full = np.minimum(caps, prompt_len)
        governed = held[list(layers.governed)].mean() / prompt_len
        share = np.minimum(held, full).sum() / full.sum()
        budget = min(governed, held.mean() / prompt_len)
        return cls(share, governed, budget, layers.governed.count(False))


def _profile(model: str, dtype: str) -> Profile:
    """The model's profile; kernels are built only if it must be measured."""
    found = find_profile(_reference(model, dtype).shared)
    return found or ensure_profile(LLM(model, Full(), dtype=dtype).engine.shared)


def _reference(model: str, dtype: str) -> Engine:
    return LLM(model, Full(), dtype=dtype, backend="reference").engine


def _of_heads(kept: list[int], together: int) -> str:
    """One number if all heads keep the same, else the number of each head, or the range of many;
    if the heads share the ``together`` entries, the maximum and the mean."""
    if together < sum(kept):
        return f"{max(kept)}, mean {together / len(kept):.0f}"
    if len(set(kept)) == 1:
        return str(kept[0])
    if len(kept) <= 4:
        return " ".join(map(str, kept))
    return f"{min(kept)} to {max(kept)}, mean {sum(kept) / len(kept):.0f}"


def _why_more(policy: Policy, keep: float, prompt_len: int, share: float) -> str:
    """The reason that more than ``keep`` is kept."""
    least = getattr(policy, "min_context", 0)
    if hasattr(policy, "profile") and prompt_len < least:  # heads have their own limits
        return (
            f"keep={keep} is not reached at this prompt length: texts below min_context="
            f"{least} tokens keep as many entries as {least} tokens would, here {share:.3f}"
        )
    why = f" (min_context={least}: shorter texts are compressed less)" if prompt_len < least else ""
    return f"keep={keep} cannot be reached at this prompt length{why}; the lowest is {share:.3f}"


def _print(
    rows: list[dict[str, Any]],
    policy: Policy,
    prompt_len: int,
    max_tokens: int,
    kv_dtype: str,
    again: int,
    total: int,
    overhead: int,
    admission: int,
    after: _After,
    weights: str,
) -> None:
    console = Console()
    set_here = ", ".join(
        f"{each.name}={getattr(policy, each.name)!r}"
        for each in fields(policy)
        if getattr(policy, each.name) != each.default
    )
    stored, bits = ("", "") if kv_dtype == "auto" else (f", stored in {kv_dtype}", " in 16 bits")
    told = f"{prompt_len} prompt + {max_tokens} generated tokens{stored}"
    console.print(f"{policy.name}({set_here}): {told}")
    if policy.rule:
        print(policy.rule)
    table = Table()
    for name in ("layer", "computed", "", "kept at most", "bytes", "of full"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        share = row["computed"] / prompt_len
        table.add_row(
            str(row["layer"]),
            str(row["computed"]),
            "█" * round(20 * share),
            _of_heads(row["kept"], row["kept_together"]),
            human_bytes(row["bytes"]),
            f"{row['bytes'] / row['full_bytes']:.0%}",
        )
    computed = sum(row["computed"] + again for row in rows) / (len(rows) * prompt_len)
    full = sum(row["full_bytes"] for row in rows)
    table.add_section()
    table.add_row(
        "all", f"{computed:.0%}", "", "", human_bytes(total), f"{total / full:.0%}", style="bold"
    )
    console.print(table)
    print(
        f"mean share of the prompt computed: {computed:.3f}, of a full cache's entries kept "
        f"after it: {after.share:.3f}"
    )
    if after.sliding:
        print(
            f"{after.sliding} of {len(rows)} layers hold at most their sliding window; "
            f"of the entries of the other layers, {after.governed:.3f} are kept"
        )
    if again:
        print(
            f"{again} of these tokens are read after the prompt, while all of its entries are held"
        )
    keep = getattr(policy, "keep", None)
    if keep is not None and after.budget > keep + 0.005 + 1 / prompt_len:
        print(_why_more(policy, keep, prompt_len, after.budget))
    print(weights)
    print(
        f"full cache{bits}: {human_bytes(full)}; in addition to the pages, query rings and state: "
        f"{human_bytes(overhead)}; reserved at admission, including the prompt in progress: "
        f"{human_bytes(admission)}"
    )
