"""A model split over ranks: each loads its part, then one engine leads and the others follow."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import transformers
from torch import nn

from pyramidinfer.config import EngineConfig, parse_device
from pyramidinfer.engine.dealing import deal_layers
from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.launch import Groups, Link, open_groups, open_link
from pyramidinfer.engine.ranks import Follower, Leader, check_policy_sent
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.adapters import Adapter
from pyramidinfer.models.families import find_family
from pyramidinfer.models.fingerprint import measure
from pyramidinfer.models.loading import LoadedModel, empty_model, load_model
from pyramidinfer.models.lora_modules import read_adapters
from pyramidinfer.models.pipeline import StageRunner
from pyramidinfer.models.ranks import Ranks
from pyramidinfer.models.sharding import split_adapter, split_model, weights_mark
from pyramidinfer.models.stages import Stages, keep_stage, ranges_of
from pyramidinfer.policies import Policy

__all__ = ["check_sent", "split_llm"]

#: Seconds without an answer from a rank after which all ranks end.
TIMEOUT = 60.0


def check_sent(model: Any, policy: Policy) -> None:
    """``ValueError`` for arguments that cannot be sent to other processes."""
    if isinstance(model, nn.Module):
        raise ValueError(
            "a loaded model cannot be sent to other ranks: give its folder or name, or leave "
            "tensor_parallel_size and pipeline_parallel_size out"
        )
    check_policy_sent(policy)


def split_llm(
    model: str,
    policy: Policy,
    config: EngineConfig,
    tokenizer: Any,
    dtype: Any,
    device: Any,
    sent: dict[str, Any],
) -> tuple[LoadedModel, Engine]:
    """A model split over ranks: this rank's part, and the leading engine.  On other ranks this
    function follows rank 0 until it ends the model, and then exits the process.

    sent : further arguments of ``LLM``.  ``ValueError`` or ``RanksError`` if the ranks cannot
    connect or do not match.
    """
    place = parse_device(device)
    same = {"model": model, "policy": policy, "dtype": dtype, "device": device}
    options = {**same, "tokenizer": tokenizer, **sent}
    link = open_link(config.ranks, place, config.rank_timeout or TIMEOUT, options)
    try:
        groups = open_groups(link, config.tensor_parallel_size, place)
        loaded, runner, adapters = _load_part(
            model, policy, config, tokenizer, dtype, place, link, groups, sent["backend"]
        )
        kind = Follower if link.rank else Leader
        engine = kind(link, runner, policy, config, loaded.tokenizer, adapters=adapters)
    except BaseException as error:
        link.broken = link.broken or str(error)  # no message needed: ranks time out
        link.close()
        raise
    if isinstance(engine, Follower):
        engine.follow()
    return loaded, engine


def _load_part(
    model: str,
    policy: Policy,
    config: EngineConfig,
    tokenizer: Any,
    dtype: Any,
    place: torch.device,
    link: Link,
    groups: Groups,
    backend: str,
) -> tuple[LoadedModel, ModelRunner, dict[str, Adapter]]:
    """Load a model and its adapters; when all ranks have loaded the same ones, cut them to this
    rank's part."""
    stage, index = divmod(link.rank, config.tensor_parallel_size)
    limit = timedelta(seconds=link.timeout)
    ranks = Ranks(index, config.tensor_parallel_size, groups.heads, timeout=limit)
    try:
        loaded = load_model(model, tokenizer, dtype, "cpu")
        whole: Any = loaded.model
        versions = f"{torch.__version__} {transformers.__version__}"
        options = f"{policy} {config}"
        body = whole.get_submodule(find_family(whole.config).body)
        like = torch.empty(0, dtype=loaded.dtype, device=place)
        adapters = read_adapters(config.adapters, body, whole.config, like)
        what = {"weights": weights_mark(whole), "options": options, "versions": versions}
        what |= {f"weights of {name!r}": each.mark for name, each in adapters.items()}
        ranks.fingerprint = measure(body)
    except Exception as error:
        link.agree({}, f"{error}")
        raise
    link.agree(what)
    empty = empty_model(model, dtype, "cpu")[0]
    probe = ModelRunner(empty, "reference", ranks=Ranks(fingerprint=ranks.fingerprint))

    def counts() -> list[int]:
        stages, given = config.pipeline_parallel_size, config.pipeline_layers
        return list(map(len, deal_layers(empty, probe, policy, stages, given)))

    layers = ranges_of(link.decide("layers", counts))
    stages = Stages(layers, stage, groups.mail)
    if ranks.size > 1:
        split_model(whole, probe.shapes[0], ranks)
    keep_stage(whole, stages)
    ranks.weight_bytes = sum(each.nbytes for each in whole.parameters())
    loaded = replace(loaded, model=whole.to(place), device=place)
    kind = StageRunner if stages.size > 1 else ModelRunner
    runner = kind(loaded.model, backend, config.prefill_chunk, own=True, ranks=ranks, stages=stages)
    for each in adapters.values():
        split_adapter(each, whole.config, probe.shapes[0], ranks, stages.own)
    return loaded, runner, runner.take_adapters(adapters)
