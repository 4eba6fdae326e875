"""transformers: ``generate`` (static batch)."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from driver import Answers, Engine, drive
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria


class Stamp(StoppingCriteria):
    """Takes down when the first token was there; stops nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, ids: Any, scores: Any, **rest: Any) -> Any:
        if self.first is None:
            self.first = time.perf_counter()
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def load_model(job: dict[str, Any]) -> Any:
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    model.generation_config.eos_token_id = None
    return model.eval()


def greedy(max_new: int) -> Any:
    return GenerationConfig(
        max_new_tokens=max_new, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )


def run_generate(model: Any, prompts: list[list[int]], max_new: int) -> Answers:
    ids, stamp = torch.tensor(prompts), Stamp()
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy(max_new),
            stopping_criteria=[stamp],
        )
    assert stamp.first is not None
    return Answers(out[:, ids.shape[1] :].tolist(), stamp.first - start)


def load(job: dict[str, Any]) -> Engine:
    model = load_model(job)
    notes = {"weight_bytes": sum(each.nbytes for each in model.parameters())}
    packages = ["transformers", "torch"]
    return Engine(lambda prompts, new: run_generate(model, prompts, new), packages, notes)


if __name__ == "__main__":
    drive(load)
