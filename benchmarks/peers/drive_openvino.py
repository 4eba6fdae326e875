"""OpenVINO GenAI's continuous batching: weights of 16, 8 and 4 bits, with or without eviction."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from driver import Answers, Engine, drive

#: What is passed to the export; a group of 64 divides the widths of small models, as the default
#: of 128 does not.
FORMATS = {
    "fp16": ["--weight-format", "fp16"],
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--group-size", "64", "--ratio", "1.0"],
}


def export(job: dict[str, Any]) -> Path:
    """The model as OpenVINO stores it, made once."""
    format = FORMATS[job["options"]["weights"]]
    target = Path(job["work"]) / f"openvino-{job['options']['weights']}"
    if not target.is_dir():
        half = target.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        tool = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "text-generation-with-past"]
        subprocess.run(
            [str(tool), "export", "openvino", "-m", job["model"], *task, *format, str(half)],
            check=True,
            stdout=sys.stderr,
        )
        half.rename(target)
    return target


def load(job: dict[str, Any]) -> Engine:
    folder = export(job)
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
    pipe = genai.ContinuousBatchingPipeline(
        str(folder),
        scheduler,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": kind,
            "KV_CACHE_PRECISION": options["cache"],
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

    size = (folder / "openvino_model.bin").stat().st_size
    notes = {"weight_bytes": size, "export": " ".join(FORMATS[options["weights"]])}
    return Engine(generate, ["openvino", "openvino-genai"], notes)


if __name__ == "__main__":
    drive(load, export)
