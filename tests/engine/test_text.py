"""Text from tokens as they come: endings held back, tokens without text, what begins a text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyramidinfer.engine.text import CONTEXT, PATIENCE, Detokenizer


class Letters:
    """Token n is a letter; 0 is special, 1 half a character."""

    all_special_ids = (0,)
    read = 0

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        self.read += len(tokens)
        return "".join("\ufffd" if t == 1 else chr(t) for t in tokens if t)


def held_plainly(text: str, stops: tuple[str, ...]) -> int:
    """The longest ending of the text that begins a stop string."""
    sizes = [n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
    return max(sizes, default=0)


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=6), max_size=3),
)
def test_what_may_begin_a_stop_string_is_held_back(text: str, stops: list[str]) -> None:
    reader = Detokenizer(Letters(), tuple(stops), [])
    reader.update([ord(letter) for letter in text])
    if not reader.stopped:
        assert reader.stable == text[: len(text) - held_plainly(text, tuple(stops))]


@pytest.mark.parametrize("token", [0, 1], ids=["special", "half a character"])
def test_tokens_without_text_are_not_read_for_ever(token: int) -> None:
    """Each is decoded with a few others, however many there are."""
    tokenizer, tokens = Letters(), [ord("a")]
    reader = Detokenizer(tokenizer, (), [])
    for _ in range(400):
        tokens.append(token)
        reader.update(tokens)
    assert tokenizer.read < 400 * 4 * (PATIENCE + 2)
    tokens.append(ord("b"))
    reader.update(tokens, last=True)
    assert reader.text.replace("\ufffd", "") == "ab"


def test_an_answer_is_read_with_the_end_of_its_prompt() -> None:
    class Words(Letters):
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return " ".join(chr(t) for t in tokens if t)

    after_text = Detokenizer(Words(), (), [ord("p")] * (2 * CONTEXT))
    after_text.update([ord("a"), ord("b")])
    assert after_text.text == " a b", "the space between belongs to the answer"
    after_special = Detokenizer(Words(), (), [ord("p"), 0])
    after_special.update([ord("a")])
    after_special.update([ord("a"), ord("b")])
    assert after_special.text == "a b"


def test_a_tokenizer_that_raises_is_told_of() -> None:
    class Broken(Letters):
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            if ord("x") in tokens:
                raise KeyError("x")
            return super().decode(tokens, skip_special_tokens)

    reader = Detokenizer(Broken(), (), [])
    reader.update([ord("a")])
    reader.update([ord("a"), ord("x")])
    assert reader.error is not None and "KeyError" in reader.error
    reader.update([ord("a"), ord("x"), ord("b")], last=True)
    assert reader.text == "a"
