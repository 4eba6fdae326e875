"""One engine over a model that answers prompts under any policy, in the two protocols of the
studies.

*Inside*: context and question form one prompt, so a policy compresses with the question in view.
*After*: the context is prefilled and compressed first, and the question continues on the compressed
cache, as in every further turn of a chat (kvpress measures this way).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

from pyramidinfer.engine import LLM, Engine
from pyramidinfer.lab.chat import Asked, Chat
from pyramidinfer.lab.plans import PROTOCOLS, own_keep
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import Full, Policy
from pyramidinfer.policies.base import KeepError
from pyramidinfer.policies.registry import parse_policy
from pyramidinfer.types import KVUsage, Layers, SamplingParams, TokenIds

__all__ = ["PROTOCOLS", "Answer", "Asker", "asker", "full_caches", "own_keep", "reachable"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and its cost.

    kv : inside: the cache at the end of the answer; after: the cache of the compressed context.
    computed_share : computed share of the layer-tokens of the prompt (after: of the context).
    """

    text: str
    token_ids: TokenIds
    kv: KVUsage
    computed_share: float


def reachable(spec: str, keep: float | None, layers: Layers) -> Policy:
    """The policy of a spec at ``keep``, or at the lowest share it can reach with this depth."""
    policy = parse_policy(spec, keep)
    try:
        policy.check(layers)
    except KeepError as error:
        if keep is not None:
            return parse_policy(spec, min(1.0, error.lowest + 0.005))
    return policy


class Asker:
    """A loaded model that answers prompts under one policy after another."""

    def __init__(self, subject: Subject) -> None:
        self.llm: LLM = subject.llm(Full(), slot_scores=True)
        self.chat = Chat(self.llm.tokenizer)
        runner = self.llm.engine.runner
        self._layers = Layers((True,) * runner.depth, runner.kv_heads)

    def policy(self, spec: str, keep: float | None) -> Policy:
        """The policy of a spec (``NAME`` or ``NAME:option=value,…``) bound to the model.

        A ``keep`` in the spec takes precedence; otherwise it is ``keep``, or the lowest share that
        the policy can reach with the model's number of layers.
        """
        if spec.split(":")[0] == "full":
            return Full()
        keep = keep if own_keep(spec) is None else None
        return reachable(spec, keep, self._layers)

    def ask(
        self,
        protocol: str,
        prompts: Sequence[Asked],
        params: Sequence[SamplingParams],
        policy: Policy,
    ) -> list[Answer]:
        """Answers to the prompts, in order, by one of ``PROTOCOLS``."""
        if protocol == "inside":
            return self._inside(prompts, params, policy)
        if protocol == "after":
            size = self._at_once(max(len(prompt.whole) for prompt in prompts))
            return [
                answer
                for at in range(0, len(prompts), size)
                for answer in self._after(prompts[at : at + size], params[at : at + size], policy)
            ]
        raise ValueError(f"protocol {protocol!r} is unknown: use one of {', '.join(PROTOCOLS)}")

    def _inside(
        self, prompts: Sequence[Asked], params: Sequence[SamplingParams], policy: Policy
    ) -> list[Answer]:
        outputs = self.llm.generate([each.whole for each in prompts], list(params), policy=policy)
        return [Answer(o.text, o.token_ids, o.kv, o.metrics.computed_share) for o in outputs]

    def _after(
        self, prompts: Sequence[Asked], params: Sequence[SamplingParams], policy: Policy
    ) -> list[Answer]:
        with ExitStack() as held:
            caches = [
                held.enter_context(self.llm.prefill(prompt.context, policy)) for prompt in prompts
            ]
            rests = [prompt.rest for prompt in prompts]
            outputs = self.llm.generate(rests, list(params), prefix=caches)
            return [
                Answer(o.text, o.token_ids, cache.kv, cache.metrics.computed_share)
                for o, cache in zip(outputs, caches, strict=True)
            ]

    def _at_once(self, longest: int) -> int:
        """How many contexts to hold at once: each may exist twice while its copy is written."""
        return max(1, min(8, full_caches(self.llm.engine, longest) // 3))


def full_caches(engine: Engine, length: int) -> int:
    """How many full caches of texts of this length an engine's memory can hold."""
    layers = engine.runner.layers_for(length + 1)
    return engine.ledger.how_many(engine.ledger.cost(Full(), length, 1, layers, 0))


@lru_cache(maxsize=2)
def asker(subject: Subject) -> Asker:
    """The process's engine over a model, created once per dtype of keys and values: one for the
    full cache, one for quantized entries."""
    return Asker(subject)
