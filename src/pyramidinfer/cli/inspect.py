"""``pyramidinfer inspect``: a policy's forecast for a model, from its config and head profile."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from pyramidinfer.attention import select_backend
from pyramidinfer.cache import Pool
from pyramidinfer.cli.common import human_bytes
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import LLM
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.profiling import ensure_profile, find_profile
from pyramidinfer.engine.readings import readings
from pyramidinfer.engine.text import encoder_of
from pyramidinfer.models import Adapter
from pyramidinfer.models.catalog import find_model
from pyramidinfer.models.loading import (
    empty_model,
    find_tokenizer,
    quiet_transformers,
    shipped_model,
)
from pyramidinfer.policies import Full, Policy
from pyramidinfer.policies.profile import Profile

__all__ = ["run_inspect"]


def run_inspect(model: str | None, chosen: Policy, prompt_len: int, max_tokens: int, dtype: str,
                as_json: bool) -> None:  # fmt: skip
    """Print the forecast per layer: tokens computed, entries kept, bytes."""
    for name, value in (("--prompt-len", prompt_len), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    quiet_transformers()
    adapter = _adapter_without_weights(model or shipped_model(), dtype)
    if chosen.wants_profile:  # which is known by the weights
        chosen = chosen.with_profile(_profile(model or shipped_model(), dtype))
    if chosen.wants_tokenizer:
        tokenizer = find_tokenizer(find_model(model or shipped_model()), "auto")
        chosen = chosen.with_tokenizer(encoder_of(tokenizer))
    longest = prompt_len + max_tokens
    if longest > adapter.max_positions:
        raise ValueError(
            f"{prompt_len} prompt tokens and {max_tokens} generated ones exceed the model's "
            f"{adapter.max_positions} positions"
        )
    layers = adapter.layers_for(longest)
    chosen.check(layers)
    forecast = chosen.forecast(prompt_len, max_tokens, layers)
    page = EngineConfig().page_size
    specs = adapter.group_specs()
    least = Pool.least_bytes(specs, page, chosen.uses_scores)
    pool = Pool(specs, least, page, scores=chosen.uses_scores)
    per_page = [int(size) for size in pool.layer_page_bytes]
    cost = Ledger(pool, adapter).cost(chosen, prompt_len, max_tokens, layers, 0)
    again = sum(map(len, readings(adapter, chosen, range(prompt_len), prompt_len, max_tokens)))
    assert cost.settled is not None
    in_pages = int((cost.settled.pages * np.array(pool.page_bytes)).sum())
    beside = cost.settled.bytes - in_pages
    rows: list[dict[str, Any]] = []
    heads = forecast.by_head(adapter.kv_heads)
    for layer, shape in enumerate(adapter.shapes):
        window = shape.window if shape.window is not None and not layers.governed[layer] else None
        cap = longest if window is None else window + page
        kept, full = np.minimum(heads[layer], cap), min(longest, window or longest)
        rows.append({
            "layer": layer,
            "computed": forecast.reach[layer],
            "kept": kept.tolist(),
            "bytes": int(pool.pages_for(kept).sum()) * per_page[layer],
            "full_bytes": pool.pages_for(full) * adapter.kv_heads * per_page[layer],
        })  # fmt: skip
    if as_json:
        head = {"model": model or shipped_model(), "policy": repr(chosen), "rule": chosen.rule}
        print(json.dumps({**head, "prompt_len": prompt_len, "max_tokens": max_tokens,
                          "layers": rows, "tokens_read_again": again, "bytes": in_pages,
                          "ring_and_state_bytes": beside,
                          "admission_bytes": cost.bytes}))  # fmt: skip
        return
    after = chosen.forecast(prompt_len, 0, layers)
    entries = after.by_head(adapter.kv_heads).sum() if after.sum is None else after.sum
    kept = entries / (prompt_len * adapter.depth * adapter.kv_heads)
    _print(rows, chosen, prompt_len, max_tokens, again, in_pages, beside, cost.bytes, kept)


def _adapter_without_weights(model: str, dtype: str) -> Adapter:
    return Adapter(empty_model(model, dtype)[0], select_backend("reference"))  # builds nothing


def _profile(model: str, dtype: str) -> Profile:
    """The model's profile; kernels are built only where it has to be measured."""
    found = find_profile(LLM(model, Full(), dtype=dtype, backend="reference"))
    return found or ensure_profile(LLM(model, Full(), dtype=dtype))


def _of_heads(kept: list[int]) -> str:
    """One number where all heads keep as many, else each head's, or of many the extremes."""
    if len(set(kept)) == 1:
        return str(kept[0])
    if len(kept) <= 4:
        return " ".join(map(str, kept))
    return f"{min(kept)} to {max(kept)}, mean {sum(kept) / len(kept):.0f}"


def _print(rows: list[dict[str, Any]], policy: Policy, prompt_len: int, max_tokens: int, again: int,
           total: int, beside: int, admission: int, after: float) -> None:  # fmt: skip
    console = Console()
    set_here = ", ".join(
        f"{each.name}={getattr(policy, each.name)!r}"
        for each in fields(policy) if getattr(policy, each.name) != each.default
    )  # fmt: skip
    console.print(f"{policy.name}({set_here}): {prompt_len} prompt + {max_tokens} generated tokens")
    if policy.rule:
        print(policy.rule)
    table = Table()
    for name in ("layer", "computed", "", "kept at most", "bytes", "of full"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    for row in rows:
        share = row["computed"] / prompt_len
        table.add_row(
            str(row["layer"]), str(row["computed"]), "█" * round(20 * share),
            _of_heads(row["kept"]), human_bytes(row["bytes"]),
            f"{row['bytes'] / row['full_bytes']:.0%}",
        )  # fmt: skip
    computed = sum(row["computed"] + again for row in rows) / (len(rows) * prompt_len)
    full = sum(row["full_bytes"] for row in rows)
    table.add_section()
    table.add_row(
        "all", f"{computed:.0%}", "", "", human_bytes(total), f"{total / full:.0%}", style="bold"
    )
    console.print(table)
    print(f"mean share of the prompt computed: {computed:.3f}, kept after it: {after:.3f}")
    if again:
        print(f"{again} of these tokens are read behind the prompt, while all of it is held")
    keep = getattr(policy, "keep", None)
    if keep is not None and after > keep + 0.005 + 1 / prompt_len:
        print(f"keep={keep} cannot be reached at this prompt length; the lowest is {after:.3f}")
    print(f"full cache: {human_bytes(full)}; beside the pages, query rings and state: "
          f"{human_bytes(beside)}; reserved at admission, prompt in progress included: "
          f"{human_bytes(admission)}")  # fmt: skip
