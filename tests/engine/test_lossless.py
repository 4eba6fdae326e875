"""Lossless requests: guesses change how many steps an answer takes, and nothing of the answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats

from pyramidinfer import SamplingParams, StructuredOutputsParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.engine.checks import check_ahead
from pyramidinfer.engine.drafting import Drafter
from pyramidinfer.engine.gauge import LOSS, Gauge, Load, memory_bound
from pyramidinfer.engine.request import Request
from pyramidinfer.models.draft_view import DraftView
from pyramidinfer.policies import Lossless, choose_policy, make_policy
from pyramidinfer.types import Keep, TokenIds
from tests.engine.build import bound_policy, policy_named
from tests.engine.serving import NAMES, after, alone, finish, model, queue, start, step, talk
from tests.native.test_company import DTYPES
from tests.server.live import tiny_llm
from tests.tiny import random_prompt

FIRST = torch.tensor([0])
REFUSED = ("h2o", "kvzip")
VIEWS = [name for name in NAMES if name not in (*REFUSED, "full")]
SIZES = [(90, 30), (3, 41), (150, 25), (41, 33), (1, 40)]


def drafted_by(name: str, family: str = "llama", dtype: torch.dtype = torch.float64) -> Lossless:
    """Lossless with what a policy keeps of a tiny model's cache as the view of drafts."""
    return Lossless(bound_policy(name, family, dtype))


def begin(
    name: str = "snapkv", family: str = "llama", steps: int | None = 3, **options: Any
) -> Engine:
    dtype = options.get("dtype", torch.float64)
    return start(drafted_by(name, family, dtype), family, draft_tokens=steps, **options)


def run(engine: Engine, **params: Any) -> list[Request]:
    """Ragged requests, some of which join midway, to their end."""
    requests = []
    for number, (length, new) in enumerate(SIZES):
        requests.append(queue(engine, random_prompt(number, length), new, **params))
        step(engine)
        step(engine)
    finish(engine)
    return requests


def outputs(requests: list[Request]) -> list[TokenIds]:
    return [each.output for each in requests]


# --- the answer is the full cache's --------------------------------------------------------------


@pytest.mark.parametrize(
    "name,family",
    [
        *(("snapkv", each) for each in ("llama", "gemma3_text", "phi3", "mistral", "opt", "qwen2")),
        *(("pyramid", each) for each in ("llama", "gemma3_text", "opt")),
    ],
)
def test_the_full_cache_answers(name: str, family: str) -> None:
    """Whatever was guessed, in ragged batches that others join, and in fewer steps."""
    engine = begin(name, family)
    found = run(engine)
    expected = [alone("full", family, i, *size) for i, size in enumerate(SIZES)]
    assert outputs(found) == expected
    drafter = engine.drafter
    assert 0 < drafter.accepted <= drafter.drafted
    reads_all = all(shape.window for shape in engine.runner.shapes)  # windows bound drafts too
    assert reads_all or drafter.accepted < drafter.drafted
    assert all(each.drafting is not None and each.drafting.verifications for each in found)
    assert drafter.drafted == sum(each.drafting.drafted for each in found if each.drafting)


@pytest.mark.parametrize("name", VIEWS)
def test_any_policy_may_choose_what_drafts_read(name: str) -> None:
    engine = begin(name)
    assert outputs(run(engine)) == [
        alone("full", "llama", i, *size) for i, size in enumerate(SIZES)
    ]
    assert engine.drafter.drafted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_to_the_last_bit(dtype: torch.dtype, kv_dtype: str) -> None:
    """Log-probabilities too, where the kernels promise bits that do not depend on company."""
    wanted = {"logprobs": 3}
    full = start("full", dtype=dtype, kv_dtype=kv_dtype)
    engine = begin(dtype=dtype, kv_dtype=kv_dtype)
    expected, found = run(full, **wanted), run(engine, **wanted)
    assert outputs(found) == outputs(expected)
    assert [each.logprobs for each in found] == [each.logprobs for each in expected]
    assert engine.drafter.accepted


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_to_the_last_bit_beside_a_window(family: str) -> None:
    """Nothing is verified beyond the point at which entries leave the window."""
    answers = []
    for policy in ("full", Lossless(make_policy("streaming_llm", 0.3))):
        options = {"dtype": torch.float32, "page_size": 16, "draft_tokens": 8}
        found = run(start(policy, family, **options), logprobs=1)
        answers.append([(each.output, each.logprobs) for each in found])
    assert answers[0] == answers[1]


class Raises:
    """A form that cannot tell what may follow a token."""

    done = False

    def __init__(self, left: int) -> None:
        self.left = left

    def allowed(self, vocab_size: int) -> torch.Tensor:
        return torch.ones(vocab_size, dtype=torch.bool)

    def accept(self, token: int) -> int:
        self.left -= 1
        if self.left < 0:
            raise ValueError("no such token")
        return token

    def copy(self) -> Raises:
        return Raises(self.left)


def test_a_form_that_raises_ends_its_own_request() -> None:
    """Where plain decoding would, and not where it was only guessed."""
    engine = begin(steps=6)
    mine, other = (queue(engine, random_prompt(i, 40), 30) for i in range(2))
    mine.constraint = Raises(9)
    engine.scheduler.remove(mine)
    engine.submit(mine)
    finish(engine)
    assert (mine.finish_reason, len(mine.output)) == ("error", 9)
    assert mine.output == alone("full", "llama", 0, 40, 30)[:9]
    assert other.output == alone("full", "llama", 1, 40, 30)


@pytest.mark.parametrize("steps", [0, 1, 8, None])
def test_however_many_are_guessed(steps: int | None) -> None:
    engine = begin(steps=steps)
    assert outputs(run(engine)) == [
        alone("full", "llama", i, *size) for i, size in enumerate(SIZES)
    ]
    assert bool(engine.drafter.drafted) == (steps != 0)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.9, "seed": 5},
        {"temperature": 1.3, "seed": 6, "top_p": 0.8, "top_k": 30, "min_p": 0.02},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.8, "seed": 1},
        {"logit_bias": {7: 4.0}, "min_tokens": 12},
        {"stop_token_ids": (9, 30, 44, 71)},
    ],
    ids=str,
)
def test_with_every_way_to_choose(params: dict[str, Any]) -> None:
    """Sampled answers are the full cache's for the same seed."""
    found, expected = run(begin(), **params), run(start("full"), **params)
    assert outputs(found) == outputs(expected)
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]


def test_with_others_in_the_same_step() -> None:
    """Requests of other policies, and prompts in progress, are what they are without."""
    engine, names = begin("pyramid", prefill_chunk=16, step_tokens=40), ("pyramid", "full", "tova")
    mine = queue(engine, random_prompt(0, 90), 30)
    others = [
        queue(engine, random_prompt(1 + i, 40), 20, policy_named(name))
        for i, name in enumerate(names)
    ]
    finish(engine)
    assert mine.output == alone("full", "llama", 0, 90, 30)
    for i, (name, other) in enumerate(zip(names, others, strict=True)):
        assert other.output == alone(name, "llama", 1 + i, 40, 20)
        assert other.drafting is None


def test_samples_of_one_prompt() -> None:
    answers = []
    for engine in (begin(), start("full")):
        first = queue(engine, random_prompt(0, 50), 20, samples=4, temperature=1.0, seed=3)
        finish(engine)
        answers.append(outputs([first, *first.samples]))
    assert answers[0] == answers[1]
    assert len({tuple(each) for each in answers[0]}) == 4


def test_the_joint_of_three_tokens_is_the_models() -> None:
    """Without a seed: chi-squared over 20,000 answers, 3 likeliest tokens at each place."""
    hot, top = 1.5, 3
    engine = begin(steps=2, dtype=torch.float32, max_requests=200)
    prompt = random_prompt(4, 20)

    def after_text(text: TokenIds) -> dict[int, float]:
        with torch.no_grad():
            logits = model("llama", torch.float32)(torch.tensor([text])).logits[0, -1] / hot
        best = logits.topk(top)
        return dict(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))

    expected = {
        (a, b, c): p * q * r
        for a, p in after_text(prompt).items()
        for b, q in after_text([*prompt, a]).items()
        for c, r in after_text([*prompt, a, b]).items()
    }
    found = dict.fromkeys(expected, 0)
    for _ in range(100):
        first = queue(engine, prompt, 3, samples=200, temperature=hot, top_k=top)
        while not engine.scheduler.idle:
            engine.step()
        for each in (first, *first.samples):
            found[tuple(each.output)] += 1
    assert engine.drafter.accepted > 1000
    draws = sum(found.values())
    assert draws == 20_000
    usual = [key for key, chance in expected.items() if chance * draws >= 5]
    rare = [key for key in expected if key not in usual]
    counts = [[table[key] for key in usual] for table in (found, expected)]
    counts[0].append(sum(found[key] for key in rare))
    counts[1].append(sum(expected[key] for key in rare))
    if not counts[1][-1]:
        counts = [each[:-1] for each in counts]
    chances = [each * draws for each in counts[1]]
    assert stats.chisquare(counts[0], chances, sum_check=False).pvalue > 1e-4


def test_a_form_binds_guesses_too() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    answers = []
    for lossless in (False, True):
        llm = tiny_llm("snapkv" if lossless else "full", None, lossless=lossless, draft_tokens=4)
        params = [
            SamplingParams(
                max_tokens=50,
                temperature=1.0,
                seed=seed,
                structured_outputs=StructuredOutputsParams(json=schema),
            )
            for seed in range(4)
        ]
        answers.append([each.text for each in llm.generate(["Who ?"] * 4, params)])
        llm.engine.check()
    assert answers[0] == answers[1]
    assert llm.engine.drafter.accepted


def test_stop_strings_end_inside_a_draft() -> None:
    answers = []
    for lossless in (False, True):
        llm = tiny_llm("snapkv" if lossless else "full", None, lossless=lossless, draft_tokens=6)
        params = SamplingParams(max_tokens=60, stop=("e", "ab", "z"), ignore_eos=True, min_tokens=9)
        (out,) = llm.generate("Who is there and what ?", params)
        assert out.finish_reason == "stop"
        answers.append((out.text, out.token_ids))
        llm.engine.check()
    assert answers[0] == answers[1]


# --- what may happen meanwhile -------------------------------------------------------------------


@pytest.mark.parametrize("preempt", ["swap", "recompute"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_preempted(family: str, preempt: str) -> None:
    """What drafts read outlives a move to host memory, and pages never run short."""
    roomy = begin(family=family)
    sizes = [(60, 40), (50, 40), (40, 40), (30, 40), (20, 50), (60, 50)]
    most = max(
        roomy.make(random_prompt(0, length), SamplingParams(max_tokens=new)).cost.bytes
        for length, new in sizes
    )
    size = roomy.pool.layout.page_bytes[0]
    engine = begin(
        family=family,
        steps=8,
        admission="overcommit",
        preempt=preempt,
        kv_memory=(most // size + 1) * size,
        expected_output=0.0,
    )
    mine = [queue(engine, random_prompt(i, *size[:1]), size[1]) for i, size in enumerate(sizes)]
    finish(engine)
    assert outputs(mine) == [alone("full", family, i, *size) for i, size in enumerate(sizes)]
    done = engine.scheduler.counts
    assert (done.recomputed if preempt == "recompute" else done.swapped) > 0
    assert engine.drafter.accepted


def test_nothing_beyond_what_is_reserved() -> None:
    """``step`` checks reservations after every step, sliding windows included."""
    for family in ("gemma3_text", "mistral", "qwen2"):
        engine = begin(family=family, steps=8)
        mine = [queue(engine, random_prompt(i, 30), 60) for i in range(4)]
        finish(engine)
        assert outputs(mine) == [alone("full", family, i, 30, 60) for i in range(4)]


def test_aborted_between_steps() -> None:
    engine = begin()
    mine, other = (queue(engine, random_prompt(i, 40), 30) for i in range(2))
    while len(mine.output) < 8:
        step(engine)
    engine.abort(mine)
    finish(engine)
    assert mine.output == alone("full", "llama", 0, 40, 30)[: len(mine.output)]
    assert other.output == alone("full", "llama", 1, 40, 30)


@pytest.mark.parametrize("where", ["draft", "forward", "choose"])
def test_a_step_that_raises_is_taken_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While guessing, while verifying, and after some of the guesses were accepted."""
    engine = begin(steps=4)
    mine, other = (queue(engine, random_prompt(i, 40), 30) for i in range(2))
    while len(mine.output) < 8:
        step(engine)
    target: Any = engine.committer if where == "choose" else engine.runner
    real, calls = getattr(target, where), []

    def fails(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 3 or where == "forward":
            raise RuntimeError("once")
        return real(*values)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="once"):
        patch.setattr(target, where, fails)
        engine.step()
    engine.pool.check()
    finish(engine)
    assert mine.output == alone("full", "llama", 0, 40, 30)
    assert other.output == alone("full", "llama", 1, 40, 30)


def test_turns_of_a_conversation() -> None:
    """A cache is reused by the next turn, whose drafts read what is chosen anew."""
    engine, fresh = begin(), start("full")
    text = random_prompt(1, 60)
    for number in range(2, 5):
        turn = talk(engine, text, 12)
        assert turn.output == talk(fresh, text, 12, owner=None).output
        assert bool(turn.reused) == (number > 2)
        text = after(turn, number)
    engine.conversations.clear()
    engine.check()


def test_extended_truncated_and_branched() -> None:
    engine, full = begin(), start("full")
    params = SamplingParams(max_tokens=15, ignore_eos=True)
    answers = []
    for each in (engine, full):
        held = each.add(random_prompt(1, 60), params, hold=True)
        finish(each)
        each.truncate(held, 64)
        branches = [each.branch(held, random_prompt(i, 5), params) for i in (2, 3)]
        for branch in branches:
            each.submit(branch)
        finish(each)
        turn = each.extend(held, random_prompt(4, 7), params)
        finish(each)
        answers.append(outputs([*branches, turn]))
        each.check()
    assert answers[0] == answers[1]


def test_broken_logits_end_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = begin()
    mine, other = (queue(engine, random_prompt(i, 40), 20) for i in range(2))
    while len(mine.output) < 5:
        step(engine)
    real = engine.runner.forward

    def broken(*values: Any) -> Any:
        stepped = real(*values)
        return stepped._replace(logits=stepped.logits.clone().index_fill_(0, FIRST, torch.nan))

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "forward", broken)
        assert engine.step() == [mine]
    assert mine.finish_reason == "error"
    finish(engine)
    assert other.output == alone("full", "llama", 1, 40, 20)


# --- who guesses ---------------------------------------------------------------------------------


def test_what_the_text_says_already_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that repeats itself: guesses come from it, without the model."""
    monkeypatch.setattr(Drafter, "_guess", lambda *values: {})
    engine = begin(steps=6)
    mine = queue(engine, random_prompt(1, 12), 150, repetition_penalty=0.7)
    finish(engine)
    assert mine.output == alone("full", "llama", 1, 12, 150, repetition_penalty=0.7)
    assert mine.drafting is not None and list(mine.drafting.rates) == ["lookup"]
    assert mine.drafting.accepted > 5
    assert not mine.drafting.places


def took(
    gauge: Gauge, cost: float, load: Load, counts: Any, guessing: float, seconds: float, tokens: int
) -> None:
    """As if a step took a second, and making and verifying a guess ``cost`` each."""
    made = max(counts["view"], default=0)
    Gauge.ran(gauge, load, counts, cost * made, 1.0 + cost * made, tokens)


def test_what_drafts_may_lose() -> None:
    """A drafter that seems to pay may lose some steps; then it waits until it may again."""
    costs: dict[Any, float] = {"plain": 1.0, "verify": 0.6, "view": 0.7}
    gauge, two = Gauge(lambda load: costs), Load(2, 20)
    assert not gauge.is_known(two) and gauge.cost("view", two) == pytest.approx(1.3)
    for _ in range(3):
        gauge.ran(two, {"view": [], "lookup": []}, 0.0, 0.1, 2)
    assert gauge.is_known(two) and not gauge.is_known(Load(2, 21))
    assert gauge.covers("view") and not gauge.covers("view", 0.3)
    steps = 0
    while not gauge.covers("view", 0.3):
        gauge.begin()
        steps += 1
    assert steps == pytest.approx(0.3 / LOSS, abs=1)
    assert gauge.covers("view")
    for _ in range(2):  # three times as long, and no token more
        gauge.ran(two, {"view": [2, 2], "lookup": []}, 0.1, 0.2, 2)
    assert not gauge.covers("view") and gauge.covers("lookup")
    assert gauge.verifying(two) == pytest.approx(0.5)
    assert gauge.cost("view", two) == pytest.approx(1.0)
    assert gauge.cost("view", Load(3, 22)) == pytest.approx(1.0)  # of the most similar load
    for _ in range(9):  # three times as many tokens in half the time
        gauge.ran(two, {"view": [2, 2], "lookup": []}, 0.02, 0.03, 6)
    assert gauge.covers("view") and gauge.covers("view", 99.0)


def test_costs_before_they_are_measured() -> None:
    """Grouped heads on a CPU cannot be expected to pay; memory-bound attention can."""

    def best(cache: float, group: int, on_gpu: bool = False, rate: float = 0.85) -> float:
        costs = memory_bound(cache, 0.1, group, on_gpu)
        each = costs["verify"] + costs["view"]
        return max(sum(rate**n for n in range(c + 1)) / (1 + c * each) for c in range(9))

    assert best(2.3, 3) == 1
    assert best(5.6, 1) > 1.1 and best(2.3, 3, on_gpu=True) > 1.3 and best(0.1, 1) == 1


def test_nothing_is_guessed_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what was measured: drafts that cost as much as steps are given up, and tried again
    rarely; cheap ones that are right are made."""
    engine = begin("streaming_llm", steps=None)
    drafter, counts = engine.drafter, {}
    monkeypatch.setattr(Drafter, "_look_up", lambda *values: [])
    for cost in (1.0, 0.01):
        mine = queue(engine, random_prompt(7, 40), 150)
        before = drafter.drafted
        drafter.gauge = gauge = Gauge(drafter._assumed)
        monkeypatch.setattr(gauge, "ran", partial(took, gauge, cost))
        finish(engine)
        counts[cost] = drafter.drafted - before
        assert mine.output == alone("full", "llama", 7, 40, 150)
    assert counts[1.0] < 30 < 100 < counts[0.01]


def test_nothing_is_tried_beside_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such steps are not measured: they charge no account, and so give none more time."""
    engine = begin("streaming_llm", steps=None, prefill_chunk=16, step_tokens=20)
    drafter, begun = engine.drafter, []
    costs: dict[Any, float] = {"plain": 1.0, "verify": 0.6, "view": 0.7}
    drafter.gauge = gauge = Gauge(lambda load: costs)
    monkeypatch.setattr(gauge, "is_known", lambda load: True)
    monkeypatch.setattr(gauge, "covers", lambda by, loss=None: True)
    monkeypatch.setattr(gauge, "begin", lambda: begun.append(1))
    monkeypatch.setattr(Drafter, "_look_up", lambda *values: [])
    queue(engine, random_prompt(0, 30), 40)
    while engine.scheduler.prefilling or not engine.scheduler.running:
        step(engine)
    queue(engine, random_prompt(1, 150), 3)
    step(engine)
    while engine.scheduler.prefilling:
        assert not begun and not drafter.drafted
        step(engine)
    finish(engine)
    assert begun and drafter.drafted


def test_what_drafts_read() -> None:
    """The pages with most of what is kept, as many as it fills, the first one, all later ones."""
    engine = start("full")
    request = engine.add(random_prompt(0, 31), SamplingParams(max_tokens=9, ignore_eos=True))
    while len(request.output) < 3:
        engine.step()
    table, view = request.table, DraftView(4, 2)
    lens = table.kept[1].copy()
    kept = torch.tensor([[0, 9, 10, 11, 20, 21, 24, 25], [1, 2, 3, 12, 13, 14, 16, 17]])
    view.note(1, Keep(kept, torch.tensor([8, 5])), lens, 4, table.seen_len)
    pages, lengths = view.read(table, 4)
    own = table.pages[1]
    assert lengths[1].tolist() == [2 * 4 + lens[0] % 4, 2 * 4 + lens[1] % 4]
    assert pages[1, 0, :2].tolist() == own[0, [0, 2]].tolist()
    assert pages[1, 1, :2].tolist() == own[1, [0, 3]].tolist()
    assert pages[1, 0, 2] == own[0, lens[0] // 4]
    assert lengths[0].tolist() == table.kept[0].tolist()  # nothing was said of it: all is read
    assert (
        pages[0, 0, : table.held[0, 0]].tolist() == table.pages[0, 0, : table.held[0, 0]].tolist()
    )
    skipped = sum(int(lens[head]) - int(lengths[1, head]) for head in range(2))
    entries = int(table.kept[0, 0])
    assert view.share(entries, 4) == pytest.approx(1 - skipped / (4 * 2 * entries))


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_policies_that_cannot_choose(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*cannot choose what drafts read"):
        choose_policy(name, 0.3, lossless=True)


def test_options_that_cannot_be() -> None:
    for value, words in ((-1, "at least 0"), (9, "at most 8"), (True, "whole number")):
        with pytest.raises(ValueError, match=f"draft_tokens={value}.*{words}"):
            start("full", draft_tokens=value)
    with pytest.raises(
        ValueError, match="draft_tokens=2 has no effect with admission='overcommit'"
    ):
        start("full", draft_tokens=2, admission="overcommit", page_size=1)
    with pytest.raises(ValueError, match="lossless works on one rank, and this is 2"):
        check_ahead(choose_policy("snapkv", lossless=True), EngineConfig(tensor_parallel_size=2))


def test_what_drafts_read_by_default() -> None:
    assert choose_policy("full", lossless=True) == choose_policy("pyramid", lossless=True)
    assert choose_policy("pyramid", lossless=True) == Lossless(make_policy("pyramid", 0.1))
    assert choose_policy("pyramid", 0.3, lossless=True) == Lossless(make_policy("pyramid", 0.3))
    assert choose_policy("snapkv", lossless=True) == Lossless(make_policy("snapkv", 0.1))
    assert choose_policy("snapkv", 0.2, lossless=True).rule.startswith("nothing is dropped")
    assert choose_policy("snapkv", 0.2) == make_policy("snapkv", 0.2)
