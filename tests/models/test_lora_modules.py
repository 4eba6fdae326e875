"""Adapters served beside their base model: peft's own model is the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.config import EngineConfig
from tests.adapters import adapted, save_adapter
from tests.tiny import model_greedy, random_prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
NEW = 8
PROMPTS = [random_prompt(seed, length) for seed, length in enumerate((20, 33, 9, 40, 26))]
NAMES = ["first", None, "second", "first", "second"]
GREEDY = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
#: Packed for the kernels, packed for torch, and run through their own modules.
CASES = [
    *((family, "cpu") for family in ("llama", "qwen3", "phi3", "smollm3")),
    *((family, "reference") for family in ("llama", "gemma2", "gpt_neox", "opt")),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, dict[str, str]] = {}

    def of(family: str) -> dict[str, str]:
        if family not in made:
            inside = tmp_path_factory.mktemp(family)
            made[family] = {
                name: save_adapter(inside / name, family, which)
                for which, name in enumerate(("first", "second"))
            }
        return made[family]

    return of


def judges(family: str) -> dict[str | None, Any]:
    base = tiny_model(family)
    base.generation_config.eos_token_id = None
    return {None: base, "first": adapted(family, 0), "second": adapted(family, 1)}


def build(family: str, folders: Any, **options: Any) -> LLM:
    options = {"kv_memory": "2MiB", "page_size": 4, "policy": "full", **options}
    return LLM(tiny_model(family), lora_modules=folders(family), **options)


def logits_of(model: Any, text: list[int], count: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0, -count - 1 : -1]


@pytest.mark.parametrize(("family", "backend"), CASES)
def test_a_mixed_batch_is_what_peft_gives(family: str, backend: str, folders: Any) -> None:
    """Different targets, ranks and scales, the base among them: tokens and logits."""
    llm, models = build(family, folders, backend=backend, prefill_chunk=16), judges(family)
    outputs = llm.generate(PROMPTS, GREEDY, lora=NAMES)
    expected = [model_greedy(models[name], p, NEW) for p, name in zip(PROMPTS, NAMES, strict=True)]
    assert [each.token_ids for each in outputs] == expected
    alone = [model_greedy(models[None], prompt, NEW) for prompt in PROMPTS]
    assert [a == b for a, b in zip(alone, expected, strict=True)] == [n is None for n in NAMES]
    scores = llm.score(PROMPTS, expected, logits=True, lora=NAMES)
    for prompt, tokens, name, score in zip(PROMPTS, expected, NAMES, scores, strict=True):
        theirs = logits_of(models[name], prompt + tokens, NEW)
        assert score.logits is not None
        torch.testing.assert_close(score.logits, theirs, atol=2e-4, rtol=1e-4)


def test_on_fixed_buffers(folders: Any) -> None:
    """What a GPU replays has no adapters; steps of a batch with some run beside it."""
    llm, models = build("llama", folders, backend="triton"), judges("llama")
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    for names in ((None, "first"), (None, None)):
        prompts = [PROMPTS[2][:5], PROMPTS[2][4:]]
        expected = [model_greedy(models[n], p, 3) for p, n in zip(prompts, names, strict=True)]
        found = [each.token_ids for each in llm.generate(prompts, params, lora=list(names))]
        assert found == expected


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_on_weights_of_few_bits(weights: str, folders: Any) -> None:
    """The low ranks stay as they are on top of the coded product, whose loss is the base's."""
    plain, coded = (build("llama", folders, weights=each) for each in ("auto", weights))
    text, rest = PROMPTS[3], PROMPTS[1][:NEW]

    def logits(llm: LLM, name: str | None) -> Tensor:
        found = llm.score([text], [rest], logits=True, lora=name)[0].logits
        assert found is not None
        return found

    off = float((logits(coded, None) - logits(plain, None)).square().mean().sqrt())
    with_it = float((logits(coded, "first") - logits(plain, "first")).square().mean().sqrt())
    effect = float((logits(plain, "first") - logits(plain, None)).square().mean().sqrt())
    assert 0 < with_it < 2 * off < effect


@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"lossless": True, "policy": "pyramid"}])
def test_with_other_options(options: dict[str, Any], folders: Any) -> None:
    """Caches in few bits say what they say alone; drafts run with the same adapter."""
    if "keep" not in options and options.get("lossless"):
        options = {**options, "keep": 0.5, "draft_tokens": 3}
    llm = build("llama", folders, **options)
    together = llm.generate(PROMPTS, GREEDY, lora=NAMES)
    alone = [
        build("llama", folders, **options).generate(p, GREEDY, lora=n)[0].token_ids
        for p, n in zip(PROMPTS[:3], NAMES[:3], strict=True)
    ]
    assert [each.token_ids for each in together[:3]] == alone
    if "lossless" in options:
        models = judges("llama")
        pairs = zip(PROMPTS[:3], NAMES[:3], strict=True)
        assert alone == [model_greedy(models[name], p, NEW) for p, name in pairs]
        assert any(each.metrics.drafts and each.metrics.drafts.drafted for each in together)


def test_prefixes_keep_their_adapter(folders: Any) -> None:
    llm, model = build("llama", folders), judges("llama")["second"]
    begun, question = PROMPTS[3], PROMPTS[2]
    with llm.prefill(begun, lora="second") as prefix:
        assert prefix.lora == "second"
        for lora in (None, "second"):
            (output,) = llm.generate([question], GREEDY, prefix=prefix, lora=lora)
            assert output.token_ids == model_greedy(model, begun + question, NEW)
        with pytest.raises(ValueError, match="prefilled with lora='second': give the adapter to"):
            llm.generate([question], GREEDY, prefix=prefix, lora="first")


def test_the_given_model_stays_as_it_is(folders: Any) -> None:
    model = tiny_model("gpt_neox")
    before = list(model.named_modules())
    llm = LLM(model, policy="full", kv_memory="1MiB", lora_modules=folders("gpt_neox"))
    llm.generate([PROMPTS[0]], GREEDY, lora="first")
    assert list(model.named_modules()) == before


def test_names(folders: Any) -> None:
    llm = build("llama", folders)
    with pytest.raises(ValueError, match="lora='frist' is unknown; did you mean 'first'"):
        llm.generate(PROMPTS, lora="frist")
    with pytest.raises(ValueError, match="2 adapters given for 5 prompts"):
        llm.generate(PROMPTS, lora=["first", None])
    with pytest.raises(ValueError, match="no adapter was loaded: give lora_modules"):
        LLM(tiny_model("llama"), kv_memory="1MiB", policy="full").generate(PROMPTS, lora="first")


def test_how_adapters_are_named() -> None:
    texts = ("a=x/y=z", '{"name": "b", "path": "owner/name"}')
    assert EngineConfig(lora_modules=texts).adapters == {"a": "x/y=z", "b": "owner/name"}
    for wrong, message in (
        (["first"], "'first' is neither NAME=PATH nor"),
        (['{"name": "a"}'], "those are its two keys"),
        (['{"name": "a", "path": "b", "rank": 3}'], "those are its two keys"),
        (["{"], "is neither"),
        (["=x"], "must be a name and a path"),
        ({"a": 3}, "must be a name and a path"),
        (["a=x", "a=y"], "names 'a' twice"),
        ("a=x", "must be folders by name"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(lora_modules=wrong)  # type: ignore[arg-type]


def configure(folder: str, **keys: Any) -> None:
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"use_dora": True},
            "use_dora=True: DoRA, which cannot be .* give its folder as the model",
        ),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.'lm_head'.: whole modules"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True: biases"),
        ({"peft_type": "LOHA"}, "of the kind 'LOHA', and only LORA"),
        ({"task_type": "SEQ_CLS"}, "for the task 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' also changes"),
        ({"r": 5}, r"lora_A has the shape \(4, 32\).*be \(5, 32\): is its base another"),
        ({"lora_alpha": "x"}, "alpha 'x' must be a number above 0"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj", "o_proj"]}, "lacks .*o_proj.lora_A"),
    ],
)
def test_adapters_that_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    folder = save_adapter(tmp_path / "one", "llama", 0)
    configure(folder, **keys)
    with pytest.raises(ValueError, match=f"adapter 'mine' .*{message}") as caught:
        LLM(tiny_model("llama"), kv_memory="1MiB", lora_modules={"mine": folder})
    assert len(str(caught.value).splitlines()) == 1


def test_adapters_of_other_models_and_places(tmp_path: Path) -> None:
    def refused(folder: str, message: str, model: Any = None) -> None:
        with pytest.raises(ValueError, match=message):
            LLM(model or tiny_model("llama"), kv_memory="1MiB", lora_modules={"mine": folder})

    wide = save_adapter(tmp_path / "wide", "qwen3", 0)
    refused(wide, r"lora_B has the shape \(64, 4\).*be \(32, 4\): is its base another")
    refused(save_adapter(tmp_path / "neox", "gpt_neox", 0), "layers.0.* is not a linear of")
    tiny_model("mistral").save_pretrained(tmp_path / "base")
    named = save_adapter(tmp_path / "named", "llama", 0)
    configure(named, base_model_name_or_path=str(tmp_path / "base"))
    refused(named, "whose model_type is 'mistral'; here it is 'llama'")
    head = save_adapter(tmp_path / "head", "llama", 0, target_modules=["q_proj", "lm_head"])
    refused(head, "it changes lm_head, and adapters on heads and embeddings are not")
    refused(str(tmp_path / "base"), "it has no adapter_config.json")
    whole = save_adapter(tmp_path / "torn", "llama", 0)
    weights = Path(whole) / "adapter_model.safetensors"
    tensors = load_file(weights)
    gone = min(name for name in tensors if "lora_B" in name)
    save_file({name: each for name, each in tensors.items() if name != gone}, weights)
    refused(whole, "lacks the tensor .*lora_B")
    bad = save_adapter(tmp_path / "bad", "llama", 0)
    tensors = load_file(weights := Path(bad) / "adapter_model.safetensors")
    tensors[gone][0, 0] = float("nan")
    save_file(tensors, weights)
    refused(bad, "values that are not finite")
    refused(bad, "is a peft.*Linear, not a plain linear: unload", adapted("llama", 0))
