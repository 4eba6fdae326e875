"""Parts that all benches of the engine share: the model, the policies, the prompts, one pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyramidinfer.cache import Layout
from pyramidinfer.config import EngineConfig, parse_device
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.memory import Ledger
from pyramidinfer.engine.request import Request
from pyramidinfer.lab.bench.plans import DEFAULT_SHAPE, Setting
from pyramidinfer.lab.shapes import empty_shape, make_model
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.device import choose_device
from pyramidinfer.models.loading import empty_model, load_model
from pyramidinfer.policies import Policy
from pyramidinfer.policies.base import asks_for_profile
from pyramidinfer.types import SamplingParams, TokenIds

__all__ = ["DEFAULT_SHAPE", "Pass", "Rig", "Setting", "progress", "run_pass"]

FIRST_WORD = 3  # ids below it are special


class Rig:
    """The model of a setting, and engines over it.

    runner : the model's sizes, without weights;  ``model`` is loaded at first use.
    """

    def __init__(self, setting: Setting) -> None:
        setting.check()
        self.setting = setting
        if setting.threads:
            torch.set_num_threads(setting.threads)
        self.device = parse_device(setting.device)
        empty = self._empty()
        self.runner = ModelRunner(empty, "reference")
        self.runner.group_specs(setting.kv_dtype)  # refuses a kv dtype that does not fit its heads
        self.dtype: torch.dtype = self.runner.dtype
        self.runner.check_weights(
            setting.weights,
            choose_device(setting.backend, self.device, self.runner.dtype, setting.weights),
        )
        self.parameters = sum(each.numel() for each in empty.parameters())

    @property
    def shape_dtype(self) -> str:
        return "bfloat16" if self.setting.dtype == "auto" else self.setting.dtype

    def _empty(self) -> Any:
        setting, shape = self.setting, self.setting.shape_name
        if shape is not None:
            return empty_shape(shape, self.shape_dtype)
        assert setting.model is not None
        return empty_model(setting.model, setting.dtype, setting.device)[0]

    def load(self) -> Any:
        """The model with its weights, newly created or loaded."""
        setting, shape = self.setting, self.setting.shape_name
        if shape is not None:
            return make_model(shape, self.shape_dtype, setting.device, setting.seed)
        assert setting.model is not None
        return load_model(setting.model, None, setting.dtype, setting.device).model

    @cached_property
    def shared(self) -> ModelRunner:
        """Weights packed once, for all engines that are not ``alone``."""
        return self.pack(self.load())

    def pack(self, model: Any) -> ModelRunner:
        """A model's weights in the engine's format; the model itself is consumed."""
        return ModelRunner(
            model,
            self.setting.backend,
            EngineConfig().prefill_chunk,
            own=True,
            weights=self.setting.weights,
        )

    def prompts(self, count: int, length: int) -> list[TokenIds]:
        """Random tokens, deterministic for a seed."""
        draw = np.random.default_rng(self.setting.seed)
        low = min(FIRST_WORD, self.runner.vocab_size - 1)
        return [draw.integers(low, self.runner.vocab_size, length).tolist() for _ in range(count)]

    def check_length(self, prompt_len: int, output_len: int) -> None:
        """``ValueError`` if the model has too few positions."""
        longest = self.runner.max_positions
        if prompt_len + output_len > longest:
            raise ValueError(
                f"{prompt_len} prompt tokens and {output_len} generated ones exceed the model's "
                f"{longest} positions"
            )

    def engine(
        self,
        spec: str,
        count: int,
        prompt_len: int,
        output_len: int,
        *,
        alone: bool = False,
        **options: Any,
    ) -> Engine:
        """An engine with one policy and the setting's ``kv_memory``.

        ``alone``: the engine is the only owner of its weights, as when a user loads a model;
        otherwise all engines share one ``ModelRunner``.
        """
        policy = self._bound(spec)
        memory: int | str = self.setting.kv_memory
        if memory == "auto":
            memory = self.needed_bytes(spec, count, prompt_len, output_len)
        options = {"max_requests": max(count, EngineConfig().max_requests), **options}
        config = EngineConfig(
            kv_memory=memory,
            kv_dtype=self.setting.kv_dtype,
            weights=self.setting.weights,
            **options,
        )
        model = self.load() if alone else self.shared
        return Engine(model, policy, config, None, self.setting.backend, own=alone)

    @cached_property
    def _policies(self) -> dict[str, Policy]:
        """Policies bound so far, so that a head profile is measured only once."""
        return {}

    def _bound(self, spec: str) -> Policy:
        if spec not in self._policies:
            chosen = self.setting.policy(spec)
            if asks_for_profile(chosen):
                least = Layout.least_bytes(self.runner.group_specs(), EngineConfig().page_size)
                config = EngineConfig(kv_memory=least, weights=self.setting.weights)
                chosen = Engine(self.shared, chosen, config).policy
            self._policies[spec] = chosen
        return self._policies[spec]

    def needed_bytes(self, spec: str, count: int, prompt_len: int, output_len: int) -> int:
        """``kv_memory`` in which ``count`` requests run at once."""
        runner, page = self.runner, EngineConfig().page_size
        chosen = self._bound(spec)
        layers = runner.layers_for(prompt_len + output_len)
        chosen.check(layers)
        specs = runner.group_specs(self.setting.kv_dtype)
        layout = Layout.smallest(specs, page, chosen.uses_scores)
        cost = Ledger(layout, runner).cost(chosen, prompt_len, output_len, layers, 0)
        by_group = max(
            -(-count * int(pages) // (len(spec.layers) * spec.kv_heads)) + 1
            for pages, spec in zip(cost.pages, specs, strict=True)
        )
        return max(count * cost.bytes, by_group * layout.budget)


class Pass(NamedTuple):
    """One run of all prompts.

    seconds : of the whole run;  arrivals : of each request's tokens, seconds since the start;
    decode_steps : seconds of each step in which every request decoded and no prompt was in
    progress;  computed : tokens that entered each layer, per pass and request;
    prefill_bytes, end_bytes : (cache bytes, bytes of a full cache), all requests together;
    kept_prefill, kept_end : entries over all layers and requests.
    """

    seconds: float
    arrivals: list[list[float]]
    decode_steps: list[float]
    computed: list[list[int]]
    prefill_bytes: tuple[int, int]
    end_bytes: tuple[int, int]
    kept_prefill: list[int]
    kept_end: list[int]
    peak_in_flight: int

    @property
    def prefill_seconds(self) -> float:
        """Seconds until the last request has its first token."""
        return max(each[0] for each in self.arrivals)

    @property
    def output_tokens(self) -> int:
        return sum(len(each) for each in self.arrivals)

    def step_seconds(self) -> list[float]:
        """Seconds of decode steps; if prompts were always in progress, their mean."""
        longest = max(len(each) for each in self.arrivals)
        if self.decode_steps or longest < 2:
            return self.decode_steps
        return [(self.seconds - self.prefill_seconds) / (longest - 1)]


def run_pass(
    engine: Engine,
    prompts: list[TokenIds],
    output_len: int,
    loras: Sequence[str | None] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Pass:
    """Run all prompts at once, greedy, to ``output_len`` tokens each, and record every step.

    loras : each prompt's adapter, if there are any;  clock : source of times.
    """
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    names = loras or [None] * len(prompts)
    requests = [
        engine.make(prompt, params, lora=lora) for prompt, lora in zip(prompts, names, strict=True)
    ]
    arrivals: list[list[float]] = [[] for _ in requests]
    after: dict[int, tuple[int, int, tuple[float, ...]]] = {}
    steps: list[float] = []
    engine.peak_in_flight = 0
    start = began = clock()
    decodes = False  # the next step has all of the requests and nothing else
    for _ in engine.steps(requests):
        now = clock()
        if decodes:
            steps.append(now - began)
        for index, request in enumerate(requests):
            if len(request.output) > len(arrivals[index]):
                arrivals[index].append(now - start)
                if index not in after:
                    use = engine.usage(request)
                    after[index] = (use.bytes, use.full_bytes, use.layer_means)
        decodes = all(request.status == "running" for request in requests)
        began = clock()
    seconds = clock() - start
    _check(requests, output_len)
    ends = [engine.usage(request) for request in requests]
    return Pass(
        seconds,
        arrivals,
        steps,
        [request.computed for request in requests],
        (sum(b for b, _, _ in after.values()), sum(f for _, f, _ in after.values())),
        (sum(each.bytes for each in ends), sum(each.full_bytes for each in ends)),
        np.sum([kept for _, _, kept in after.values()], axis=0).tolist(),
        np.sum([each.layer_means for each in ends], axis=0).tolist(),
        engine.peak_in_flight,
    )


def _check(requests: list[Request], output_len: int) -> None:
    for request in requests:
        if len(request.output) != output_len:
            raise ValueError(
                f"request {request.id} ended after {len(request.output)} of {output_len} tokens "
                f"({request.finish_reason}); a bench needs a model whose logits are numbers"
            )


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr; call the yielded function after each piece of work, with a label
    for the next one."""
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[now]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(title, total=total, now="")
        yield lambda now="": bar.update(task, advance=1, now=now)
