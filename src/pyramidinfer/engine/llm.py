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
    """Ctrl-C during ``generate``; ``outputs`` holds the answers so far."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        super().__init__()
        self.outputs = outputs


class LLM:
    """A model with a compressed cache, for offline generation.

    Parameters
    ----------
    model : folder, hub id, the name of a fetched model (``"smollm2"``), a GGUF file (converted
        once, into the user's cache folder), the folder or hub id of a PEFT adapter (LoRA; merged
        into its base model), or a loaded transformers model or ``PeftModel`` (used unchanged,
        without dropout even in training mode, and still usable in its mode; if its linears are
        prepacked, the packed copy takes additional memory).
    policy : a name (see ``pyramidinfer.policies.POLICIES``) or a policy object.
    keep : common budget of the policies, a share in (0, 1]; each policy defines its base.  Refused
    if
        it cannot be reached with the model's depth; a prompt that is too short for it (a policy's
        window always stays) keeps the nearest possible share, which the output reports.
    kv_memory : bytes or a text such as ``"2GiB"``, for the caches of all requests together.
    dtype : ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``,
        ``"float64"``.
    device : ``"auto"``, ``"cpu"`` or ``"cuda"``.
    tokenizer : ``"auto"``, a tokenizer, the name of a model that has one, or None (token ids only).
    backend : attention backend: ``"auto"`` (the fastest on the device), ``"cpu"`` (C++),
    ``"triton"``
        or ``"reference"`` (plain torch).
    lossless : keep the full cache and give exactly the answers of ``policy="full"``, but draft
        tokens with the entries that ``policy`` would keep and verify several at once, if this is
        faster (docs/lossless.md).  ``keep`` is the share that drafting reads, a tenth by default.
    kv_dtype : (one of the options) how keys and values are stored: ``"auto"`` in ``dtype``,
        ``"int8"`` or ``"fp8"`` in 8 bits, ``"int4"`` in 4, with 16 bits of scale for every 64
        channels, so that ``kv_memory`` holds two or three and a half times as many entries as in
        16 bits.  An output's ``kv.full_bytes`` then refers to 16 bits.  Head sizes must be
        multiples of 4.
    weights : (one of the options) how the weights of linears are stored on the CPU kernels:
        ``"auto"`` in ``dtype``, ``"int8"`` or ``"int4"`` in 8 or 4 bits, quantized while the model
        is loaded, ``"gguf"`` in the format of the GGUF file.  ``ValueError`` for a model or backend
        that does not support it.
    lora_modules : (one of the options) LoRA adapters that requests may name, ``{"sql": "folder or
        hub id"}``: several in one batch, in addition to the model itself (docs/models.md).
        ``ValueError`` for an adapter of another model, or with more than low-rank linears.
    options : further fields of ``EngineConfig`` (``page_size``, ``max_requests``, …).
        With ``tensor_parallel_size`` or ``pipeline_parallel_size`` above 1 a process is started for
        each further rank (under ``torchrun`` they exist already, and those above 0 end with this
        call); ``close`` or the end of this object ends them.

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
        """End the model's other ranks; it cannot be used afterwards."""
        self.engine.close()

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The model's ``generation_config.json`` as fields of ``SamplingParams``.

        ``ValueError`` for an unsupported key that would change answers.
        """
        return sampling_defaults(self._generation_config, self.name)

    def get_default_sampling_params(self) -> SamplingParams:
        """The parameters that ``generate`` and ``stream`` use by default: those of the model."""
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
        (``get_default_sampling_params()`` by default) and ``protect`` (spans of prompt positions
        that are never dropped) are one for all, or one for each.  ``prefix`` (one for all, or one
        for each): a result of ``prefill``; a prompt then continues it, a text gets no special
        tokens first, and spans count from the prefix's first token. ``policy``: for these prompts,
        instead of this LLM's own (a prefix has its own already). ``lora`` (one for all, or one for
        each): the name of the adapter in ``lora_modules`` that a prompt uses, None for the model
        alone (prompts with a prefix use the prefix's adapter). Every prompt is checked before any
        of them runs.  Ctrl-C ends all of them and raises a ``KeyboardInterrupt`` whose ``outputs``
        holds the answers so far.
        """
        batch = _as_batch(prompts)
        chosen_params = self.get_default_sampling_params() if sampling is None else sampling
        many = _spread_sampling(chosen_params, len(batch))
        spans = _spread_spans(protect, len(batch))
        begun = _spread_prefixes(prefix, len(batch))
        chosen, loras = self._bound(policy), _spread_loras(lora, len(batch))
        if chosen is not None and (done := next(filter(None, begun), None)):
            raise ValueError(f"policy={chosen.name!r} with {done!r}: give the policy to prefill")
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
        """Prefill a text and compress its cache now, for use in ``generate(…, prefix=…)``.

        ``policy`` and ``keep``: as in ``LLM``; None is this LLM's own.  The policy sees the text
        without later questions.  ``lora``: the adapter for the prefill and for all requests with
        this prefix.  ``ValueError`` if the cache does not fit next to the held caches.
        """
        if policy is None and keep is not None:
            raise ValueError(f"keep={keep} without a policy: name its policy, too")
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
        request.output.clear()  # never fed, so the cache has no entry for it
        return Prefix(self.engine, request)

    def _bound(self, policy: str | Policy | None, keep: float | None = None) -> Policy | None:
        """A policy for this model; ``ValueError`` as in ``make_policy``."""
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
                f"lora={lora!r} with {prefix!r}, which was prefilled with lora={prefix.lora!r}: "
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

        The request is checked at once and queued when the first item is read.  Closing the
        iterator aborts it.  Other requests continue in the same steps.
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
        """The log-likelihood of each continuation after its prompt, with the prompt's cache
        compressed.

        A prompt's cache is compressed as usual; the continuation is then fed on top of it.  Each of
        its tokens attends to the kept entries and to the continuation before it, and none is
        dropped.  Texts of continuations get no special tokens.  ``logits=True`` also returns
        logits. ``policy``: for these prompts, instead of this LLM's own;  ``lora``: as in
        ``generate``.
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
        """Token ids of a prompt; a text gets the tokenizer's special tokens by default."""
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; none was loaded (give token ids)")
        if not prompt:
            raise ValueError("the prompt is empty; give at least one word")
        ids: TokenIds = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        return ids


def _is_list(value: Any) -> bool:
    """Whether it is an ordered iterable: a list, tuple or array, but no text, bytes or mapping."""
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
        raise ValueError(f"prompt {prompt!r:.60} contains values that are not token ids") from None


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
            raise ValueError(f"prefix={each!r:.60} must be a result of prefill, or None")
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
