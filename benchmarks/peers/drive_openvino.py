"""OpenVINO GenAI's continuous batching, with or without cache eviction."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from driver import Answers, Engine, drive


def export(model: str, work: str) -> tuple[Path, float]:
    """The model as OpenVINO stores it (float16), made once; and the seconds it took."""
    target = Path(work) / "openvino"
    start = time.perf_counter()
    if not (target / "openvino_model.bin").is_file():
        tool = Path(sys.executable).with_name("optimum-cli")
        subprocess.run(
            [
                str(tool),
                "export",
                "openvino",
                "-m",
                model,
                "--task",
                "text-generation-with-past",
                "--weight-format",
                "fp16",
                str(target),
            ],
            check=True,
            stdout=sys.stderr,
        )
    return target, time.perf_counter() - start


def load(job: dict[str, Any]) -> Engine:
    folder, seconds = export(job["model"], job["work"])
    options, kind = job["options"], {"bfloat16": "bf16", "float32": "f32"}[job["dtype"]]
    longest = max(len(prompt) for prompt in job["prompts"]) + job["max_new"]
    blocks = len(job["prompts"]) * (-(-longest // 32) + 2)
    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_batched_tokens = options.get("tokens", 8192)
    scheduler.max_num_seqs = len(job["prompts"])
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    if "entries" in options:
        scheduler.use_cache_eviction = True
        scheduler.cache_eviction_config = genai.CacheEvictionConfig(
            32, 64, options["entries"], genai.AggregationMode.NORM_SUM
        )
    cache = options.get("cache", kind)
    pipe = genai.ContinuousBatchingPipeline(
        str(folder),
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": cache,
            "INFERENCE_NUM_THREADS": job["threads"],
        },
    )

    def generate(prompts: list[list[int]], max_new: int) -> Answers:
        config = genai.GenerationConfig(max_new_tokens=max_new, do_sample=False, ignore_eos=True)
        start = time.perf_counter()
        handles = [
            pipe.add_request(index, ov.Tensor(np.array([prompt], dtype=np.int64)), config)
            for index, prompt in enumerate(prompts)
        ]
        tokens: list[list[int]] = [[] for _ in prompts]
        first = None
        while pipe.has_non_finished_requests():
            pipe.step()
            for mine, handle in zip(tokens, handles, strict=True):
                while handle.can_read():
                    (found,) = handle.read().values()
                    mine += list(found.generated_ids)
            if first is None and all(tokens):
                first = time.perf_counter() - start
        for mine, handle in zip(tokens, handles, strict=True):
            while handle.can_read():
                (found,) = handle.read().values()
                mine += list(found.generated_ids)
        return Answers(tokens, first)

    notes = {"export_seconds": seconds, "kv_cache_precision": cache, **options}
    return Engine(generate, ["openvino", "openvino-genai"], notes)


if __name__ == "__main__":
    drive(load)
