"""What ends an answer: every end token there is, the chat template's included, and stop strings
that are one token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.loading import end_ids
from tests.server.live import byte_tokenizer, serving
from tests.tiny import tiny_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chatml(special: bool = True, template: str | None = CHATML) -> Any:
    """A tokenizer as many fine-tunes have it: its end token is not what ends their turns."""
    tokenizer = byte_tokenizer()
    tokens = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.chat_template = template
    return tokenizer


def llm_with(tokenizer: Any, config_eos: int | None = None, generation_eos: Any = None) -> LLM:
    model = tiny_model("llama", torch.float32, vocab_size=len(tokenizer), eos_token_id=config_eos)
    model.generation_config.eos_token_id = generation_eos
    return LLM(model, "full", tokenizer=tokenizer, kv_memory="4MiB", page_size=4)


def forced(llm: LLM, token: str, after: int = 3, **options: Any) -> Any:
    """An answer whose token number ``after`` is this one; others are letters."""
    ids = llm.tokenizer.get_vocab()
    params = SamplingParams(max_tokens=12, logit_bias={ids["a"]: 80}, **options)
    request = llm.engine.make(llm.encode("Who ?"), params)
    request.constraint = At(ids[token], after)
    llm.engine.run([request])
    return llm.engine.output(request)


class At:
    """Nothing but one token at one place."""

    def __init__(self, token: int, place: int) -> None:
        self.token, self.left = token, place
        self.done = False

    def allowed(self, vocab_size: int) -> torch.Tensor:
        return (torch.arange(vocab_size) == self.token) == (self.left == 0)

    def accept(self, token: int) -> int:
        self.left -= 1
        return token

    def copy(self) -> At:
        return At(self.token, self.left)


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
@pytest.mark.parametrize("token", ["<|im_end|>", "</s>", "<|eot_id|>", "<pad>"])
def test_end_tokens_are_those_of_all_who_name_one(token: str, special: bool) -> None:
    """The template's turn end, the tokenizer's, the generation config's and the config's."""
    tokenizer = chatml(special)
    ids = tokenizer.get_vocab()
    llm = llm_with(tokenizer, ids["<pad>"], [ids["<|eot_id|>"]])
    assert llm.engine.end_ids == {
        ids[each] for each in ("<|im_end|>", "</s>", "<|eot_id|>", "<pad>")
    }
    out = forced(llm, token)
    assert (out.finish_reason, len(out.token_ids), out.text) == ("stop", 4, "aaa")
    out = forced(llm, token, ignore_eos=True)
    assert (out.finish_reason, len(out.token_ids)) == ("length", 12)


def test_ends_of_both_configs_hold() -> None:
    model = tiny_model("llama", eos_token_id=5)
    model.generation_config.eos_token_id = [6, 7]
    assert end_ids(model) == {5, 6, 7}
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    assert end_ids(model) == frozenset()


@pytest.mark.parametrize("special", [True, False], ids=["special", "plain"])
def test_a_stop_string_that_is_one_token_is_that_token(special: bool) -> None:
    llm = llm_with(chatml(special, None))
    assert forced(llm, "<|im_end|>").finish_reason == "length"
    out = forced(llm, "<|im_end|>", stop=["<|im_end|>"], ignore_eos=True)
    assert (out.finish_reason, len(out.token_ids), out.text) == ("stop", 4, "aaa")
    spelled = forced(llm, "Ċ", stop="a\n", ignore_eos=True)
    assert (spelled.finish_reason, spelled.text) == ("stop", "aa")


@pytest.fixture(scope="module")
def live() -> Iterator[Any]:
    with serving(llm_with(chatml(template=None)), model_name="tiny") as live:
        yield live


@pytest.mark.parametrize("stream", [False, True])
def test_over_http(live: Any, stream: bool) -> None:
    """Where nothing but the special token can come, it ends the answer, and is no text."""
    end = live.service.llm.tokenizer.get_vocab()["<|im_end|>"]
    body = {"max_tokens": 6, "logit_bias": {str(end): 100}, "temperature": 0, "stream": stream}
    with live.openai() as client:
        for stop, wanted in (("<|im_end|>", "stop"), ("x", "length")):
            found = client.completions.create(model="tiny", prompt="Who ?", stop=stop, **body)
            chunks = list(found) if stream else [found]
            assert chunks[-1].choices[0].finish_reason == wanted
            assert "".join(each.choices[0].text for each in chunks) == ""


def test_an_answer_in_json_ends_with_the_turn() -> None:
    """The grammar lets the turn's end follow, and nothing else."""
    llm = llm_with(chatml())
    with serving(llm, model_name="tiny") as live:
        body = {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"enum": ["a"]}},
            },
            "max_tokens": 30,
        }
        choice = live.chat("Who ?", **body).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", '"a"')
