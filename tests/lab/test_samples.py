"""What studies ask a model: lengths, depths, texts of one's own, other tokenizers."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pyramidinfer.engine.english import ENGLISH, english, paragraphs
from pyramidinfer.lab import documents
from pyramidinfer.lab.recall import AROUND
from pyramidinfer.lab.samples import Corpus, Needle, Subject
from pyramidinfer.lab.tokenizer import build_tokenizer
from pyramidinfer.policies import Full
from pyramidinfer.types import Layers
from tests.tiny import tiny_model

PIECES = {piece for piece, _ in Whitespace().pre_tokenize_str(english())}
MADE_UP = documents.vocabulary()[len(documents.SPECIALS) :]
WORDS = list(dict.fromkeys(["<s>", "<unk>", *MADE_UP, *"abcdef", *sorted(PIECES)]))
TEXT = " ".join(f"{letter} {number}" for number in range(100, 180) for letter in "abcdef")


def other_tokenizer(head: str = "<s>") -> Any:
    """Knows the words but no marks; puts ``head`` in front of every text."""
    vocab = {word: index for index, word in enumerate(WORDS)}
    inner = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    if head:
        inner.post_processor = TemplateProcessing(
            single=f"{head} $A", special_tokens=[(head, vocab[head])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", unk_token="<unk>", model_max_length=64
    )


SHIPPED = Corpus(build_tokenizer(4096), None)
OTHER = Corpus(other_tokenizer(), None)
OWN = Corpus(other_tokenizer(), TEXT)
CORPORA = {"shipped": SHIPPED, "other": OTHER, "own": OWN}


def words_of(corpus: Corpus, ids: list[int]) -> list[str]:
    words: list[str] = corpus.tokenizer.convert_ids_to_tokens(ids)
    assert corpus.tokenizer.unk_token not in words
    return words


def only(needles: list[Needle]) -> Needle:
    (needle,) = needles
    return needle


# --- everywhere -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("length", [60, 64, 127, 300])
def test_lengths_are_exact(name: str, length: int) -> None:
    corpus = CORPORA[name]
    for passage in corpus.passages(3, 4, length, 8):
        assert len(passage.context) == length
        assert len(passage.continuation) == 8
        words_of(corpus, passage.context + passage.continuation)
    for needle in corpus.needles(3, 5, length):
        assert len(needle.prompt) == length
        words_of(corpus, needle.prompt)


@pytest.mark.parametrize("name", CORPORA)
def test_the_same_seed_gives_the_same_samples(name: str) -> None:
    corpus = CORPORA[name]
    assert corpus.passages(1, 3, 80, 5) == corpus.passages(1, 3, 80, 5)
    assert corpus.passages(1, 3, 80, 5) == corpus.passages(1, 5, 80, 5)[:3]
    assert corpus.passages(1, 3, 80, 5) != corpus.passages(2, 3, 80, 5)
    assert corpus.needles(1, 3, 80) == corpus.needles(1, 5, 80)[:3]
    assert corpus.needles(1, 3, 80) != corpus.needles(2, 3, 80)
    assert len({tuple(each.context) for each in corpus.passages(1, 6, 80, 5)}) == 6


@pytest.mark.parametrize("name", CORPORA)
def test_needles_lie_evenly_over_the_depths(name: str) -> None:
    depths = [needle.depth for needle in CORPORA[name].needles(1, 8, 200, depths=4)]
    assert depths == [0.125, 0.375, 0.625, 0.875] * 2


# --- the shipped model's format ---------------------------------------------------------------


@pytest.mark.parametrize("length", [100, 500, 1500])
def test_the_fact_nearest_to_the_depth_is_asked_for(length: int) -> None:
    for needle in SHIPPED.needles(7, 10, length):
        words = words_of(SHIPPED, needle.prompt)
        assert words[:2] == ["<bos>", "<user>"] and words[-2:] == ["<end>", "<assistant>"]
        starts = [
            at
            for at, (the, thing) in enumerate(pairwise(words))
            if the == "The" and thing in documents.THINGS
        ]
        answer = needle.answer.split()
        aim = 2 + needle.depth * (length - AROUND)
        nearest = min(abs(start - aim) for start in starts)
        assert nearest in [
            abs(start - aim) for start in starts if words[start : start + 10] == answer
        ]
        asked = ["Where", "is", "the", *answer[1:5], "?"]
        assert words[-10:-2] == asked
        assert needle.answer_tokens == len(answer) + 1  # and the end mark


def test_a_passage_is_a_question_and_its_answer() -> None:
    for passage in SHIPPED.passages(5, 6, 200, 64):
        words, answer = words_of(SHIPPED, passage.context), words_of(SHIPPED, passage.continuation)
        assert len(answer) == 11 and answer[-1] == "<end>"
        assert words[-10:-2] == ["Where", "is", "the", *answer[1:5], "?"]
        text = " ".join(words)
        assert text.count(" ".join(answer[:-1])) == 1
    (short,) = SHIPPED.passages(5, 1, 200, 4)
    assert short.continuation == SHIPPED.passages(5, 1, 200, 64)[0].continuation[:4]


def test_marks_are_used_where_a_tokenizer_has_them() -> None:
    assert SHIPPED.has_marks and not OTHER.has_marks
    own = Corpus(build_tokenizer(4096), "The old baker walked . " * 60)
    for passage in own.passages(1, 3, 80, 5):
        assert "<user>" not in words_of(own, passage.context), "a text is taken as it is"


# --- any other model or text ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["other", "own"])
@pytest.mark.parametrize("length", [60, 300])
def test_the_fact_stands_at_the_depth_asked_for(name: str, length: int) -> None:
    corpus = CORPORA[name]
    for needle in corpus.needles(2, 10, length):
        words, answer = words_of(corpus, needle.prompt), needle.answer.split()
        place, number = answer
        assert words[0] == "<s>" and words.count("<s>") == 1
        asked = words[-15:]  # "Where is the map of Ada Holt ? The map of Ada Holt is in"
        assert asked[:3] == ["Where", "is", "the"] and asked[7] == "?"
        assert asked[8:] == ["The", *asked[3:7], "is", "in"]
        fact = [*asked[8:], place, number, "."]
        starts = [at for at in range(len(words)) if words[at : at + 10] == fact]
        filler = length - 1 - 10 - 15
        assert starts == [1 + round(needle.depth * filler)]
        assert needle.answer_tokens >= len(answer)


def test_own_text_is_taken_as_it_stands() -> None:
    whole = OWN.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    joined = " ".join(map(str, whole))
    for passage in OWN.passages(4, 10, 100, 20):
        assert passage.context[0] == OWN.tokenizer.bos_token_id
        ids = passage.context[1:] + passage.continuation
        assert f" {' '.join(map(str, ids))} " in f" {joined} "
    for needle in OWN.needles(4, 10, 100):
        at = 1 + round(needle.depth * (100 - 1 - 10 - 15))
        ids = needle.prompt[1:at] + needle.prompt[at + 10 : -15]
        assert f" {' '.join(map(str, ids))} " in f" {joined} "
    longest = len(whole)
    (all_of_it,) = OWN.passages(1, 1, longest, 1)
    assert all_of_it.context[1:] + all_of_it.continuation == whole
    with pytest.raises(ValueError, match=f"the text has {longest} tokens; .* at least "):
        OWN.passages(1, 1, longest + 1, 1)
    with pytest.raises(ValueError, match="give a longer text or shorter contexts"):
        OWN.needles(1, 1, longest + 100)


def test_a_tokenizer_without_a_first_token() -> None:
    plain = Corpus(other_tokenizer(head=""), TEXT)
    (passage,) = plain.passages(1, 1, 50, 5)
    assert "<s>" not in words_of(plain, passage.context)
    assert len(only(plain.needles(1, 1, 50)).prompt) == 50


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("room 472", True),
        (" room  472 .", True),
        ("room 472\nand more", True),
        ("room 47", False),
        ("in room 472", False),
        ("Room 472", False),
        ("", False),
    ],
)
def test_an_answer_begins_with_the_words(text: str, right: bool) -> None:
    assert Needle([5], "room 472", 3, 0.5).is_right(text) == right


# --- subjects, and mistakes -------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama", vocab_size=len(WORDS))
    model.save_pretrained(tmp_path / "model")
    other_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_subject_can_be_sent_to_another_process(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    subject = Subject(str(folder), str(tmp_path / "text.txt"), kv_memory="2MiB")
    twin = pickle.loads(pickle.dumps(subject))
    assert twin == subject and hash(twin) == hash(subject)
    assert subject.layers == Layers((True,) * 4, 2)
    (passage,) = subject.corpus().passages(4, 1, 60, 5)
    assert [passage] == twin.corpus().passages(4, 1, 60, 5) == OWN.passages(4, 1, 60, 5)
    llm = subject.llm(Full())
    (score,) = llm.score([passage.context], [passage.continuation])
    assert len(score.logprobs) == 5
    llm.engine.check()


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="needs a tokenizer, but the model has none"):
        Subject(str(tmp_path / "model"), kv_memory="2MiB").corpus()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"\xff\xfe", "is not UTF-8 text"), (b" \n\t", "is empty")],
)
def test_texts_that_cannot_be_used(
    folder: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as found:
        Subject(str(folder), str(path)).corpus()
    assert "text.txt" in str(found.value)


@pytest.mark.parametrize("name", CORPORA)
@pytest.mark.parametrize("length", [1, 12, 25])
def test_lengths_that_hold_no_question(name: str, length: int) -> None:
    corpus = CORPORA[name]
    with pytest.raises(ValueError, match=r"too short|do not fit"):
        corpus.needles(1, 1, length)
    if name == "shipped":
        with pytest.raises(ValueError, match=f"a context of {length} tokens is too short"):
            corpus.passages(1, 1, length, 5)


# --- real text, and the form in which a model is asked ------------------------------------------


def test_a_model_without_the_marks_is_shown_real_english(tmp_path: Path) -> None:
    (passage,) = OTHER.passages(1, 1, 200, 8)
    said = " ".join(words_of(OTHER, passage.context[1:]))
    whole = " ".join(piece for piece, _ in Whitespace().pre_tokenize_str(english()))
    assert said in whole
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    assert Subject(str(folder)).source == ENGLISH
    assert Subject().source == "generated text"
    assert Subject(text=str(tmp_path / "my.txt")).source == "my.txt"


def test_the_english_is_prose() -> None:
    found = paragraphs()
    assert len(english().split()) > 15_000 and len(set(found)) == len(found)
    for text in found:
        assert text.endswith(".") and "\n" not in text and "**" not in text and ">>>" not in text


def test_a_question_goes_through_the_chat_template() -> None:
    tokenizer = other_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}module {{ m['content'] }} object{% endfor %}"
        "{% if add_generation_prompt %}{{ ' returns ' }}{% endif %}"
    )
    needle = only(Corpus(tokenizer, TEXT).needles(1, 1, 100))
    words = tokenizer.convert_ids_to_tokens(needle.prompt)
    at = len(words) - 1 - words[::-1].index("returns")
    assert words[0] == "module" and words[at - 1] == "object" and len(words) == 100
    answer = words[at + 1 :]
    assert answer[:2] == ["The", answer[1]] and answer[-2:] == ["is", "in"]
    assert needle.answer.split()[0] in words  # the fact
