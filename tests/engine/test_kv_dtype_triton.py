"""Engines whose keys and values a codec stores, on Triton's kernels: the reference's tokens."""

from __future__ import annotations

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.codec import CODECS
from tests.engine.build import build
from tests.tiny import random_prompt

pytest.importorskip("triton")

from pyramidinfer.attention import triton_kernels
from pyramidinfer.cache.triton_compact import TritonMover

if not (torch.cuda.is_available() or triton_kernels.INTERPRETED):
    pytest.skip("no GPU, and TRITON_INTERPRET=1 is not set", allow_module_level=True)


def answers(llm: LLM) -> list[list[int]]:
    """Of three requests that end at different times, of prompts in chunks and beside decoding."""
    lengths, new = (5, 17, 40), (9, 4, 6)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in new]
    prompts = [random_prompt(seed, length) for seed, length in enumerate(lengths)]
    return [each.token_ids for each in llm.generate(prompts, params)]


@pytest.mark.parametrize("kv_dtype", CODECS)
@pytest.mark.parametrize("policy", ["full", "h2o", "pyramid"])
def test_tokens_are_the_references(policy: str, kv_dtype: str) -> None:
    """Written, attended to, evicted from and read back by kernels; what is freed is NaN."""
    made = {
        backend: build(policy, dtype=torch.float32, kv_dtype=kv_dtype, backend=backend)
        for backend in ("triton", "reference")
    }
    pool = made["triton"].engine.pool
    pool.mover = TritonMover()  # which an interpreted engine does without, being slow enough
    assert answers(made["triton"]) == answers(made["reference"])
    assert pool.groups[0].keys.dtype == torch.uint8
    pool.check()
