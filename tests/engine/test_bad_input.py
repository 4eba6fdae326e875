"""Users' mistakes: one clear line, nothing half-allocated, others unharmed."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyramidinfer import LLM, PyramidInfer, SamplingParams
from pyramidinfer.engine import checks
from pyramidinfer.engine import llm as llm_module
from pyramidinfer.policies import Policy
from tests.server.live import tiny_llm
from tests.tiny import VOCAB, random_prompt, tiny_model

GOLDEN = Path(__file__).parents[1] / "golden" / "mha8"


def build(**options: Any) -> LLM:
    return LLM(tiny_model("llama"), **{"policy": "full", "kv_memory": "1MiB", **options})


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompt was given"),
        ([[]], "the prompt is empty"),
        ([[5], []], "the prompt is empty"),
        ([[5, VOCAB]], f"token id {VOCAB} is outside the vocabulary: 0 to {VOCAB - 1}"),
        ([[5, -1]], "token id -1"),
        ([[5, 1.5]], "neither a text nor a list of token ids"),
        ([[5, "a"]], "neither a text nor a list of token ids"),
        (None, "prompts=None must be a text, token ids, or a list of either"),
        (5, "prompts=5 must be"),
        ({"prompt": "a"}, "must be a text, token ids"),
        (b"abc", "must be a text, token ids"),
        ({5, 6}, "must be a text, token ids"),
        ([b"abc"], "neither a text nor a list of token ids"),
        ([None], "neither a text nor a list of token ids"),
        ("some text", "a text prompt needs a tokenizer"),
        ([random_prompt(1, 512)], "the prompt has 512 tokens; this model has 512 positions"),
        ([random_prompt(1, 400)], r"needs up to \d+ bytes \(\d+.\d MiB\) of kv_memory; the pool"),
    ],
)
def test_bad_prompts(prompts: Any, message: str) -> None:
    """Nothing runs, and a request already under way finishes as if nothing had happened."""
    llm = build(kv_memory="200KiB")
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    other = llm.engine.add(random_prompt(3, 10), params)
    llm.engine.step()
    held = llm.engine.pool.budget_used, llm.engine.ledger.bytes
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, SamplingParams(max_tokens=4))
    assert (llm.engine.pool.budget_used, llm.engine.ledger.bytes) == held
    while other.finish_reason is None:
        llm.engine.step()
    assert other.output == build().generate([random_prompt(3, 10)], params)[0].token_ids
    llm.engine.check()


class Words:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [5 for _ in text.split()]}

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return " ".join("word" for _ in tokens)


def test_a_home_folder_may_be_written_with_a_tilde(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    llm = LLM("~/model", policy="full", kv_memory="1MiB")
    assert len(llm.generate([[5]], SamplingParams(max_tokens=2))[0].token_ids) == 2
    with pytest.raises(ValueError, match=r"did you mean '.*/model'"):
        LLM("~/modle")


def test_unknown_model_type_names_the_families(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "foo"}')
    with pytest.raises(ValueError, match="'foo' is not supported; supported families: Llama"):
        LLM(str(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a readable config"):
        LLM(str(folder))


def test_a_folder_with_half_a_tokenizer_loads(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    assert LLM(str(folder), kv_memory="1MiB").tokenizer is None
    with pytest.raises(ValueError, match="tokenizer path '/no/where' does not exist"):
        LLM(str(folder), kv_memory="1MiB", tokenizer="/no/where")


def test_stream_and_engine_check_sampling_too() -> None:
    llm = build()
    with pytest.raises(ValueError, match="must be SamplingParams"):
        llm.stream([5], {"max_tokens": 3})  # type: ignore[arg-type]


def test_numbers_that_are_none_end_one_request_only() -> None:
    """A NaN in one request's logits ends that request; the others go on."""
    llm = build()
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    expected = llm.generate([[7, 8, 9]], params)[0].token_ids
    with torch.no_grad():
        llm.engine.runner.body.embed_tokens.weight[100] = float("nan")
    broken, fine = llm.generate([[5, 100], [7, 8, 9]], params)
    assert (broken.finish_reason, broken.token_ids) == ("error", [])
    assert (fine.finish_reason, fine.token_ids) == ("length", expected)
    llm.engine.check()


@pytest.mark.parametrize("sampling", ["x", 5, [], [SamplingParams()] * 3, ["x"]])
def test_bad_sampling_argument(sampling: Any) -> None:
    with pytest.raises(ValueError, match="SamplingParams"):
        build().generate([[5]], sampling)


def test_ids_may_be_any_integers() -> None:
    llm, params = build(), SamplingParams(max_tokens=3)
    expected = llm.generate([[5, 6, 7]], params)[0].token_ids
    for prompt in (np.array([5, 6, 7]), torch.tensor([5, 6, 7]), (5, 6, 7)):
        assert [out.token_ids for out in llm.generate(prompt, params)] == [expected]


def test_empty_text() -> None:
    """What has no token; blanks are a text like another where there are tokens for them."""
    llm = build(tokenizer=Words())
    for text in ("", "  \n"):
        with pytest.raises(ValueError, match="the prompt is empty"):
            llm.generate(text)
    llm = tiny_llm()
    for text in (" ", "\n", "  \n"):
        assert llm.generate(text, SamplingParams(max_tokens=2))[0].prompt_token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must lie between 0 and 1000"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"max_token": 3}, "SamplingParams has no option 'max_token'; did you mean 'max_tokens'"),
        ({"ignore_eos": "x"}, "ignore_eos='x'"),
        ({"stop": 5}, "stop=5 must be a list"),
        ({"stop": None}, "stop=None must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids=5 must be a list"),
        ({"top_p": -0.1}, "top_p=-0.1 must lie between 0 and 1"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -3}, "top_k=-3 must be a whole number"),
        ({"min_p": 2}, "min_p=2"),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number between 1"),
        ({"max_tokens": 2.5}, "max_tokens=2.5"),
        ({"repetition_penalty": 1e-39}, "repetition_penalty=1e-39 must lie between 0.01"),
        ({"presence_penalty": "x"}, "presence_penalty='x'"),
        ({"frequency_penalty": 1e9}, "frequency_penalty=1000000000.0"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"stop": [""]}, "stop=''"),
        ({"stop_token_ids": [-4]}, "stop_token_ids: -4"),
    ],
)
def test_bad_sampling_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)


def test_stop_needs_a_tokenizer_and_ids_a_vocabulary() -> None:
    with pytest.raises(ValueError, match="stop strings need a tokenizer"):
        build().generate([[5]], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=f"stop_token_ids: {VOCAB} is outside"):
        build().generate([[5]], SamplingParams(stop_token_ids=[VOCAB]))


@pytest.mark.parametrize("protect", [[(0, 9)], [(3, 3)], [(-1, 2)], (1, 2), [("a", 2)], 5])
def test_bad_protect_spans(protect: Any) -> None:
    with pytest.raises(ValueError, match="protect"):
        build().generate([[5, 6, 7]], protect=protect)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "pyramidinfr"}, "did you mean 'pyramidinfer'"),
        ({"policy": 3}, "policy=3 is neither a name nor a policy object"),
        ({"keep": 0}, "keep=0 must be above 0 and at most 1"),
        ({"keep": 1.01}, "keep=1.01"),
        ({"keep": "half"}, "keep='half'"),
        ({"policy": "full", "keep": 0.5}, "policy 'full' keeps everything"),
        ({"policy": PyramidInfer(start_layer=2), "keep": 0.7}, "is just above 0.750"),
        ({"kv_memory": "10"}, "kv_memory=10 bytes is below one page per layer"),
        ({"kv_memory": "2 parsecs"}, "kv_memory='2 parsecs' is not a size"),
        ({"kv_memory": 0}, "kv_memory=0"),
        ({"kv_memory": "900TiB"}, "that are free on cpu next to the weights; lower kv_memory"),
        ({"kv_memry": "1GiB"}, "unknown option 'kv_memry'; did you mean 'kv_memory'"),
        ({"polcy": "full"}, "did you mean 'policy'"),
        ({"page_size": 0}, "page_size=0"),
        ({"dtype": "float31"}, "dtype='float31' is unknown; did you mean 'float32'"),
        ({"dtype": "float64"}, "the model given is torch.float32; convert it"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"device": 5.0}, "device=5.0"),
        ({"dtype": None}, "dtype='None' is unknown"),
        ({"kv_memory": "9" * 400}, "kv_memory=999.* is more than any machine has"),
        ({"tokenizer": 5}, "tokenizer=5 is neither a tokenizer, a path, nor None"),
        ({"policy": Policy(), "keep": 0.5}, "policy Policy has no option 'keep'"),
    ],
)
def test_bad_engine_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(tiny_model("llama"), **options)


def test_no_cuda_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device is visible; use device='cpu'"):
        LLM(str(GOLDEN), device="cuda")


def test_not_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told from the config, before any weight is read."""
    weights = sum(t.numel() for t in load_file(GOLDEN / "model.safetensors").values()) * 4
    monkeypatch.setattr(llm_module, "load_model", lambda *_: pytest.fail("weights were read"))
    for free, message in (
        (weights - 1, "needs .* GiB for its weights"),
        (weights + 2**20 - 1, "kv_memory=1048576 bytes .* next to the weights; lower kv_memory"),
    ):
        monkeypatch.setattr(checks, "free_memory", lambda _, free=free: free)
        with pytest.raises(ValueError, match=message):
            LLM(str(GOLDEN), kv_memory="1MiB")


def test_options_are_checked_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm_module, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match="start_layer=99"):
        LLM(str(GOLDEN), policy=PyramidInfer(start_layer=99))
    with pytest.raises(ValueError, match="below one page per layer"):
        LLM(str(GOLDEN), kv_memory="1KiB")


def test_a_model_without_a_head() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no language model head"):
        LLM(tiny_model("llama").model)


def test_a_hooked_layer_is_refused() -> None:
    """Device maps put a function of their own in a layer's place, which would pass us by."""
    model = tiny_model("llama")
    layer = model.model.layers[2]
    layer.forward = functools.partial(type(layer).forward, layer)
    with pytest.raises(ValueError, match="LlamaDecoderLayer was hooked"):
        LLM(model)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_model_path_with_the_nearest_name(folder: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; did you mean '.*/model'"):
        LLM(str(folder.parent / "modle"))


def test_folder_without_config_or_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"has no \*\.safetensors file"):
        LLM(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        LLM(str(folder))


def test_missing_tensor(folder: Path) -> None:
    change(folder, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.3\.mlp\.up_proj"):
        LLM(str(folder))


def test_misshaped_tensor(folder: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    with pytest.raises(ValueError, match=r"wrong shape for model\.layers\.3\.mlp\.up_proj"):
        LLM(str(folder))


def test_torn_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot load .*: Error while deserializing header"):
        LLM(str(folder))


def test_a_folder_without_a_tokenizer_loads() -> None:
    llm = LLM(str(GOLDEN), policy="full", kv_memory="1MiB")
    assert llm.tokenizer is None
    assert llm.generate([[5, 6]], SamplingParams(max_tokens=2))[0].text == ""
    with pytest.raises(ValueError, match="needs a tokenizer"):
        llm.generate("text")


def test_host_memory_for_swapped_caches_is_looked_at_first() -> None:
    options = {"admission": "overcommit", "host_kv_memory": "1000TiB"}
    with pytest.raises(ValueError, match=r"host_kv_memory=\d+ bytes .* lower it"):
        LLM(tiny_model("llama"), kv_memory="1MiB", **options)
    with pytest.raises(ValueError, match="host_kv_memory='many' is not a size"):
        LLM(tiny_model("llama"), kv_memory="1MiB", host_kv_memory="many")
