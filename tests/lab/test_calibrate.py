"""Calibration: what is asked, the start that is found, and the profile that is written."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pyramidinfer import LLM
from pyramidinfer.cli.app import main
from pyramidinfer.engine import passages, profiling
from pyramidinfer.engine.profiling import find_profile
from pyramidinfer.lab import calibrate as lab
from pyramidinfer.lab.calibrate import INSIDE, Measured, Task, calibrate, make_samples, plans
from pyramidinfer.lab.long_facts import KINDS, SHORT, invent_long
from pyramidinfer.lab.samples import Corpus, Subject
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies import Full, Pyramid
from pyramidinfer.policies.profile import Fingerprint, Profile
from pyramidinfer.types import Layers
from tests.lab import english_model
from tests.lab.test_samples import CORPORA, OTHER, SHIPPED, other_tokenizer
from tests.tiny import tiny_model

DEPTH, OWN = 12, 10  # the shipped model's layers, and its profile's own start
TASK = Task(Subject(kv_memory="32MiB"), context=300, samples=2, passages=1)


def holds(ids: list[int], part: list[int]) -> bool:
    return any(ids[at : at + len(part)] == part for at in range(len(ids) - len(part) + 1))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return TASK.subject.llm(Full())


@pytest.fixture(scope="module")
def profile(llm: LLM) -> Profile:
    found = find_profile(llm.engine.shared)
    assert found is not None
    layers = Layers((True,) * DEPTH, llm.engine.runner.kv_heads)
    assert Pyramid(profile=replace(found, calibrated=None)).begin(layers) == OWN
    return found


# --- what is asked --------------------------------------------------------------------------------


def templated() -> Corpus:
    tokenizer = other_tokenizer()
    tokenizer.chat_template = english_model.TEMPLATE
    return Corpus(tokenizer, None)


@pytest.mark.parametrize("name", [*CORPORA, "template"])
def test_the_text_ends_where_its_questions_begin(name: str) -> None:
    """So that nothing of a question is seen when the text is compressed."""
    corpus = templated() if name == "template" else CORPORA[name]
    found = make_samples(corpus, replace(TASK, samples=3))
    assert len(found) == 3 and len({tuple(each.context) for each in found}) == 3
    for each in found:
        wholes = [len(each.context) + len(question.rest) for question in each.questions]
        assert len(wholes) == len(KINDS) and max(wholes) <= TASK.context <= max(wholes) + 2
        for question in each.questions:
            assert not holds(each.context, question.rest[:6])


def test_facts_of_all_kinds_are_told_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    invented: list[Any] = []
    monkeypatch.setattr(
        lab, "invent_long", lambda rng: invented.append(invent_long(rng)) or invented[-1]
    )
    (sample,) = make_samples(templated(), replace(TASK, samples=1))
    (facts,) = invented
    assert tuple(fact.kind for fact in facts) == KINDS
    chat = templated().chat
    for fact, question in zip(facts, sample.questions, strict=True):
        assert holds(sample.context, chat.encode(fact.statement))
        assert holds(question.rest, chat.encode(fact.question))
        assert question.rest[-2:] == chat.encode(fact.opening)[-2:], "the answer's first words"
        assert question.kind == fact.kind
        said = f"{', '.join(reversed(fact.values))}."
        assert question.is_right(said) and not question.is_right("no idea")
        assert question.params.max_tokens > len(chat.encode(said))


def test_every_answer_but_one_is_long() -> None:
    """No place or person in two facts, and no part of a value is an answer."""
    for seed in range(50):
        facts = invent_long(random.Random(seed))
        for fact in facts:
            assert all(
                each.statement.count(value) == (each is fact)
                for each in facts
                for value in fact.values
            )
            assert fact.statement.startswith(fact.opening) and fact.statement.endswith(".")
            whole = ", ".join(fact.values)
            assert (len(whole) >= 12) or fact.kind == SHORT
            assert fact.is_in(whole.upper()) and not fact.is_in(whole[:-1])
            assert not fact.is_in("x" + whole)


def test_kinds_are_asked_in_the_prompt_in_turn() -> None:
    samples = make_samples(templated(), replace(TASK, samples=6))
    asked = [each.kind for at, sample in enumerate(samples) for each in sample.inside(at)]
    assert len(asked) == 6 * INSIDE and {asked.count(kind) for kind in KINDS} == {INSIDE}


def test_generated_documents_answer_word_for_word() -> None:
    (sample,) = make_samples(SHIPPED, replace(TASK, samples=1))
    said = SHIPPED.tokenizer.decode(sample.context)
    for question in sample.questions:
        answer = question.is_right.args[0]  # type: ignore[attr-defined]
        assert answer in said and question.is_right(answer) and not question.is_right("")
        assert SHIPPED.tokenizer.convert_ids_to_tokens(question.rest)[-2:] == [
            "<end>",
            "<assistant>",
        ]


@pytest.mark.parametrize("corpus", [SHIPPED, OTHER])
def test_samples_are_none_of_a_studys(corpus: Corpus) -> None:
    mine = make_samples(corpus, TASK)
    assert [each.context for each in mine] == [each.context for each in make_samples(corpus, TASK)]
    others = make_samples(corpus, replace(TASK, seed=1))
    assert not {tuple(each.context) for each in mine} & {tuple(each.context) for each in others}
    for needle in corpus.needles(TASK.seed, 10, TASK.context):
        assert all(needle.prompt[20:60] != each.context[20:60] for each in mine)


def test_quick_is_a_third() -> None:
    task = Task(Subject())

    def tokens(each: Task) -> int:
        return ((1 + INSIDE) * each.samples + each.passages) * each.context

    assert 0.25 < tokens(task.quick()) / tokens(task) < 0.4
    assert task.quick().keep == task.keep
    for keep in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"--keep {keep} must lie between 0 and 1"):
            Task(Subject(), keep)


# --- the start that is found ----------------------------------------------------------------------


def test_what_is_free() -> None:
    """No kind loses an answer, in neither protocol, however many others win; nor is text worse."""

    def found(kl: float, **wrong: int) -> Measured:
        return Measured(Counter({(kind, "later"): n for kind, n in wrong.items()}), 0.5, kl, 0.5)

    whole = found(0.1, key=2, names=1)
    assert whole.is_free(whole) and found(0.1).is_free(whole)
    assert found(1.25 * 0.1 + 0.005, key=2).is_free(whole)
    assert not found(0.1, key=3).is_free(whole) and not found(0.1, short=1).is_free(whole)
    inside = Measured(Counter({("key", "inside"): 1}), 0.9, 0.1, 0.5)
    assert not inside.is_free(whole)
    assert not found(0.131).is_free(whole) and found(0.004).is_free(found(0.0))


class Synthetic:
    """Stands in for the model: from which start on each share is free."""

    def __init__(self, patch: pytest.MonkeyPatch, free: dict[float, int], knows: str = "key"):
        self.free = free
        self.asked = Counter({(kind, "later"): 4 for kind in (SHORT, "key", "names")})
        self.wrong = Counter({each: 4 for each in self.asked if each[0] != knows})
        self.plans: list[tuple[int | None, float | None]] = []
        patch.setattr(lab, "_Runs", lambda llm, task: self)

    def measure(
        self, policy: Pyramid, advance: Callable[[float], None], whole: Measured | None = None
    ) -> Measured:
        advance(TASK.parts)
        start, share = policy.start_layer, policy.propagate_ratio
        self.plans.append((start, share))
        assert getattr(policy.profile, "calibrated", None) is None
        assert (policy.keep, policy.min_context) == (0.3, 1), "shares are of the text as it is"
        if start is None or share is None:
            return Measured(self.wrong, 0.75, 0.01, 0.9)
        wrong = Counter(self.wrong)
        wrong["key", "later"] += start < self.free.get(share, DEPTH)
        return Measured(wrong, 0.75, 0.01, (start + share * (DEPTH - start)) / DEPTH)


@pytest.mark.parametrize("early", range(OWN + 1))
def test_the_earliest_start_is_found(
    early: int, llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Synthetic(monkeypatch, {0.2: early})
    found = calibrate(llm, profile, TASK, progress=False).calibrated
    assert found is not None
    wanted = (early, 0.2) if early < OWN else (OWN, 1.0)
    assert (found.start_layer, found.propagate_ratio) == wanted
    assert len(run.plans) == len(set(run.plans)) <= plans(OWN), "nothing is measured twice"
    assert (found.keep, found.context, found.questions, found.passages) == (0.3, 300, 16, 1)


def test_what_computes_least_wins(
    llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, wanted in (({0.2: 5, 0.4: 4}, (5, 0.2)), ({0.2: 7, 0.4: 1}, (1, 0.4))):
        Synthetic(monkeypatch, free)
        found = calibrate(llm, profile, TASK, progress=False).calibrated
        assert found is not None and (found.start_layer, found.propagate_ratio) == wanted
        assert found.score == 1 and found.computed < 0.9


def test_where_nothing_is_free_the_profiles_own_start_stands(
    llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    Synthetic(monkeypatch, {})
    made = calibrate(llm, profile, TASK, progress=False)
    assert made.calibrated is not None
    assert (made.calibrated.start_layer, made.calibrated.propagate_ratio) == (OWN, 1.0)
    assert (made.calibrated.score, made.calibrated.computed) == (1.0, 0.9)
    layers = Layers((True,) * DEPTH, llm.engine.runner.kv_heads)
    with_it, without = (
        Pyramid(keep=0.3, profile=each) for each in (made, replace(made, calibrated=None))
    )
    assert with_it.limits(2000, layers) == without.limits(2000, layers)
    for layer in range(DEPTH - 1):
        assert with_it.going(layer, 2000, layers) == without.going(layer, 2000, layers)


def test_a_start_is_a_layer_that_may_drop_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers with a sliding window drop none, so a plan that starts there is another one's."""
    llm = LLM(tiny_model("gemma3_text"), policy="full", kv_memory="8MiB")
    share = tuple((0.5, 0.4) if layer in (2, 5) else (0.0, 0.0) for layer in range(6))
    profile = Profile(
        share, (False, False, True) * 2, "a text", (9,), 0.9, 0.2, "x", Fingerprint("k", (), ())
    )
    for early, wanted in ((0, (2, 0.2)), (3, (5, 1.0))):
        run = Synthetic(monkeypatch, {0.2: early})
        found = calibrate(llm, profile, TASK, progress=False).calibrated
        assert found is not None and (found.start_layer, found.propagate_ratio) == wanted
        assert run.plans == [(None, None), (2, 0.2), (2, 0.4)]


class Bar:
    """Stands in for the bar, and is told of each step."""

    def __init__(self, title: str, work: int, wanted: bool | None) -> None:
        self.work, self.done = work, 0.0

    def __enter__(self) -> Callable[[float], None]:
        return self.advance

    def advance(self, steps: float) -> None:
        self.done += steps

    def __exit__(self, *how: Any) -> None:
        assert self.done == self.work == TASK.parts * plans(OWN)


@pytest.mark.parametrize("free", [{}, {0.2: 0, 0.4: 0}, {0.2: 5, 0.4: 7}])
def test_the_bar_reaches_its_end_and_the_time_is_told_first(
    free: dict[float, int], llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, told = Synthetic(monkeypatch, free), []

    def tell(text: str) -> None:
        told.append((text, len(run.plans)))

    monkeypatch.setattr(lab, "progress_bar", Bar)
    calibrate(llm, profile, TASK, tell=tell)
    assert told == [(f"at most {plans(OWN)} settings, about 0.0 minutes", 1)]


def test_a_model_that_answers_nothing_is_refused(
    llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    for knows in ("nothing", SHORT):
        Synthetic(monkeypatch, {}, knows)
        with pytest.raises(ValueError, match="none of the questions with long .*higher --keep"):
            calibrate(llm, profile, TASK, progress=False)


# --- the shipped model ----------------------------------------------------------------------------


class Made(NamedTuple):
    """What a run returned, and the policy and figures of every plan (None: lost on the way)."""

    profile: Profile
    seen: list[tuple[Pyramid, Measured | None]]


@pytest.fixture(scope="module")
def made(llm: LLM, profile: Profile) -> Made:
    """A calibration that is as small as can be."""
    seen: list[tuple[Pyramid, Measured | None]] = []
    measure = lab._Runs.measure

    def spy(self: Any, policy: Pyramid, advance: Any, whole: Any = None) -> Measured | None:
        seen.append((policy, measure(self, policy, advance, whole)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab._Runs, "measure", spy)
        patch.setattr(lab, "SHARES", (0.4,))
        return Made(calibrate(llm, profile, TASK, progress=False), seen)


def test_what_is_written_is_what_was_measured(made: Made, profile: Profile, tmp_path: Path) -> None:
    found, (_, whole) = made.profile.calibrated, made.seen[0]
    assert found is not None and replace(made.profile, calibrated=None) == replace(
        profile, calibrated=None
    )
    assert Profile.load(made.profile.save(tmp_path / "mine.json")) == made.profile
    wanted = (found.start_layer, found.propagate_ratio)
    (plan,) = (
        each for policy, each in made.seen if (policy.start_layer, policy.propagate_ratio) == wanted
    )
    assert plan is not None and whole is not None and plan.is_free(whole)
    assert found.kl == pytest.approx(plan.kl, abs=1e-5)
    assert found.computed == pytest.approx(plan.computed, abs=1e-4)
    assert found.score == pytest.approx(plan.score / whole.score, abs=1e-4)
    assert whole.score > 0 and whole.kl >= 0


def test_the_policy_runs_by_it(made: Made) -> None:
    """With what was found as it would with the same in its options."""
    found = made.profile.calibrated
    assert found is not None and found.start_layer < OWN
    bare = replace(made.profile, calibrated=None)
    options = {"start_layer": found.start_layer, "propagate_ratio": found.propagate_ratio}
    (prompt,) = [each.context for each in make_samples(SHIPPED, replace(TASK, samples=1))]
    mine, same, own = (
        LLM(shipped_model(), policy, kv_memory="16MiB").trace(prompt)
        for policy in (
            Pyramid(keep=0.3, profile=made.profile, min_context=1),
            Pyramid(keep=0.3, profile=bare, min_context=1, **options),  # type: ignore[arg-type]
            Pyramid(keep=0.3, profile=bare, min_context=1),
        )
    )
    assert mine.computed_by_layer == same.computed_by_layer != own.computed_by_layer
    assert sum(mine.computed_by_layer) < sum(own.computed_by_layer)


def test_what_cannot_be_free_is_not_measured_to_its_end(
    llm: LLM, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text first, then questions that come later, text by text, then those in the prompt."""
    runs, parts = lab._Runs(llm, TASK), []
    whole = Measured(Counter({("fact", "later"): 2, ("fact", "inside"): 1}), 0.8, 0.01, 1.0)
    policy = Pyramid(keep=0.3, profile=profile, min_context=1)
    cases = [
        (0.1, 0, 0, ""),
        (0.01, 3, 0, "l"),
        (0.01, 2, 0, "ll"),
        (0.01, 1, 2, "lli"),
        (0.01, 1, 1, "llii"),
        (0.01, 0, 0, "llii"),
    ]
    for kl, later, inside, asked in cases:
        monkeypatch.setattr(lab, "divergence", lambda *a, kl=kl: kl)
        monkeypatch.setattr(
            runs,
            "_later",
            lambda *a, n=later: parts.append("l") or Counter({("fact", "later"): n}),
        )
        monkeypatch.setattr(
            runs,
            "_inside",
            lambda p, shares, at, n=inside: (
                parts.append("i")
                or shares.append(0.5)
                or Counter({("fact", "inside"): n * (1 - at)})
            ),
        )
        for against in (whole, None):
            steps: list[float] = []
            parts.clear()
            found = runs.measure(policy, steps.append, against)
            assert sum(steps) == TASK.parts
            assert parts == list("llii" if against is None else asked)
            lost = against is not None and (asked != "llii")
            assert (found is None) == lost
            if found is not None:
                assert found.wrong.total() == 2 * later + inside and found.computed == 0.5
                questions = TASK.samples * (len(KINDS) + INSIDE)
                assert found.score == 1 - found.wrong.total() / questions and found.kl == kl


# --- the command ----------------------------------------------------------------------------------


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command in a folder of its own, with a cache of its own and few, short samples."""
    monkeypatch.setattr(profiling, "profiles_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(passages, "LENGTH", 220)
    quick = Task.quick
    monkeypatch.setattr(
        Task, "quick", lambda self: replace(quick(self), context=300, samples=1, passages=1)
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def ran(*words: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["pyramidinfer", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Ran(int(stopped.value.code or 0), *capsys.readouterr())

    return ran


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab, "SHARES", (0.4,))
    small = ("calibrate", "--quick", "--kv-memory", "32MiB")
    code, out, err = run(*small, "-o", "deep/mine.json", "--json")
    assert code == 0, err
    told = json.loads(out)
    found = Profile.load("deep/mine.json")
    assert told["path"] == "deep/mine.json" and told["seconds"] > 0
    assert Profile.from_dict(told["profile"]) == found and found.calibrated is not None
    assert f"at most {1 + OWN.bit_length()} settings, about" in err
    code, out, err = run(*small, "-o", "again.json")
    assert code == 0 and out.startswith(found.calibrated.going) and "again.json" in out
    assert Profile.load("again.json") == found and not Path("cache").exists()


def test_a_models_own_profile_is_calibrated_and_used_from_then_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    Synthetic(monkeypatch, {0.2: 1})
    folder = english_model.save(tmp_path / "model")
    assert "not calibrated" in run("profile", folder).out
    code, out, err = run("calibrate", folder, "--kv-memory", "16MiB")
    assert code == 0, err
    assert "after layer 1, at most 20% of the text goes deeper" in out
    (path,) = Path("cache").iterdir()
    found = find_profile(LLM(folder, "full", kv_memory="4MiB").engine.shared)
    assert found == Profile.load(path) and found.calibrated is not None
    calibrated = "calibrated: after layer 1, at most 20% of the text goes deeper"
    assert calibrated in run("profile", folder).out
    shown = run("inspect", "--model", folder, "--keep", ".3", "--prompt-len", "1500")
    assert calibrated in shown.out, shown.err
    told = json.loads(
        run("inspect", "--model", folder, "--keep", ".3", "--prompt-len", "1500", "--json").out
    )
    assert told["rule"].endswith(calibrated)
    assert [row["computed"] for row in told["layers"]] == [1500, 1500, 300, 300]


def test_where_to_write_is_known_before_the_model_runs(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lab, "_Runs", lambda *a: pytest.fail("the model ran"))
    Path("sub").mkdir()
    Path("file").touch()
    for name in ("sub", "file/x.json"):
        code, _, err = run("calibrate", "-o", name)
        assert code == 2 and "folder; name a file for the profile" in err


def test_a_random_model_answers_nothing(run: Run, tmp_path: Path) -> None:
    folder = english_model.save(tmp_path / "model")
    code, _, err = run("calibrate", folder, "--quick", "--kv-memory", "16MiB")
    assert code == 2 and "answers none of the questions" in err.splitlines()[-1]
    found = find_profile(LLM(folder, "full", kv_memory="4MiB").engine.shared)
    assert found is not None and found.calibrated is None, "nothing was written"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the package has a profile of this model"),
        (("--keep", "0"), "--keep 0.0 must lie between 0 and 1"),
        (("--keep", "1"), "--keep 1.0 must lie between 0 and 1"),
        (("--text", "no/such/text", "-o", "x"), "No such file"),
        (("no/such/model",), "does not exist"),
        (("--dtype", "float3"), "did you mean 'float32'"),
        (("--samples", "3"), "No such option"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, run: Run) -> None:
    code, _, err = run("calibrate", *words)
    (line,) = [line for line in err.splitlines() if "error:" in line]
    assert code == 2 and message in line
