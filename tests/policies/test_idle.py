"""Steps in which a policy says nothing can be due may be left out: asked in each, it says no."""

from __future__ import annotations

from typing import Any

import pytest

from pyramidinfer import SamplingParams
from pyramidinfer.cache import Pool
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.tracing import trace
from pyramidinfer.models import evicting, runner
from pyramidinfer.models.batch import Sequence
from pyramidinfer.models.stack import Stack
from pyramidinfer.policies import POLICIES, make_policy
from pyramidinfer.types import Trace
from tests.engine.build import SMALL
from tests.tiny import random_prompt, tiny_model

EVICTING = sorted(name for name, kind in POLICIES.items() if kind.evicts)
NEW = 60
#: Heads of one size, and so large that they make room for several tokens at once.
EVEN: dict[str, dict[str, Any]] = {"pyramid": {"safeguard": 1.0, "propagate_ratio": None}}


def engine(name: str, family: str, keep: float | None = 0.5, **options: Any) -> Engine:
    options = {**SMALL.get(name, {}), **options}
    config = EngineConfig(kv_memory="8MiB", page_size=4)
    return Engine(tiny_model(family), make_policy(name, keep, **options), config)


def traced(name: str, family: str, length: int, protect: Any) -> Trace:
    return trace(engine(name, family), random_prompt(length, length), NEW, protect)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Count how often evictions are looked into; ``asked.always()`` makes it every step."""

    class Asked:
        count, in_every_step = 0, False

        def always(self) -> None:
            self.count, self.in_every_step = 0, True

    found, evict = Asked(), evicting.evict

    def counted(stack: Stack, pool: Pool, sequence: Sequence) -> None:
        found.count += 1
        evict(stack, pool, sequence)
        if found.in_every_step:
            sequence.idle = 0

    monkeypatch.setattr(runner, "evict", counted)
    return found


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("protect", [(), [(10, 30), (33, 34)]], ids=["free", "protected"])
@pytest.mark.parametrize("length", [5, 90, 200])
def test_asking_in_every_step_changes_nothing(
    name: str, family: str, protect: Any, length: int, asked: Any
) -> None:
    """Entries of every layer and head, lengths at every step, tokens and logits."""
    protect = [(start, min(stop, length)) for start, stop in protect if start < length]
    seldom = traced(name, family, length, protect)
    few = asked.count
    asked.always()
    always = traced(name, family, length, protect)
    assert few <= asked.count == NEW
    assert seldom.kept_len_by_step == always.kept_len_by_step
    assert seldom.token_ids == always.token_ids
    assert seldom.final_logits.equal(always.final_logits)
    for one, other in zip(seldom.kept_positions, always.kept_positions, strict=True):
        assert all(mine.equal(its) for mine, its in zip(one, other, strict=True))


@pytest.mark.parametrize("name", EVICTING)
def test_further_turns_and_forgotten_tokens(name: str, asked: Any) -> None:
    """After a turn is taken back and another one taken in."""

    def serve() -> list[Any]:
        made, found = engine(name, "llama"), []
        params = SamplingParams(max_tokens=25, ignore_eos=True)
        request = made.add(random_prompt(1, 70), params, hold=True)
        for turn in range(3):
            while request.finish_reason is None:
                made.step()
                found.append(request.table.kept.tolist())
            found.append(list(request.output))
            if turn == 1 and request.cache is not None:
                try:
                    made.truncate(request, request.table.seen_len - 7)
                except ValueError as error:  # heads keep different tokens
                    found.append(str(error))
            request = made.extend(request, random_prompt(turn, 30), params, hold=True)
        made.abort(request)
        made.release(request)
        return found

    seldom = serve()
    few = asked.count
    asked.always()
    assert serve() == seldom
    assert few <= asked.count


def test_there_are_steps_left_out(asked: Any) -> None:
    """Methods that evict every so many tokens are asked about as often."""
    for name in ("pyramid", "pyramidinfer", "rkv", "triattention"):
        asked.count = 0
        trace(engine(name, "llama", **EVEN.get(name, {})), random_prompt(200, 200), NEW, ())
        assert asked.count < NEW / 2, name
