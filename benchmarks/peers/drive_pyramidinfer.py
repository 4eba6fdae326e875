"""This engine, in a process of its own like every other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from driver import Answers, Engine, drive

from pyramidinfer import LLM, SamplingParams


def of_file(job: dict[str, Any], kind: str) -> str:
    """The model's folder with a GGUF file that llama.cpp quantized."""
    file = Path(job["work"]) / f"model-{kind}.gguf"
    if not file.is_file():
        raise RuntimeError(f"llama.cpp has not quantized the model to {kind}; run `make peers`")
    folder = Path(job["work"]) / f"gguf-{kind}"
    folder.mkdir(exist_ok=True)
    for each in [*Path(job["model"]).glob("*.*"), file]:
        link = folder / ("model.gguf" if each == file else each.name)
        if not link.exists():
            link.symlink_to(each.resolve())
    return str(folder)


def load(job: dict[str, Any]) -> Engine:
    torch.set_num_threads(job["threads"])
    options = dict(job["options"])
    folder = job["model"] if "gguf" not in options else of_file(job, options.pop("gguf"))
    llm = LLM(folder, dtype=job["dtype"], device="cpu", tokenizer=None, **options)
    notes: dict[str, Any] = {
        "policy": repr(llm.policy),
        "weight_bytes": llm.engine.runner.weight_bytes,
    }

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        outs = llm.generate(prompts, SamplingParams(max_tokens=max_new, ignore_eos=True))
        firsts = [out.metrics.first_token_seconds or 0.0 for out in outs]
        kept = sum(out.kv.bytes for out in outs) / sum(out.kv.full_bytes for out in outs)
        computed = sum(out.metrics.computed_share for out in outs) / len(outs)
        at_once = llm.engine.peak_in_flight
        notes.update(kv_share_end=kept, computed_share=computed, in_flight=at_once)
        return Answers([out.token_ids for out in outs], max(firsts))

    first = job["prompts"][:1]  # the cache of a request that generates one token is its prompt's
    generate(first, 1)
    notes["kv_share_prefill"] = notes["kv_share_end"]
    return Engine(generate, ["pyramidinfer", "torch", "transformers"], notes)


if __name__ == "__main__":
    drive(load)
