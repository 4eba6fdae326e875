"""One engine over a model, asked under any policy, in the two protocols of the studies.

*Inside*: context and question go in together, so a policy compresses with the question in view.
*After*: the context is taken in and compressed first and the question goes on from what is left,
as in every further turn of a chat (kvpress measures so).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache

from pyramidinfer.engine import LLM
from pyramidinfer.engine.memory import full_bytes
from pyramidinfer.lab.chat import Asked, Chat
from pyramidinfer.lab.plans import PROTOCOLS, own_keep
from pyramidinfer.lab.samples import Subject
from pyramidinfer.policies import Full, Policy
from pyramidinfer.policies.base import KeepError
from pyramidinfer.policies.registry import parse_policy
from pyramidinfer.types import KVUsage, Layers, SamplingParams, TokenIds

__all__ = ["PROTOCOLS", "Answer", "Asker", "asker", "own_keep", "reachable"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out.

    kv : inside: the cache when the answer was done; after: the compressed context's.
    computed_share : layer-tokens of the prompt (after: of the context) that were computed.
    """

    text: str
    token_ids: TokenIds
    kv: KVUsage
    computed_share: float


def reachable(spec: str, keep: float | None, layers: Layers) -> Policy:
    """The policy of a spec at ``keep``, or at the lowest share it can reach on this depth."""
    policy = parse_policy(spec, keep)
    try:
        policy.check(layers)
    except KeepError as error:
        if keep is not None:
            return parse_policy(spec, min(1.0, error.lowest + 0.005))
    return policy


class Asker:
    """A loaded model, asked under one policy after the other."""

    def __init__(self, subject: Subject) -> None:
        self.llm: LLM = subject.llm(Full(), slot_scores=True)
        self.chat = Chat(self.llm.tokenizer)
        runner = self.llm.engine.runner
        self._layers = Layers((True,) * runner.depth, runner.kv_heads)

    def policy(self, spec: str, keep: float | None) -> Policy:
        """The policy of a spec (``NAME`` or ``NAME:option=value,…``) bound to the model.

        A ``keep`` of its own holds; else it is at ``keep``, or the lowest share that it can
        reach on the model's depth.
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
        raise ValueError(f"protocol {protocol!r} is none of {', '.join(PROTOCOLS)}")

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
        """How many contexts to hold together: each may be there twice, when its copy is written."""
        engine = self.llm.engine
        whole = full_bytes(engine.pool.layout, engine.runner, longest)
        return max(1, min(8, engine.pool.budget // (3 * whole)))


@lru_cache(maxsize=2)
def asker(subject: Subject) -> Asker:
    """The process's engine over a model, made once: the full cache's, and one whose keys and values
    are stored in other bits."""
    return Asker(subject)
