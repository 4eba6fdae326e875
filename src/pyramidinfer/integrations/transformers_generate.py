"""The engine as the decoding loop of transformers' ``model.generate``.

``generate`` takes a callable as ``custom_generate``: it prepares inputs, generation config, logits
processors and stopping criteria as usual, then calls the callable instead of its own loop.  No
other hook of transformers replaces the loop without running code from a folder: a
``custom_generate`` that is a string runs such code, and a ``Cache`` or an attention function stays
inside the loop, which computes every prompt token in every layer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pyramidinfer.engine.defaults import REFUSED
from pyramidinfer.engine.llm import LLM
from pyramidinfer.policies import Policy
from pyramidinfer.types import RequestOutput, SamplingParams, TokenIds

__all__ = ["PyramidInferGenerate"]

#: Logits processors that the sampler supports: the field of ``SamplingParams``, the attribute.
PROCESSORS = {
    TemperatureLogitsWarper: ("temperature", "temperature"),
    TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"),
    MinPLogitsWarper: ("min_p", "min_p"),
    RepetitionPenaltyLogitsProcessor: ("repetition_penalty", "penalty"),
}
#: Options of a generation config that the engine does not support, and values without effect.
OTHERS: dict[str, tuple[Any, ...]] = {
    "cache_implementation": (),
    "cache_config": (),
    "max_cache_len": (),
    "prefill_chunk_size": (),
    "compile_config": (),
    "max_time": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
}
#: Options that a model's defaults may not set, but that are supported here.
POSSIBLE = {"num_return_sequences", "min_length", "min_new_tokens"}
#: Arguments that transformers prepares for its forward pass; the engine does not need them.
FORWARD = {"attention_mask", "position_ids", "use_cache", "cache", "logits_to_keep"}


class PyramidInferGenerate:
    """``model.generate(**inputs, custom_generate=PyramidInferGenerate("pyramid", keep=0.45))``.

    Returns what ``generate`` returns: token ids ``[rows, width]``, the prompt first, padded with
    ``pad_token_id`` after the end of a row.  The generated tokens are those of ``LLM`` on the same
    model with the same options; rows run together, and padding on the left is removed first.
    ``outputs`` holds the last call's ``RequestOutput`` of each row.

    Sampled tokens have the same distribution as in transformers, but use other random numbers; they
    are repeatable with ``torch.manual_seed``.

    policy : a name or a policy object, as in ``LLM``.
    keep : the policy's budget, as in ``LLM``.
    kv_memory : bytes or a string such as ``"2GiB"``, for all rows of a call together.
    tokenizer : the model's tokenizer, for policies that measure the model's heads on text.
    options : further options of ``LLM`` (``kv_dtype``, ``lossless``, ``backend``, …).

    The first call creates the engine, which stays in memory for later calls; another model or
    changed weights create a new engine.

    Calls raise ``ValueError`` with the name of the option for everything that ``LLM`` refuses or
    the engine does not support: beams, assistants, streamers, custom logits processors and stopping
    criteria, scores and attentions as outputs.
    """

    def __init__(
        self,
        policy: str | Policy = "pyramid",
        *,
        keep: float | None = None,
        kv_memory: int | str = "1GiB",
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        self._options = {
            **{"policy": policy, "keep": keep, "kv_memory": kv_memory, "tokenizer": tokenizer},
            **options,
        }
        self._made: tuple[nn.Module, list[tuple[int, int]], LLM] | None = None
        self.outputs: list[RequestOutput] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """Called by ``generate``.  ``input_ids``: ``[rows, width]``."""
        _check_caller(inspect.currentframe())
        _check_config(generation_config)
        prompts = _prompts(input_ids, model_kwargs)
        stops, most = _stops(stopping_criteria)
        fields = _sampling(logits_processor, input_ids.shape[1])
        if not generation_config.do_sample:
            fields["temperature"] = 0.0
        many = [
            SamplingParams(
                max_tokens=most - input_ids.shape[1],
                ignore_eos=True,
                stop_token_ids=stops,
                seed=int(torch.randint(2**62, ())) if generation_config.do_sample else None,
                **fields,
            )
            for _ in prompts
        ]
        self.outputs = self._llm(model).generate(prompts, many)
        for row, output in enumerate(self.outputs):
            if output.finish_reason not in ("stop", "length"):
                raise ValueError(
                    f"row {row} ended with {output.finish_reason!r} after "
                    f"{len(output.token_ids)} tokens (logits that are no finite numbers, say)"
                )
        told = _joined(input_ids, self.outputs, generation_config._pad_token_tensor)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=told)
        return told

    def _llm(self, model: nn.Module) -> LLM:
        """The engine for a model with its current weights."""
        state = [
            (each.data_ptr(), 0 if each.is_inference() else each._version)
            for each in model.parameters()
        ]
        if self._made is None or self._made[0] is not model or self._made[1] != state:
            self._made = None  # free its memory first
            self._made = model, state, LLM(model, **self._options)
        return self._made[2]


def _refuse(what: str, way_out: str = "leave it out, or leave custom_generate out") -> ValueError:
    return ValueError(f"{what} is not supported with PyramidInferGenerate; {way_out}")


def _check_caller(frame: Any) -> None:
    """Refuse arguments that ``generate`` accepts but does not pass to a callable."""
    taken = frame.f_back.f_locals if frame and frame.f_back else {}
    for name in ("streamer", "assistant_model", "synced_gpus"):
        if taken.get(name):
            raise _refuse(name)


def _check_config(config: Any) -> None:
    for name, neutral in {**REFUSED, **OTHERS}.items():
        value = getattr(config, name, None)
        if name not in POSSIBLE and value is not None and value not in neutral:
            raise _refuse(f"{name}={value!r:.60}")


def _prompts(input_ids: Tensor, model_kwargs: dict[str, Any]) -> list[TokenIds]:
    """Token ids of each row without its padding.  ``input_ids``: ``[rows, width]``."""
    for name, value in model_kwargs.items():
        if name not in FORWARD and value is not None:
            raise _refuse(name)
    cache, mask = model_kwargs.get("cache"), model_kwargs.get("attention_mask")
    if cache is not None and cache.get_seq_length():
        raise _refuse("a cache that holds tokens already", "give the whole text as input_ids")
    if input_ids.shape[1] == 0:
        raise _refuse("a prompt without tokens (inputs_embeds)", "give input_ids")
    if mask is None:
        mask = torch.ones_like(input_ids)
    mask = mask.to(input_ids.device).bool()
    if not (mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all()):
        raise _refuse(
            "an attention_mask with zeros elsewhere than in front",
            "pad on the left (tokenizer.padding_side='left')",
        )
    expected = (mask.long().cumsum(1) - 1).masked_fill(~mask, 0)
    positions = model_kwargs.get("position_ids")
    if positions is not None:
        positions = positions.to(input_ids.device).masked_fill(~mask, 0)
        if not torch.equal(positions, expected):
            raise _refuse("position_ids other than a text's own")
    return [ids[kept].tolist() for ids, kept in zip(input_ids, mask, strict=True)]


def _stops(criteria: Any) -> tuple[TokenIds, int]:
    """Ids that end a row, and the maximum number of columns."""
    stops: TokenIds = []
    most: int | None = None
    for each in criteria:
        if type(each) is EosTokenCriteria:
            stops += each.eos_token_id.tolist()
        elif type(each) is MaxLengthCriteria:
            most = each.max_length
        else:
            raise _refuse(f"stopping_criteria: {type(each).__name__}")
    assert most is not None  # generate always sets it
    return stops, most


def _sampling(processors: Any, width: int) -> dict[str, Any]:
    """Fields of ``SamplingParams`` equivalent to the processors; ``width``: prompt columns."""
    fields: dict[str, Any] = {"temperature": 1.0}
    for each in processors:
        if type(each) in PROCESSORS:
            name, attribute = PROCESSORS[type(each)]
            fields[name] = getattr(each, attribute)
        elif type(each) is MinNewTokensLengthLogitsProcessor:
            fields["min_tokens"] = max(fields.get("min_tokens", 0), each.min_new_tokens)
        elif type(each) is MinLengthLogitsProcessor:
            least = max(0, each.min_length - width)
            fields["min_tokens"] = max(fields.get("min_tokens", 0), least)
        else:
            raise _refuse(f"logits_processor: {type(each).__name__}")
    return fields


def _joined(input_ids: Tensor, outputs: list[RequestOutput], pad: Tensor | None) -> Tensor:
    """The given prompts followed by the generated tokens, ``[rows, width + longest]``."""
    longest = max(len(each.token_ids) for each in outputs)
    fill = 0 if pad is None else int(pad)
    rows = [each.token_ids + [fill] * (longest - len(each.token_ids)) for each in outputs]
    new = torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=1)
