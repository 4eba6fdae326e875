"""Memory that runs short under requests in flight: nobody's tokens change on a real model."""

from __future__ import annotations

import pytest

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.engine.request import Request
from tests_real.conftest import real_prompts

COUNT, MOST, NEW = 5, 120, 64


def answers(llm: LLM, prompts: list[list[int]]) -> list[Request]:
    params = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    requests = [llm.engine.add(prompt, params) for prompt in prompts]
    while not llm.engine.scheduler.idle:
        llm.engine.step()
    llm.engine.check()
    return requests


@pytest.mark.parametrize("policy", ["full", "snapkv"])
@pytest.mark.parametrize("admission", ["overcommit", "reserve"])
def test_tokens_do_not_depend_on_memory(policy: str, admission: str) -> None:
    """Swapped out and in again, or made to wait, an answer is the one it is alone."""
    alone = LLM(
        "smollm2",
        policy,
        keep=None if policy == "full" else 0.5,
        dtype="float32",
        kv_memory="256MiB",
    )
    prompts = real_prompts(alone.tokenizer, COUNT, 60, MOST)
    wanted = [answers(alone, [prompt])[0] for prompt in prompts]
    full = 4 * 2 * 30 * 3 * 64  # bytes of a token
    room = int(3 * max(map(len, prompts)) * full)
    options = {"expected_output": 0.1} if admission == "overcommit" else {}
    tight = LLM(
        "smollm2", alone.policy, dtype="float32", kv_memory=room, admission=admission, **options
    )
    found = answers(tight, prompts)
    assert [each.output for each in found] == [each.output for each in wanted]
    swapped = tight.engine.scheduler.counts.swapped
    assert (swapped > 0) == (admission == "overcommit"), "nobody was preempted"
    assert tight.engine.peak_in_flight > 1
    assert tight.engine.peak_bytes <= room
