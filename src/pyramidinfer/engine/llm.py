"""``LLM``: offline inference."""

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
    """Ctrl-C during ``generate``; ``outputs`` has every answer, complete or partial."""

    def __init__(self, outputs: list[RequestOutput]) -> None:
        super().__init__()
        self.outputs = outputs


class LLM:
    """A model with a compressed cache, for offline generation.

    Parameters
    ----------
    model : a folder, a hub id, the name of a fetched model (``"smollm2"``), a GGUF file (converted
        once, into the user's cache folder), the folder or hub id of a PEFT adapter (LoRA; merged
        into its base model), or a loaded transformers model or ``PeftModel``.  A loaded model runs
        without dropout even in training mode and is not modified; if its linears are prepacked,
        the packed copies take additional memory.
    policy : a name (see ``pyramidinfer.policies.POLICIES``) or a policy object.
    keep : the budget of the policy, a share in (0, 1]; each policy defines of what.  Refused if
        the policy cannot reach it on a model of this depth.  A prompt that is too short for it (a
        policy's window always stays) keeps the nearest possible share, which the output reports.
    kv_memory : bytes, or a text such as ``"2GiB"``, for the caches of all requests together.
    dtype : ``"auto"`` (the checkpoint's), ``"float32"``, ``"bfloat16"``, ``"float16"``,
        ``"float64"``.
    device : ``"auto"``, ``"cpu"`` or ``"cuda"``.
    tokenizer : ``"auto"``, a tokenizer, a folder or hub id that has one, or None (token ids only).
    backend : the attention backend: ``"auto"`` (the fastest on the device), ``"cpu"`` (C++),
        ``"triton"`` or ``"reference"`` (plain torch).
    lossless : keep the full cache and give exactly the output of ``policy="full"``.  Draft tokens
        are generated with the entries that ``policy`` would keep, and several are verified at
        once, if that is faster (docs/lossless.md).  ``keep`` is the share of the cache that drafts
        read, a tenth by default.
    kv_dtype : (one of the options) how keys and values are stored: ``"auto"`` in ``dtype``,
        ``"int8"`` or ``"fp8"`` in 8 bits, ``"int4"`` in 4 bits, with a 16-bit scale for every 64
        channels.  ``kv_memory`` then holds two (8 bits) or three and a half times (4 bits) as many
        entries as in 16 bits, and ``kv.full_bytes`` of an output is the size in 16 bits.  Head
        sizes must be multiples of 4.
    weights : (one of the options) how the CPU kernels store the weights of linears: ``"auto"`` in
        ``dtype``; ``"int8"`` or ``"int4"`` in 8 or 4 bits, quantized while the model is loaded;
        ``"gguf"`` with the codes of the GGUF file.  ``ValueError`` for a model or backend that does
        not support it.
    lora_modules : (one of the options) LoRA adapters that requests choose by name,
        ``{"sql": "folder or hub id"}``.  Requests with different adapters, and without one, run in
        the same batch (docs/models.md).  ``ValueError`` for an adapter of another model, and for
        one that is more than low-rank matrices on linears.
    options : further fields of ``EngineConfig`` (``page_size``, ``max_requests``, …).
        With ``tensor_parallel_size`` or ``pipeline_parallel_size`` above 1, a process is started
        for each further rank (under ``torchrun`` these processes exist already, and in ranks above
        0 the process ends in this call).  ``close``, or deleting this object, ends them.

    Raises ``ValueError`` for anything unsupported, before memory is allocated.
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
        """Stop the processes of other ranks; the object cannot be used afterwards."""
        self.engine.close()

    @property
    def policy(self) -> Policy:
        return self.engine.policy

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """The model's ``generation_config.json`` as fields of ``SamplingParams``.

        ``ValueError`` for an unsupported key in it that would change answers.
        """
        return sampling_defaults(self._generation_config, self.name)

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's sampling defaults, which ``generate`` and ``stream`` use by default."""
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
        """Generate an answer to every prompt; returns the outputs in the order of the prompts.

        ``sampling``, ``protect``, ``prefix`` and ``lora`` are one for all prompts, or a list with
        one for each.

        prompts : a text, a list of texts, token ids, or a list of lists of token ids.
        sampling : by default ``get_default_sampling_params()``.
        protect : spans ``(start, stop)`` of prompt positions that are never dropped.
        prefix : a result of ``prefill``, from which the prompt continues.  Texts then get no
            special tokens before them, and spans count from the first token of the prefix.
        policy : for these prompts, instead of the policy of this LLM (not with ``prefix``, which
            has its own).
        lora : the name of the prompt's adapter in ``lora_modules``, None for the base model.  A
            prompt with a ``prefix`` uses the adapter of the prefix.

        All prompts are checked before any of them runs (``ValueError``).  Ctrl-C ends all of them
        and raises ``Interrupted``, a ``KeyboardInterrupt`` whose ``outputs`` has every answer,
        complete or partial.
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
        """Prefill a text and compress its cache, for ``generate(…, prefix=…)`` to continue from.

        The policy sees the text without the questions that follow.

        policy, keep : as in ``LLM``; None is the policy of this LLM.
        protect : spans ``(start, stop)`` of positions that are never dropped.
        lora : the name of the adapter for the text and for every prompt that continues from it.

        ``ValueError`` if the cache does not fit in the free part of ``kv_memory``.
        """
        if policy is None and keep is not None:
            raise ValueError(f"keep={keep} without a policy: name the policy, too")
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
        """The policy object; ``ValueError`` as from ``make_policy``."""
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
        """Yield the answer while it is generated: each item is the complete answer so far.

        The arguments are those of ``generate``, for one prompt.  The request is checked in this
        call (``ValueError``) and queued when the first item is requested.  Closing the iterator
        aborts it.  Other open streams advance in the same steps.
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
        """The log-probabilities of each continuation after its prompt, on a compressed cache.

        The prompt's cache is compressed as in ``generate``.  Then the continuation is fed: each of
        its tokens attends to the kept entries and to the continuation before it, and none of its
        tokens is dropped.  Texts of continuations get no special tokens.

        prompts, continuations : lists of the same length.
        protect, lora : as in ``generate``.
        logits : also return the logits.
        policy : for these prompts, instead of the policy of this LLM.

        ``ValueError`` as in ``generate``.
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

    def trace(
        self,
        prompt: Prompt,
        max_tokens: int = 0,
        *,
        protect: Spans = (),
        lora: str | None = None,
    ) -> Trace:
        """Which tokens each layer keeps, for pictures and tests (greedy, ignores end tokens).

        max_tokens : the number of tokens to generate after prefill.
        protect, lora : as in ``generate``.
        """
        return trace(self.engine, self.encode(prompt), max_tokens, protect, lora)

    def encode(self, prompt: Prompt, special: bool = True) -> TokenIds:
        """Token ids of a prompt; a text gets the tokenizer's special tokens if ``special``."""
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; none was loaded (give token ids)")
        if not prompt:
            raise ValueError("the prompt is empty; give at least one word")
        ids: TokenIds = self.tokenizer(prompt, add_special_tokens=special)["input_ids"]
        return ids


def _is_list(value: Any) -> bool:
    """Whether it is a sequence such as a list, tuple or array, but not a text, bytes or mapping."""
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
        raise ValueError(
            f"prompt {prompt!r:.60} contains something that is not a token id"
        ) from None


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
            raise ValueError(
                f"prefix={each!r:.60} must be a Prefix, which prefill returned, or None"
            )
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
        raise ValueError(
            f"{len(items)} {name} given for {count} prompts; give one for all, or one for each"
        )
    return items
