"""``pyramidinfer inspect``: a policy's forecast for a model, from its config alone."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from pyramidinfer.attention import select_backend
from pyramidinfer.cli.common import human_bytes, policy_from
from pyramidinfer.config import EngineConfig
from pyramidinfer.models import Adapter
from pyramidinfer.models.loading import empty_model, quiet_transformers, shipped_model

__all__ = ["run_inspect"]


def run_inspect(model: str | None, policy: str, keep: float | None, options: list[str],
                prompt_len: int, max_tokens: int, dtype: str, as_json: bool) -> None:  # fmt: skip
    """Print the forecast per layer: tokens computed, entries kept, bytes."""
    for name, value in (("--prompt-len", prompt_len), ("--max-tokens", max_tokens)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    quiet_transformers()
    chosen = policy_from(policy, keep, options)
    adapter = _adapter_without_weights(model or shipped_model(), dtype)
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
    per_page = {
        layer: spec.page_bytes(page, chosen.uses_scores)
        for spec in adapter.group_specs() for layer in spec.layers
    }  # fmt: skip
    rows = []
    for layer, shape in enumerate(adapter.shapes):
        window = shape.window if shape.window is not None and not layers.governed[layer] else None
        cap = longest if window is None else window + page
        kept, full = min(forecast.kept[layer], cap), min(longest, window or longest)
        rows.append({
            "layer": layer,
            "computed": forecast.reach[layer],
            "kept": kept,
            "bytes": -(-kept // page) * per_page[layer],
            "full_bytes": -(-full // page) * per_page[layer],
        })  # fmt: skip
    if as_json:
        head = {"model": model or shipped_model(), "policy": repr(chosen)}
        print(json.dumps({**head, "prompt_len": prompt_len, "max_tokens": max_tokens,
                          "layers": rows}))  # fmt: skip
        return
    _print(rows, f"{chosen}", prompt_len, max_tokens)


def _adapter_without_weights(model: str, dtype: str) -> Adapter:
    return Adapter(empty_model(model, dtype)[0], select_backend())


def _print(rows: list[dict[str, int]], policy: str, prompt_len: int, max_tokens: int) -> None:
    table = Table(title=f"{policy}\n{prompt_len} prompt + {max_tokens} generated tokens, at most")
    for name in ("layer", "tokens computed", "", "entries kept", "bytes", "of full"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows:
        share = row["computed"] / prompt_len
        table.add_row(
            str(row["layer"]), str(row["computed"]), "█" * round(24 * share), str(row["kept"]),
            human_bytes(row["bytes"]), f"{row['bytes'] / row['full_bytes']:.0%}",
        )  # fmt: skip
    computed = sum(row["computed"] for row in rows) / (len(rows) * prompt_len)
    total, full = sum(row["bytes"] for row in rows), sum(row["full_bytes"] for row in rows)
    table.add_section()
    table.add_row(
        "all", f"{computed:.0%}", "", "", human_bytes(total), f"{total / full:.0%}", style="bold"
    )
    Console().print(table)
    print(f"full cache: {human_bytes(full)}; mean share of the prompt computed: {computed:.3f}")
