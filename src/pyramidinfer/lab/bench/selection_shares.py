"""The share of prefill time that token selection takes in methods that score by keys or chunks.

One timed pass (``selection.py``) of one prompt per policy and length; shares refer to the pass
itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pyramidinfer.lab.bench.selection import measure_selection
from pyramidinfer.lab.bench.setting import Rig, Setting
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.catalog import find_model

__all__ = ["measure_shares"]

POLICIES = ("keydiff", "expected_attention", "chunkkv", "snapkv")
LENGTHS = (2000, 4000)


def measure_shares(
    setting: Setting, lengths: tuple[int, ...], out: Path, name: str
) -> list[dict[str, Any]]:
    """Rows of length, policy and the shares, written to ``out`` as they come; ``name``: the
    user's name of the model."""
    rig, rows = Rig(setting), list[dict[str, Any]]()
    configuration = {**setting.configuration(), "model": name, "lengths": list(lengths)}
    for length in lengths:
        rig.check_length(length, 1)
        prompts = rig.prompts(1, length)
        for spec in setting.policies:
            found = measure_selection(rig.engine(spec, 1, length, 1), prompts, 1)
            rows.append({"prompt_len": length, "policy": spec, **found})
            write_result(out, configuration, {"rows": rows})
            print(f"{length} {spec}: {found['prefill_share']:.1%} of prefill", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Shares of prefill that choosing takes.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    setting = Setting(find_model(given.model), None, POLICIES, given.keep, "float32", threads=1)
    measure_shares(setting, LENGTHS, given.json, given.model)


if __name__ == "__main__":
    main()
