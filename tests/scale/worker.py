"""One of several processes, started as ``torchrun`` would, that runs cases one after the other.

``python -m tests.scale.worker CASES``: CASES is a JSON file, a list of ``Case`` fields.  Rank 0
prints one JSON line a case: what differed from one rank (nothing, as a rule), and what was sent.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.loading import quiet_transformers
from pyramidinfer.policies import POLICIES
from pyramidinfer.types import RequestOutput
from tests.engine.build import policy_named
from tests.tiny import random_prompt, tiny_model

LENGTHS = (70, 3, 41)
NEW = 14


@dataclass(frozen=True)
class Case:
    """A tiny model of a family under some policies, on so many ranks."""

    family: str
    tensor: int = 1
    stages: int = field(default=1, kw_only=True)
    policies: list[str] = field(default_factory=lambda: sorted(POLICIES))
    dtype: str = "float64"
    backend: str = "auto"
    changes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.tensor * self.stages


def build(case: Case, folder: Path, **options: Any) -> LLM:
    return LLM(
        folder,
        policy_named("pyramid"),  # its profile is measured on all ranks together
        kv_memory="8MiB",
        page_size=4,
        prefill_chunk=32,
        slot_scores=True,
        dtype=case.dtype,
        backend=case.backend,
        **{**case.options, **options},
    )


def answers(llm: LLM, policies: list[str]) -> dict[str, list[RequestOutput]]:
    """Each policy's, to a ragged batch of prompts, one of them sampled."""
    prompts = [random_prompt(seed, length) for seed, length in enumerate(LENGTHS)]
    params = [SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.0)] * 2
    params.append(SamplingParams(max_tokens=NEW, ignore_eos=True, temperature=0.8, seed=5))
    return {
        name: llm.generate(prompts, params, protect=[(1, 3)], policy=policy_named(name))
        for name in policies
    }


def differences(one: list[RequestOutput], many: list[RequestOutput]) -> list[str]:
    """What of two policies' answers is not the same."""
    found = []
    for index, (mine, theirs) in enumerate(zip(one, many, strict=True)):
        for name in ("token_ids", "finish_reason"):
            if getattr(mine, name) != getattr(theirs, name):
                found.append(f"{index}: {name} {getattr(mine, name)} {getattr(theirs, name)}")
        if mine.kv.kept_len != theirs.kv.kept_len or mine.kv.bytes != theirs.kv.bytes:
            found.append(f"{index}: kv {mine.kv} {theirs.kv}")
        if mine.metrics.computed_share != theirs.metrics.computed_share:
            found.append(f"{index}: computed")
    return found


def run(case: Case, rank: int, place: str) -> None:
    folder = Path(place) / "model"
    if rank == 0:
        model = tiny_model(case.family, getattr(torch, case.dtype), **case.changes)
        model.save_pretrained(folder)
        one = answers(build(case, folder), case.policies)
        (Path(place) / "there").touch()
    while not (Path(place) / "there").exists():
        time.sleep(0.1)
    sizes = {"tensor_parallel_size": case.tensor, "pipeline_parallel_size": case.stages}
    llm = build(case, folder, **sizes)
    found = {
        name: differences(one[name], given) for name, given in answers(llm, case.policies).items()
    }
    llm.engine.check()
    runner = llm.engine.runner
    sent = dict(runner.ranks.sent + runner.stages.sent)
    llm.close()
    print(
        json.dumps({"differences": {k: v for k, v in found.items() if v}, "sent": sent}), flush=True
    )


def main(path: str) -> None:
    quiet_transformers()
    torch.set_num_threads(1)
    rank, cases = int(os.environ["RANK"]), json.loads(Path(path).read_text())
    for number, fields in enumerate(cases):
        case = Case(**fields)
        place = Path(path).parent / str(number)
        place.mkdir(exist_ok=True)
        os.environ["WORLD_SIZE"] = str(case.ranks)
        if rank < case.ranks:
            with suppress(SystemExit):  # of a rank that is not the first, when the model is closed
                run(case, rank, str(place))


if __name__ == "__main__":
    main(sys.argv[1])
