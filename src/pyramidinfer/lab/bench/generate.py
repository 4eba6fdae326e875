"""transformers' ``generate``, timed in the same way as our passes."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import GenerationConfig

from pyramidinfer.lab.bench.timing import spread, synchronize
from pyramidinfer.types import TokenIds

__all__ = ["CACHES", "bytes_per_request", "time_generate"]

#: Its caches by the name of a row: the option of ``generate``, and whether it compiles the model
#: (the default is to compile with a static cache on a GPU).
CACHES: dict[str, tuple[str | None, bool]] = {
    "transformers, dynamic": (None, False),
    "transformers, static": ("static", False),
    "transformers, static, compiled": ("static", True),
}


def _settings(engine: str, new: int) -> Any:
    cache, compiles = CACHES[engine]
    return GenerationConfig(
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_cache=True,
        cache_implementation=cache,
        disable_compile=not compiles,
    )


@torch.inference_mode()
def time_generate(
    model: Any, engine: str, prompts: list[TokenIds], new: int, repeats: int
) -> dict[str, Any]:
    """Seconds of a whole pass and of one token only (the prefill), greedy, after a warm-up.

    The warm-up of a compiled model is a whole pass, because every size is compiled separately.
    """
    ids = torch.tensor(prompts, device=model.device)
    model.generation_config.eos_token_id = None

    def run(count: int) -> float:
        synchronize(ids.device)
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=_settings(engine, count)
        )
        synchronize(ids.device)
        seconds = time.perf_counter() - start
        assert out.shape[1] == ids.shape[1] + count, "generate stopped early"
        return seconds

    for count in (1, new) if CACHES[engine][1] else (min(new, 4),):
        run(count)
    prefill = spread([run(1) for _ in range(repeats)])
    seconds = [run(new) for _ in range(repeats)]
    step = (sum(seconds) / repeats - prefill["median"]) / max(1, new - 1)
    made = len(prompts) * new
    return {
        "seconds": spread(seconds),
        "prefill_seconds": prefill,
        "step_seconds": spread([step]),
        "output_tokens": made,
        "output_tokens_per_second": spread([made / each for each in seconds]),
    }


def bytes_per_request(config: Any, itemsize: int, prompt_len: int, new: int) -> int:
    """Maximum bytes of a request: a full cache, and either its prompt's states in a layer or a copy
    of one layer's cache (a dynamic cache is concatenated in every step)."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer = 2 * config.num_key_value_heads * size * itemsize
    states = (4 * config.hidden_size + 3 * config.intermediate_size) * itemsize
    transient = max(prompt_len * states, (prompt_len + new) * layer)
    head = config.vocab_size * (itemsize + 4)
    return int((prompt_len + new) * layer * config.num_hidden_layers + transient + head)
