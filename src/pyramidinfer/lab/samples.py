"""The samples of studies: passages with a continuation, and questions with a needle.

A model whose tokenizer knows the chat marks of the shipped model's generated language gets samples
in that language.  Any other model gets the user's file or, if none is given, real English text, and
questions go through its chat template if it has one.
"""

from __future__ import annotations

import random
import re
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pyramidinfer.lab import documents
from pyramidinfer.lab.fields import Backend, CacheMemory, Device, Dtype, KvDtype, Text, Weights
from pyramidinfer.options import Option

if TYPE_CHECKING:  # torch takes seconds, and --help needs none of it
    from pyramidinfer.engine import LLM
    from pyramidinfer.models.loading import LoadedModel
    from pyramidinfer.policies import Policy
    from pyramidinfer.types import Layers, TokenIds

__all__ = [
    "GENERATED",
    "SHIPPED",
    "Corpus",
    "Needle",
    "Passage",
    "Subject",
    "forget",
    "read_text",
    "settings",
]

#: Name of the model in the package, independent of its path.
SHIPPED = "shipped"
#: Name in results of the text in the shipped model's language.
GENERATED = "generated text"


@dataclass(frozen=True, slots=True)
class Passage:
    """A context and the text that follows it, as token ids."""

    context: TokenIds
    continuation: TokenIds


@dataclass(frozen=True, slots=True)
class Needle:
    """A prompt that asks for a fact at ``depth`` (0: first, 1: last), and the right answer."""

    prompt: TokenIds
    answer: str
    answer_tokens: int
    depth: float

    def is_right(self, text: str) -> bool:
        """Whether a generated text begins with the answer, word for word."""
        said = " ".join(text.split())
        return re.match(rf"{re.escape(self.answer)}(?!\w)", said) is not None


@dataclass(frozen=True)
class Subject:
    """The subject of a study: a model, a text and a device.  Plain values, so it can be pickled."""

    model: Annotated[
        str,
        Option(
            "Model folder, Hugging Face hub id, name of a fetched model, or GGUF file.",
            positional=True,
        ),
    ] = SHIPPED
    text: Text = None
    dtype: Dtype = "float32"
    device: Device = "auto"
    kv_memory: CacheMemory = "512MiB"
    backend: Backend = "auto"
    kv_dtype: KvDtype = "auto"
    weights: Weights = "auto"

    @property
    def plain(self) -> Subject:
        """The same model with cache and weights in its own dtype."""
        return replace(self, kv_dtype="auto", weights="auto")

    def loaded(self) -> LoadedModel:
        """The transformers model and its tokenizer, loaded once per process."""
        return _load(self.model, self.dtype, self.device)

    def llm(self, policy: Policy, **options: Any) -> LLM:
        """An engine over the model, which is loaded once per process; with ``weights="gguf"``, the
        engine loads the file itself."""
        from pyramidinfer.engine import LLM

        loaded = self.loaded()
        options = {"weights": self.weights, **options}
        of_file = options["weights"] == "gguf"
        return LLM(
            self.model if of_file else loaded.model,
            policy,
            dtype=self.dtype if of_file else "auto",
            kv_memory=self.kv_memory,
            tokenizer=loaded.tokenizer,
            backend=self.backend,
            kv_dtype=self.kv_dtype,
            **options,
        )

    def corpus(self) -> Corpus:
        return Corpus(self.loaded().tokenizer, None if self.text is None else read_text(self.text))

    @property
    def source(self) -> str:
        """The name in results of the text that samples are drawn from."""
        from pyramidinfer.engine.english import ENGLISH

        if self.text is not None:
            return Path(self.text).name
        return ENGLISH if self.corpus().ids is not None else GENERATED

    @property
    def layers(self) -> Layers:
        """The model's layers, none of which has a sliding window."""
        from pyramidinfer.models import ModelRunner
        from pyramidinfer.types import Layers

        loaded = self.loaded()
        runner = ModelRunner(loaded.model, "reference")
        return Layers((True,) * runner.depth, runner.kv_heads)


class Corpus:
    """Samples for one tokenizer, from a text or generated; the same for the same seed.

    ids : the text's tokens; None where samples are in the shipped model's language.
    """

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        from pyramidinfer.engine.english import english
        from pyramidinfer.lab.chat import Chat

        if tokenizer is None:
            raise ValueError("a study needs a tokenizer, but the model has none")
        self.tokenizer, self.chat = tokenizer, Chat(tokenizer)
        marks = {"<user>", "<assistant>", "<end>", "room"}
        self.has_marks = marks <= set(tokenizer.get_vocab())
        if text is None and not self.has_marks:
            text = english()
        self.ids: TokenIds | None = None if text is None else self.chat.encode(text)

    def passages(self, seed: int, count: int, context: int, continuation: int) -> list[Passage]:
        """``count`` contexts of ``context`` tokens, each with its continuation.

        In the shipped model's format, the continuation is the answer to the question the context
        ends with (11 tokens, or fewer if ``continuation`` is less), else the next ``continuation``
        tokens.
        """
        rng = random.Random(f"passages {seed}")
        if self.ids is None:
            return [self._conversation(rng, context, continuation) for _ in range(count)]
        return [self._excerpt(rng, context, continuation) for _ in range(count)]

    def needles(self, seed: int, count: int, length: int, depths: int = 5) -> list[Needle]:
        """``count`` questions over ``length`` tokens; needles spread evenly over the depths."""
        rng = random.Random(f"needles {seed}")
        wanted = [(index % depths + 0.5) / depths for index in range(count)]
        if self.ids is None:
            return [self._asked(rng, length, depth) for depth in wanted]
        return [self._hidden(rng, length, depth) for depth in wanted]

    # --- the shipped model's format -----------------------------------------------------------

    def _asked(self, rng: random.Random, length: int, depth: float) -> Needle:
        from pyramidinfer.lab.recall import make_question

        question = make_question(rng, length, depth=depth)
        ids = self.tokenizer(question.prompt)["input_ids"]
        return Needle(ids, question.answer, documents.ANSWER_TOKENS, depth)

    def _conversation(self, rng: random.Random, context: int, continuation: int) -> Passage:
        """A document and a question; the continuation is the answer and nothing else."""
        room = context - 12
        if room < 40:
            raise ValueError(f"a context of {context} tokens is too short; give at least 60")
        document = documents.document(rng, room, max(2, min(100, context // 64)))
        fact = rng.choice(document.facts)
        words = ["<bos>", "<user>", *document.words, *documents.question_words(fact)]
        answer = [*documents.answer_words(fact), "<end>"]
        encode = self.tokenizer.convert_tokens_to_ids
        return Passage(encode([*words, "<end>", "<assistant>"]), encode(answer[:continuation]))

    # --- any other model or text --------------------------------------------------------------

    def stretch(self, rng: random.Random, count: int) -> TokenIds:
        """``count`` consecutive tokens of the text from a random start."""
        assert self.ids is not None
        if count < 1:
            raise ValueError("the context is too short for a question and its fact")
        if len(self.ids) < count:
            raise ValueError(
                f"the text has {len(self.ids)} tokens; this study needs at least {count} in a row: "
                f"give a longer text or shorter contexts"
            )
        first = rng.randrange(len(self.ids) - count + 1)
        return self.ids[first : first + count]

    def _excerpt(self, rng: random.Random, context: int, continuation: int) -> Passage:
        head = self.chat.head
        whole = head + self.stretch(rng, context + continuation - len(head))
        return Passage(whole[:context], whole[context:])

    def _hidden(self, rng: random.Random, length: int, depth: float) -> Needle:
        """A fact somewhere in the text, and a question at the end with the answer's first words."""
        (fact,) = documents.sample_facts(rng, 1)
        opening = f"The {fact.thing} of {fact.first} {fact.last} is in"
        sentence = self.chat.encode(f" {opening} {fact.place} {fact.number}. ")
        around = self.chat.ask(
            "", f"\n\nWhere is the {fact.thing} of {fact.first} {fact.last}?", f" {opening}"
        )
        text = self.stretch(rng, length - len(sentence) - len(around.whole))
        at = round(depth * len(text))
        prompt = around.context + text[:at] + sentence + text[at:] + around.rest
        answer = f"{fact.place} {fact.number}"
        return Needle(prompt, answer, len(self.chat.encode(f" {answer}")) + 2, depth)


def settings(plan: Any) -> dict[str, Any]:
    """A study's plan (a dataclass with a ``subject``) as plain values for its result, including
    the name of the samples' text."""
    found = asdict(plan)
    found["subject"]["source"] = plan.subject.source
    return found


def forget() -> None:
    """Release the model that studies hold."""
    _load.cache_clear()


@lru_cache(maxsize=1)
def _load(model: str, dtype: str, device: str) -> LoadedModel:
    from pyramidinfer.models.loading import load_model, quiet_transformers, shipped_model

    quiet_transformers()
    return load_model(shipped_model() if model == SHIPPED else model, "auto", dtype, device)


def read_text(path: str) -> str:
    """A file's text; ``ValueError`` if it is not a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
