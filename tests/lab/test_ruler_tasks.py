"""RULER's tasks: lengths, what is hidden in a text, and references derived from it anew."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from pyramidinfer.engine.english import ENGLISH
from pyramidinfer.lab.ruler.aggregate import zipf_counts
from pyramidinfer.lab.ruler.needles import FORMS
from pyramidinfer.lab.ruler.sample import TooShort, find_size
from pyramidinfer.lab.ruler.tasks import TASKS, Haystack, Sample, check_task, make_samples
from pyramidinfer.lab.ruler.words import ADJECTIVES, NOUNS, english_words
from pyramidinfer.lab.tokenizer import build_tokenizer

TEXT = Haystack.default()
LEAST_FILLED = {"cwe": 0.8, "fwe": 0.8, "qa_facts_1": 0.8, "qa_facts_2": 0.8}
GENERATED = {"vt": 30, "cwe": 120, "fwe": 50, "qa_facts_1": 32, "qa_facts_2": 32}
SHIPPED = build_tokenizer(4096)
#: How questions and answers of each kind begin.
OPENINGS = {
    "niah": ("What (is|are all) the special magic", "The special magic"),
    "vt": ("Question: Find all variables", "Answer:"),
    "cwe": ("Question: What are the 10 most common words", "Answer:"),
    "fwe": ("Question: Do not provide any explanation", "Answer:"),
    "qa": ("Answer the question based on the given documents", "Answer:"),
}


def count_tokens(text: str) -> int:
    """A stand-in for a tokenizer: pieces of words, digits, marks and line ends."""
    return len(re.findall(r"[A-Za-z]{1,5}|\d{1,3}|[^\w\s]|\n", text))


def make(task: str, count: int = 4, length: int = 1500, seed: int = 0) -> list[Sample]:
    return make_samples(task, count, length, seed, count_tokens, TEXT)


def tokens(sample: Sample) -> int:
    return count_tokens(sample.context + sample.question + sample.answer) + sample.max_tokens


# --- all tasks ------------------------------------------------------------------------------------


def test_there_are_thirteen_tasks() -> None:
    assert len(TASKS) == 13
    assert sum(task.startswith("niah_") for task in TASKS) == 8


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1000, 1500, 4100])
def test_length_is_filled_and_never_passed(task: str, length: int) -> None:
    for sample in make(task, 3, length):
        assert LEAST_FILLED.get(task, 0.85) * length <= tokens(sample) <= length
        assert sample.task == task
        assert sample.max_tokens == GENERATED.get(task, 128)


@pytest.mark.parametrize("task", TASKS)
def test_length_is_counted_by_the_models_tokenizer(task: str) -> None:
    """The shipped model's has a token a character for words that it does not know."""

    def count(text: str) -> int:
        return len(SHIPPED(text, add_special_tokens=False)["input_ids"])

    for sample in make_samples(task, 2, 2000, 0, count, TEXT):
        used = count(sample.context + sample.question + sample.answer) + sample.max_tokens
        assert 0.85 * 2000 <= used <= 2000


@pytest.mark.parametrize("task", TASKS)
def test_tightest_length_is_what_the_error_says(task: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"task {task} needs at least \d+ tokens; got 60: "
        "choose longer --lengths",
    ) as error:
        make(task, 1, 60)
    needed = int(re.findall(r"least (\d+)", str(error.value))[0])
    assert tokens(make(task, 1, needed + 120)[0]) <= needed + 120


@pytest.mark.parametrize("task", TASKS)
def test_samples_depend_on_task_length_seed_and_number_alone(task: str) -> None:
    samples = make(task)
    assert samples == make(task)
    assert samples[:2] == make(task, 2)
    assert len({sample.context for sample in samples}) == 4
    assert make(task, 1, seed=1)[0] != samples[0]
    assert make(task, 1, length=1400)[0] != samples[0]


@pytest.mark.parametrize("task", TASKS)
def test_question_and_answer_stand_apart(task: str) -> None:
    sample = make(task, 1)[0]
    assert sample.question.startswith("\n")
    assert not sample.context.endswith("\n")
    assert sample.answer.startswith(" ")
    assert len(set(sample.references)) == len(sample.references)


@pytest.mark.parametrize("task", TASKS)
def test_context_ends_where_kvpress_cuts(task: str) -> None:
    """kvpress (evaluation/benchmarks/ruler) compresses what stands before the last place at which
    a question of the task's kind begins, and the answer's first words begin where they do first in
    the rest; here blanks between them go with what follows."""
    for sample in make(task, 2):
        asks, answers = OPENINGS[task.split("_")[0]]
        text = sample.context + sample.question + sample.answer
        at = [found.start() for found in re.finditer(asks, text)][-1]
        assert text[:at].rstrip() == sample.context.rstrip()
        answer = text.index(answers, at)
        assert text[at:answer].strip() == sample.question.strip()
        assert text[answer:] == sample.answer.lstrip()


def test_scores() -> None:
    sample = Sample("vt", "", "", "", ("ABC", "DEF", "GHI", "JKL"), 30)
    assert sample.score("abc, then def") == 0.5
    assert sample.score("") == 0
    assert sample.score("JKL GHI DEF ABC") == 1
    either = Sample("qa_facts_1", "", "", "", ("Lumtarby", "Lumtar"), 32)
    assert either.score("It is lumtar.") == 1
    assert either.score("Nowhere") == 0


@pytest.mark.parametrize("task", TASKS)
def test_references_score_full_marks(task: str) -> None:
    sample = make(task, 1)[0]
    assert sample.score(" ".join(sample.references)) == 1
    assert sample.score("I cannot say") == 0


# --- needles --------------------------------------------------------------------------------------

NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


@pytest.mark.parametrize("task", FORMS)
def test_needles_are_hidden_once_and_give_the_references(task: str) -> None:
    form = FORMS[task]
    for sample in make(task):
        found = NEEDLE.findall(sample.context)
        keys = set(
            re.findall(r"for (.+) mentioned", sample.question)[0]
            .replace(" and ", " ")
            .replace(",", "")
            .split()
        )
        assert len(keys) == form.asked
        assert sorted(v for _, key, v in found if key in keys) == sorted(sample.references)
        assert len(sample.references) == form.asked * form.values
        assert {what for what, _, _ in found} == {form.value}
        assert len({value for _, _, value in found}) == len(found)
        assert all(sample.context.count(value) == 1 for value in sample.references)
        if form.hay != "needles":
            assert len(found) == form.keys * form.values
        else:
            assert len(found) > 20
            assert len({key for _, key, _ in found}) == len(found)


def test_a_single_needle_is_asked_for_in_the_singular() -> None:
    sample = make("niah_single_3", 1)[0]
    assert sample.context.startswith("A special magic uuid is hidden within the following text.")
    assert sample.question.startswith("\nWhat is the special magic uuid for ")
    assert sample.answer.endswith("mentioned in the provided text is")
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", sample.references[0])


def test_several_needles_are_asked_for_in_the_plural() -> None:
    sample = make("niah_multiquery", 1)[0]
    assert sample.context.startswith("Some special magic numbers are hidden")
    assert re.match(
        r"\nWhat are all the special magic numbers for \S+, \S+, \S+, and \S+ mention",
        sample.question,
    )
    assert sample.answer.endswith("mentioned in the provided text are")


def test_needles_stand_between_sentences_at_any_depth() -> None:
    depths = []
    for sample in make("niah_single_2", 40):
        (needle,) = NEEDLE.finditer(sample.context)
        before = sample.context[: needle.start()].rstrip()
        hay = before.partition("afterwards.\n")[2] + sample.context[needle.end() :]
        assert not hay.startswith(".")
        depths.append(needle.start() / len(sample.context))
        last = before.split(". ")[-1].rstrip(".?!")
        assert any(last in sentence for sentence in TEXT.sentences) or "afterwards" in last
    assert min(depths) < 0.3 and max(depths) > 0.7


def test_keys_are_made_of_words_enough() -> None:
    for words in (ADJECTIVES, NOUNS):
        assert len(set(words)) == len(words) >= 100
        assert all(re.fullmatch("[a-z]+", word) for word in words)


# --- whole texts ----------------------------------------------------------------------------------


def test_chain_is_found_by_another_reader() -> None:
    for sample in make("vt"):
        text = sample.context + sample.question
        wanted = re.findall(r"assigned the value (\d+)", sample.question)[0]
        values: dict[str, str] = {}
        for name, value in re.findall(
            r"^VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5}) ?$", text, re.M
        ):
            assert name not in values
            values[name] = values.get(value, value)
        assert len(values) == 10  # five of them in the worked example
        holders = [name for name, value in values.items() if value == wanted]
        assert tuple(holders) == sample.references
        assert f"5 variables are assigned the value {wanted}, they are: " in sample.answer
        example, _, _ = text.rpartition("Memorize and track")
        assert wanted not in example
        shown = re.findall(r"they are: (.*)\n", example)[0].split()
        assert [values[name] for name in shown] == [values[shown[0]]] * 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (5000, 30, 3)])
def test_common_words_are_counted_anew(length: int, often: int, seldom: int) -> None:
    for sample in make("cwe", 3, length):
        example, text = sample.context.split("Below is a numbered list of words.")[1:]
        items = re.findall(r"(\d+)\. ([a-z]+)", text.partition("often.\n")[2])
        assert [int(at) for at, _ in items] == list(range(1, len(items) + 1))
        counts = Counter(word for _, word in items)
        assert {word for word, n in counts.items() if n == often} == set(sample.references)
        assert set(counts.values()) == {often, seldom}
        assert len(sample.references) == 10
        shown, _, given = example.partition("are:")
        top = [word for word, _ in Counter(re.findall(r"\d+\. ([a-z]+)", shown)).most_common(10)]
        assert sorted(re.findall(r"\d+\. ([a-z]+)", given)) == sorted(top)
        assert not set(top) & set(sample.references)


def test_words_are_english() -> None:
    words = english_words()
    assert len(words) > 1000 and list(words) == sorted(set(words))
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)


@pytest.mark.parametrize("length", [350, 1500, 5000])
def test_frequent_words_are_counted_anew(length: int) -> None:
    for sample in make("fwe", 3, length):
        text = sample.context.partition("appeared coded words. ")[2]
        ranks = Counter(text.split()).most_common()
        assert ranks[0][0] == "..."
        assert tuple(word for word, _ in ranks[1:4]) == sample.references
        counts = [n for _, n in ranks[:5]]
        assert len(set(counts)) == 5


def test_zipf_counts_fall() -> None:
    for size in range(73, 3000, 7):
        counts = zipf_counts(size)
        assert len(set(counts[:5])) == 5
        assert 0.7 * size < sum(counts) <= size


# --- facts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "gold"), [("qa_facts_1", 1), ("qa_facts_2", 2)])
def test_answers_stand_in_gold_documents_alone(task: str, gold: int) -> None:
    for sample in make(task, 12):
        parts = re.split(r"Document (\d+):\n", sample.context)
        assert [int(at) for at in parts[1::2]] == list(range(1, len(parts) // 2 + 1))
        documents = parts[2::2]
        assert len(documents) > 5
        (answer,) = sample.references
        with_answer = [each for each in documents if answer.lower() in each.lower()]
        assert len(with_answer) == 1
        name = re.findall(r"(?:was|company that|office of) ([A-Z]\w+ [A-Z]\w+)", sample.question)[0]
        named = [each for each in documents if name in each]
        if gold == 1:
            # Who works for a company is told of too; where its head office is only once.
            assert with_answer[0] in named
        else:
            assert len(named) == 1 and named != with_answer
            company = re.findall(r"[A-Z]\w+ (?:Works|Limited|Brothers|Company)", named[0])[0]
            assert company in with_answer[0]
        assert answer not in sample.question


# --- haystacks ------------------------------------------------------------------------------------


def test_haystacks_have_names() -> None:
    assert TEXT.name == ENGLISH
    assert len(TEXT.sentences) > 500
    assert Haystack.noise().name == "noise"
    sample = make_samples("niah_single_2", 1, 800, 0, count_tokens, Haystack.noise())[0]
    assert sample.context.count("The grass is green.") > 10


def test_texts_of_ones_own_begin_again(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("One thing.  Another\nthing! And a third? Yes.", encoding="utf-8")
    hay = Haystack.read(path)
    assert hay.name == "own.txt"
    assert hay.sentences == ("One thing.", "Another thing!", "And a third?", "Yes.")
    assert hay.take(3, 3) == ["Yes.", "One thing.", "Another thing!"]
    sample = make_samples("niah_single_2", 1, 800, 0, count_tokens, hay)[0]
    assert tokens(sample) > 700


def test_text_without_full_stops_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("word " * 500, encoding="utf-8")
    assert {len(sentence.split()) for sentence in Haystack.read(path).sentences} == {40, 20}


def test_unreadable_texts_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere.txt cannot be read"):
        Haystack.read(tmp_path / "nowhere.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        Haystack.read(tmp_path / "bytes")
    (tmp_path / "blank").write_text(" \n")
    with pytest.raises(ValueError, match="is empty"):
        Haystack.read(tmp_path / "blank")
    with pytest.raises(ValueError, match="no sentences"):
        Haystack("nothing", ())


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_are_said_so() -> None:
    check_task("vt")
    with pytest.raises(ValueError, match="task 'niah_singel_1': did you mean 'niah_single_1'"):
        check_task("niah_singel_1")
    with pytest.raises(ValueError, match="unknown task '': Tasks are niah_single_1"):
        check_task("")
    with pytest.raises(ValueError, match="0 samples requested"):
        make("vt", 0)
    with pytest.raises(ValueError, match="unknown task"):
        make("cew")


def test_sizes_are_found_in_few_steps() -> None:
    for least, most, each, room in [
        (1, None, 3, 5000),
        (1, 40, 3, 5000),
        (5, None, 90, 700),
        (73, None, 1, 100_000),
    ]:
        asked = []

        def cost(size: int, each: int = each, asked: list[int] = asked) -> int:
            asked.append(size)
            return 100 + each * size + size % 7

        size = find_size(cost, least, most, room)
        assert cost(size) <= room
        assert cost(size) >= 0.99 * room or cost(size + 1) > room or size == most
        assert len(asked) <= 9
    with pytest.raises(TooShort):
        find_size(lambda size: 100, 1, None, 50)
