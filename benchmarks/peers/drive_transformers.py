"""transformers: ``generate`` (static batch), or its continuous batching."""

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


def continuous(model: Any, job: dict[str, Any]) -> Any:
    """Its cache is set to what the prompts need: left alone it takes 60 % of the memory.

    Prompts packed into one batch are masked from each other, so small batches cost it less.
    """
    from transformers import ContinuousBatchingConfig

    page = 256
    longest = max(len(prompt) for prompt in job["prompts"]) + job["max_new"]
    blocks = len(job["prompts"]) * (-(-longest // page) + 1)
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=blocks,
        max_batch_tokens=job["options"].get("tokens", 512),
        max_requests_per_batch=len(job["prompts"]),
        allow_block_sharing=False,
    )

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        start = time.perf_counter()
        found = model.generate_batch(  # its thread must not be in inference mode
            prompts,
            generation_config=greedy(max_new),
            record_timestamps=True,
            continuous_batching_config=settings,
        )
        done = list(found.values())
        firsts = [each.timestamps[0] for each in done if each.timestamps]
        first = max(firsts) - start if len(firsts) == len(prompts) else None
        return Answers([list(each.generated_tokens) for each in done], first)

    return generate


def load(job: dict[str, Any]) -> Engine:
    model = load_model(job)
    if job["options"].get("mode") == "continuous":
        return Engine(continuous(model, job), ["transformers", "torch"])
    return Engine(lambda prompts, new: run_generate(model, prompts, new), ["transformers", "torch"])


if __name__ == "__main__":
    drive(load)
