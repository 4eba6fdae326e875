"""``LLM``: the engine for offline use."""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyramidinfer.config import EngineConfig
from pyramidinfer.engine.checks import check_plan
from pyramidinfer.engine.defaults import sampling_defaults
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.prefix import Prefix
from pyramidinfer.engine.request import Request, Scoring
from pyramidinfer.engine.split import check_sent, split_llm
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.catalog import check_path, find_model
from pyramidinfer.models.device import choose_device
from pyramidinfer.models.gguf_weights import coded_model
from pyramidinfer.models.loading import empty_model, load_model
from pyramidinfer.models.ranks import check_heads
from pyramidinfer.models.stages import check_stages
from pyramidinfer.models.weights import stored_bytes
from pyramidinfer.policies import Policy, choose_policy, make_policy
from pyramidinfer.types import RequestOutput, SamplingParams, Score, TokenIds, Trace

__all__ = ["LLM", "Interrupted"]

ARGUMENTS = (
    *("model", "policy", "keep", "kv_memory", "dtype", "device", "tokenizer", "backend"),
    "lossless",
)
Prompt = str | TokenIds
Spans = Sequence[tuple[int, int]]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during ``generate``; ``outputs`` holds every answer as far as it got."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        super().__init__()
        self.outputs = outputs


class LLM:
    """A model with a compressed cache, for offline generation.

    Parameters
    ----------
    model : folder, hub id, the name of a fetched model (``"smollm2"``), a GGUF file (converted
        once, into the user's cache folder), the folder or hub id of a PEFT adapter (LoRA; merged
        into its base model), or a loaded transformers model or ``PeftModel`` (used as it is,
        without dropout even in training mode, and left usable in its mode; where its linears are
        prepacked, they take their memory a second time).
    policy : a name (see ``pyramidinfer.policies.POLICIES``) or a policy object.
    keep : common budget of the policies, a share in (0, 1]; each policy says of what.  Refused
        where the model's depth puts it out of reach; a prompt too short for it (a policy's window
        always stays) keeps the nearest share instead, which the output tells.
    kv_memory : bytes or a text such as ``"2GiB"``, for the caches of all requests together.
    dtype : ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``,
        ``"float64"``.
    device : ``"auto"``, ``"cpu"`` or ``"cuda"``.
    tokenizer : ``"auto"``, a tokenizer, what names a model that has one, or None (token ids only).
    backend : how to attend: ``"auto"`` (the fastest the device has), ``"cpu"`` (C++), ``"triton"``
        or ``"reference"`` (plain torch).
    lossless : keep the full cache and say exactly what ``policy="full"`` says, but guess tokens
        over the entries that ``policy`` would keep and verify several at once, where that is
        faster (docs/lossless.md).  ``keep`` is what guesses read, a tenth by default.
    kv_dtype : (one of the options) how keys and values are stored: ``"auto"`` in ``dtype``,
        ``"int8"`` or ``"fp8"`` in 8 bits, ``"int4"`` in 4, with 16 bits of scale for every 64
        channels, so that ``kv_memory`` holds two or three and a half times what it does in
        16 bits.  An output's ``kv.full_bytes`` are those of 16 bits then.  Head sizes must be
        multiples of 4.
    weights : (one of the options) how the weights of linears are stored on the CPU kernels:
        ``"auto"`` in ``dtype``, ``"int8"`` or ``"int4"`` in so many bits, made while the model is
        loaded, ``"gguf"`` as the GGUF file has them.  ``ValueError`` for a model or backend that
        has no such linears.
    lora_modules : (one of the options) LoRA adapters that requests may name, ``{"sql": "folder or
        hub id"}``: several in one batch, beside the model itself (docs/models.md).
        ``ValueError`` for one that is for another model, or more than low ranks beside linears.
    options : further fields of ``EngineConfig`` (``page_size``, ``max_requests``, …).
        With ``tensor_parallel_size`` or ``pipeline_parallel_size`` above 1 a process is started for
        each further rank (under ``torchrun`` they are there already, and those above 0 end with
        this call); ``close`` or the end of this object ends them.

    Raises ``ValueError`` for anything that cannot be used, before memory is taken.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        policy: str | Policy = "pyramid",
        *,
        keep: float | None = None,
        kv_memory: int | str = "1GiB",
        dtype: Any = "auto",
        device: Any = "auto",
        tokenizer: Any = "auto",
        backend: str = "auto",
        lossless: bool = False,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options(ARGUMENTS, kv_memory=kv_memory, **options)
        chosen = choose_policy(policy, keep, lossless)
        if config.ranks > 1:
            check_sent(model, chosen)
        of_file = False
        if not isinstance(model, nn.Module):
            model = find_model(os.fspath(model))
            empty, place = empty_model(model, dtype, device)
            runner = ModelRunner(empty, "reference")
            on = choose_device(backend, place, runner.dtype, config.weights)
            runner.check_weights(config.weights, on)
            runner.load_adapters(config.adapters)
            packed = config.weights != "auto" and on.coding == "packed"
            of_file = packed and config.weights == "gguf"
            if of_file:
                empty = coded_model(Path(check_path(model)), empty.config, runner.dtype)
            loading = sum(each.nbytes for each in empty.parameters()) // config.ranks
            weights = stored_bytes(empty, config.weights) if packed else loading
            check_heads(config.tensor_parallel_size, runner.shapes[0])
            check_stages(config.pipeline_parallel_size, runner.depth, config.pipeline_layers)
            check_plan(runner, chosen, config, place, weights, loading)
        if config.ranks > 1:
            sent = {"kv_memory": kv_memory, "backend": backend, **options}
            loaded, self.engine = split_llm(
                str(model), chosen, config, tokenizer, dtype, device, sent
            )
        else:
            loaded = load_model(model, tokenizer, dtype, device, of_file=of_file)
            self.engine = Engine(
                loaded.model,
                chosen,
                config,
                loaded.tokenizer,
                backend,
                own=not isinstance(model, nn.Module),
            )
        weakref.finalize(self, self.engine.close)
        self.tokenizer = loaded.tokenizer
        self.name, self.dtype, self.device = loaded.name, loaded.dtype, loaded.device
        self._generation_config = getattr(loaded.model, "generation_config", None)

    def close(self) -> None:
        """End the model's other ranks; nothing can be done with it afterwards."""
        self.engine.close()

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """What the model's ``generation_config.json`` says, as fields of ``SamplingParams``.

        ``ValueError`` for a key in it that would change answers and is not supported.
        """
        return sampling_defaults(self._generation_config, self.name)

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate`` and ``stream`` use where none are given: the model's own defaults."""
        return SamplingParams(**self.sampling_defaults)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | list[SamplingParams] | None = None,
        *,
        protect: Spans | list[Spans] = (),
        prefix: Prefix | Sequence[Prefix] | None = None,
        policy: str | Policy | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; the list is in prompt order.

        ``prompts``: a text, a list of texts, token ids, or lists of token ids.  ``sampling``
        (``get_default_sampling_params()`` where none is given) and ``protect`` (spans of prompt
        positions that are never dropped) are one for all, or one for each.  ``prefix`` (one for
        all, or one for each): what ``prefill`` returned; a prompt then goes on from there, a text
        without special tokens in front, and spans count from the prefix's first token.
        ``policy``: for these prompts, instead of this LLM's own (a prefix has its own already).
        ``lora`` (one for all, or one for each): the name of the adapter in ``lora_modules`` that a
        prompt runs with, None for the model alone (what goes on from a prefix runs with its own).
        Every prompt is checked before any of them runs.  Ctrl-C ends all of them and raises a
        ``KeyboardInterrupt`` whose ``outputs`` holds every answer as far as it got.
        """
        batch = _as_batch(prompts)
        chosen_params = self.get_default_sampling_params() if sampling is None else sampling
        many = _spread_sampling(chosen_params, len(batch))
        spans = _spread_spans(protect, len(batch))
        begun = _spread_prefixes(prefix, len(batch))
        chosen, loras = self._bound(policy), _spread_loras(lora, len(batch))
        if chosen is not None and (done := next(filter(None, begun), None)):
            raise ValueError(f"policy={chosen.name!r} beside {done!r}: give the policy to prefill")
        encoded = [
            self.encode(prompt, special=on is None) for prompt, on in zip(batch, begun, strict=True)
        ]
        requests = [
            self._make(ids, params, keep, on, chosen, name)
            for ids, params, keep, on, name in zip(encoded, many, spans, begun, loras, strict=True)
        ]
        try:
            self.engine.run(requests)
        except KeyboardInterrupt:
            raise Interrupted([self.engine.output(each) for each in requests]) from None
        return [self.engine.output(request) for request in requests]

    def prefill(
        self,
        prompt: Prompt,
        policy: str | Policy | None = None,
        *,
        keep: float | None = None,
        protect: Spans = (),
        lora: str | None = None,
    ) -> Prefix:
        """Take a text in and compress its cache now, for ``generate(…, prefix=…)`` to go on from.

        ``policy`` and ``keep``: as in ``LLM``; None is this LLM's own.  The policy sees the text
        without what will be asked of it.  ``lora``: the adapter that it is taken in with, and that
        whatever goes on from it runs with.  ``ValueError`` where the cache does not fit beside what
        is held.
        """
        if policy is None and keep is not None:
            raise ValueError(f"keep={keep} without a policy: name the policy that it is for")
        chosen = self._bound(policy, keep)
        request = self.engine.make(
            self.encode(prompt),
            SamplingParams(max_tokens=1, ignore_eos=True),
            policy=chosen,
            protect=protect,
            hold=True,
            lora=lora,
        )
        self.engine.run([request])
        if request.error is not None:
            self.engine.release(request)
            raise ValueError(f"the prefix cannot be used: {request.error}")
        request.output.clear()  # never fed, so the cache knows nothing of it
        return Prefix(self.engine, request)

    def _bound(self, policy: str | Policy | None, keep: float | None = None) -> Policy | None:
        """A policy as it is on this model; ``ValueError`` as ``make_policy``."""
        return None if policy is None else make_policy(policy, keep)

    def _make(
        self,
        tokens: TokenIds,
        params: SamplingParams,
        protect: Spans,
        prefix: Prefix | None,
        policy: Policy | None = None,
        lora: str | None = None,
    ) -> Request:
        if prefix is None:
            return self.engine.make(tokens, params, policy=policy, protect=protect, lora=lora)
        held = prefix.held_by(self.engine)
        if lora is not None and lora != prefix.lora:
            raise ValueError(
                f"lora={lora!r} beside {prefix!r}, which was taken in with lora={prefix.lora!r}: "
                f"give the adapter to prefill"
            )
        return self.engine.branch(held, tokens, params, protect=protect)

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        protect: Spans = (),
        prefix: Prefix | None = None,
        lora: str | None = None,
    ) -> Iterator[RequestOutput]:
        """Yield the answer as it grows: each item is the whole answer so far.

        The request is checked at once and queued when the first item is asked for.  Closing the
        iterator aborts it.  Other requests go on in the same steps.
        """
        params = self.get_default_sampling_params() if sampling is None else sampling
        tokens = self.encode(prompt, special=prefix is None)
        return self._follow(self._make(tokens, params, protect, prefix, lora=lora))

    def _follow(self, request: Request) -> Iterator[RequestOutput]:
        given, is_told = 0, False
        for _ in self.engine.steps([request]):
            ended = request.ended
            if ended or len(request.output) > given:
                given = len(request.output)
                if request.detokenizer and not ended and not request.detokenizer.stopped:
                    request.detokenizer.update(request.output)
                yield self.engine.output(request)
                is_told = ended
        if not is_told:  # it ended in the steps of another stream
            yield self.engine.output(request)

    def score(
        self,
        prompts: Sequence[Prompt],
        continuations: Sequence[Prompt],
        *,
        protect: Spans | list[Spans] = (),
        logits: bool = False,
        policy: str | Policy | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Score]:
        """How likely each continuation is after its prompt, with compression in force.

        A prompt's cache is compressed as always; the continuation then goes in on top of it, every
        token attending to what was kept and to the continuation before it, and none is dropped.
        Texts of continuations get no special tokens.  ``logits=True`` returns them, too.
        ``policy``: for these prompts, instead of this LLM's own;  ``lora``: as in ``generate``.
        """
        batch, chosen = _as_batch(prompts), self._bound(policy)
        spans, loras = _spread_spans(protect, len(batch)), _spread_loras(lora, len(batch))
        tokens = [
            self.encode(each, special=False)
            for each in _one_each(_as_batch(continuations), len(batch), "continuations")
        ]
        requests = [
            self.engine.make(
                self.encode(prompt),
                SamplingParams(max_tokens=1),
                policy=chosen,
                protect=keep,
                scoring=Scoring(wanted, logits),
                lora=name,
            )
            for prompt, wanted, keep, name in zip(batch, tokens, spans, loras, strict=True)
        ]
        self.engine.run(requests)
        return [self._scored(request) for request in requests]

    def _scored(self, request: Request) -> Score:
        scoring = request.scoring
        assert scoring is not None
        return Score(
            request.prompt,
            scoring.tokens,
            scoring.logprobs,
            scoring.greedy,
            self.engine.metrics(request),
            self.engine.usage(request),
            torch.cat(scoring.logits) if scoring.keep_logits else None,
        )

    def trace(self, prompt: Prompt, max_tokens: int = 0, *, protect: Spans = ()) -> Trace:
        """Which tokens survive to which layer, for pictures and tests (greedy, ignores EOS)."""
        return trace(self.engine, self.encode(prompt), max_tokens, protect)

    def encode(self, prompt: Prompt, special: bool = True) -> TokenIds:
        """Token ids of a prompt; a text gets the tokenizer's special tokens, unless told not."""
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; none was loaded (give token ids)")
        if not prompt:
            raise ValueError("the prompt is empty; give at least one word")
        ids: TokenIds = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        return ids


def _is_list(value: Any) -> bool:
    """Something ordered to go through: a list, a tuple, an array, but no text, bytes or mapping."""
    return hasattr(value, "__getitem__") and not isinstance(value, str | bytes | bytearray | dict)


def _is_id(item: Any) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool)


def _token_ids(prompt: Any) -> TokenIds:
    """A list of plain ints; ``ValueError`` for anything else."""
    if not _is_list(prompt) or not all(_is_id(token) for token in prompt):
        raise ValueError(f"prompt {prompt!r:.60} is neither a text nor a list of token ids")
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError(f"prompt {prompt!r:.60} holds something that is no token id") from None


def _as_batch(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        raise ValueError(f"prompts={prompts!r:.60} must be a text, token ids, or a list of either")
    items = list(prompts)
    if not items:
        raise ValueError("no prompt was given; give at least one")
    return [items] if all(_is_id(item) and not isinstance(item, str) for item in items) else items


def _spread_sampling(value: Any, count: int) -> list[SamplingParams]:
    many = list(value) if isinstance(value, list | tuple) else [value] * count
    for each in many:
        if not isinstance(each, SamplingParams):
            raise ValueError(f"sampling={each!r} must be SamplingParams, or a list of them")
    return _one_each(many, count, "SamplingParams")


def _spread_prefixes(prefix: Any, count: int) -> list[Prefix | None]:
    many = list(prefix) if isinstance(prefix, list | tuple) else [prefix] * count
    for each in many:
        if not isinstance(each, Prefix | None):
            raise ValueError(f"prefix={each!r:.60} must be what prefill returned, or None")
    return _one_each(many, count, "prefixes")


def _spread_loras(lora: Any, count: int) -> list[str | None]:
    many = list(lora) if isinstance(lora, list | tuple) else [lora] * count
    for each in many:
        if not isinstance(each, str | None):
            raise ValueError(f"lora={each!r:.60} must be an adapter's name, or None")
    return _one_each(many, count, "adapters")


def _spread_spans(protect: Any, count: int) -> list[Spans]:
    if not isinstance(protect, Iterable):
        raise ValueError(f"protect={protect!r} must be a list of spans (start, stop)")
    items = list(protect)
    if items and all(isinstance(item, list) for item in items):
        return _one_each(items, count, "protect lists")
    return [items] * count


def _one_each(items: list[Any], count: int, name: str) -> list[Any]:
    if len(items) != count:
        raise ValueError(f"{len(items)} {name} given for {count} prompts; give one, or one each")
    return items
