"""lm-eval with this engine: equal to lm-eval's ``hf`` where nothing is dropped, else in force."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import Registry, get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.integrations.lm_eval import PyramidInferLM
from pyramidinfer.lab import documents
from pyramidinfer.lab.tokenizer import build_tokenizer
from pyramidinfer.models.loading import shipped_model
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
POSITIONS = 160
LONGEST = 96  # max_length: well below the longest texts
COMMON = {"max_length": LONGEST, "kv_memory": "16MiB", "device": "cpu"}
SNAPKV = {"policy": "snapkv", "keep": 0.3, "window": 4, "page_size": 4}
Results = dict[str, Any]
Evaluate = Callable[..., Results]


def words(seed: int, count: int) -> str:
    return " ".join(documents.document(random.Random(seed), 400, 4).words[:count])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random Llama and its word-level tokenizer, as a checkpoint."""
    place = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(POSITIONS)
    model = tiny_model(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=POSITIONS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def evaluate(tmp_path_factory: pytest.TempPathFactory, folder: str) -> Evaluate:
    """``simple_evaluate`` over three local tasks; gives the answer to every request."""
    place = tmp_path_factory.mktemp("tasks")
    starts = [words(seed, count) for seed, count in enumerate((4, 30, 60, 200))]
    llm = LLM(folder, policy="full", kv_memory="16MiB")
    outs = llm.generate(
        [text for text in starts if len(text.split()) < 100], SamplingParams(max_tokens=20)
    )
    said = [out.text.split() for out in outs]  # what greedy decoding says there
    choices = [
        {"q": text, "choices": [" ".join(answer[:3]), "room 472 .", "a"]}
        for text, answer in zip(starts, said, strict=False)
    ]
    choices += [{"q": words(7, 200), "choices": ["the map .", "b"]}]
    choices += [{"q": "", "choices": ["the old baker", "room 472 .", "<bos> room"]}]
    lengths = (5, LONGEST - 2, LONGEST - 1, LONGEST, 150, 300)
    rows = {
        "choice": [each | {"a": 0} for each in choices],
        "rolling": [{"text": words(seed, count)} for seed, count in enumerate(lengths)],
        "answer": [{"text": text} for text in starts],
    }
    tasks: dict[str, dict[str, Any]] = {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "x",
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": [said[1][9], " " + said[2][5]], "max_gen_toks": 24},
        },
    }
    for name, task in tasks.items():
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        files = {"data_files": {"test": str(data)}, "cache_dir": str(place / "cache")}
        task |= {"task": name, "dataset_path": "json", "test_split": "test"}
        task["dataset_kwargs"] = files
    manager = TaskManager(include_defaults=False)

    def run(model: str, only: str = "", **arguments: Any) -> Results:
        results = lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": folder, **arguments},
            bootstrap_iters=0,
            tasks=[dict(task) for name, task in tasks.items() if only in name],
            batch_size=2,
            task_manager=manager,
        )
        assert results is not None
        results["answers"] = {
            name: [answer for sample in samples for answer in sample["filtered_resps"]]
            for name, samples in results["samples"].items()
        }
        return dict(results)

    return run


@pytest.fixture(scope="module")
def full(evaluate: Evaluate) -> Results:
    return evaluate("pyramidinfer", policy="full", **COMMON)


@pytest.fixture(scope="module")
def snapkv(folder: str) -> PyramidInferLM:
    return PyramidInferLM(folder, **SNAPKV, **COMMON)


def cache(results: Results, kind: str) -> dict[str, float]:
    shares: dict[str, float] = results["config"]["pyramidinfer"]["cache"][kind]
    return shares


def asked(*arguments: Any) -> list[Instance]:
    return [Instance("loglikelihood", {}, each, 0) for each in arguments]


# --- nothing dropped -----------------------------------------------------------------------------


def test_full_is_lm_evals_own_backend(evaluate: Evaluate, full: Results) -> None:
    """Likelihoods, greedy flags, whole texts beyond ``max_length``, and answers."""
    own = evaluate("hf", max_length=LONGEST, device="cpu")
    theirs, ours = own["answers"], full["answers"]
    assert [flag for _, flag in ours["choice"]] == [flag for _, flag in theirs["choice"]]
    assert sum(flag for _, flag in ours["choice"]) >= 3
    assert [value for value, _ in ours["choice"]] == pytest.approx(
        [value for value, _ in theirs["choice"]], abs=1e-4
    )
    assert len(ours["rolling"]) == 6
    assert ours["rolling"] == pytest.approx(theirs["rolling"], abs=1e-4, rel=1e-6)
    assert ours["answer"] == theirs["answer"]
    for task, metric in (("choice", "acc"), ("rolling", "word_perplexity")):
        one, other = (each["results"][task][f"{metric},none"] for each in (full, own))
        assert one == pytest.approx(other, rel=1e-5)
    assert {len(text.split()) for text in ours["answer"]} >= {9, 5, 24}
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        assert cache(full, kind)["kept_share"] == cache(full, kind)["computed_share"] == 1


def test_full_with_shared_windows_scores_short_texts_the_same(
    evaluate: Evaluate, full: Results
) -> None:
    """Within ``max_length`` every token still sees the whole text before it."""
    shared = evaluate("pyramidinfer", "rolling", policy="full", rolling_context=0.5, **COMMON)
    one, other = shared["answers"]["rolling"], full["answers"]["rolling"]
    assert one[:3] == pytest.approx(other[:3], abs=1e-4)
    assert one[-1] != pytest.approx(other[-1], abs=1e-2)
    assert cache(shared, "loglikelihood_rolling")["scored_tokens"] == sum(
        count + 1 for count in (5, LONGEST - 2, LONGEST - 1, LONGEST, 150, 300)
    )


# --- compression in force ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [SNAPKV, {"policy": "pyramidinfer", "keep": 0.6, "min_context": 16}]
)
def test_compression_is_in_force(
    evaluate: Evaluate, full: Results, options: dict[str, Any]
) -> None:
    results = evaluate("pyramidinfer", **options, **COMMON)
    ours, plain = results["answers"], full["answers"]
    assert ours["choice"][3] != pytest.approx(plain["choice"][3], abs=1e-3)
    assert ours["choice"][-1] == pytest.approx(plain["choice"][-1], abs=1e-4)  # one token's context
    assert ours["rolling"][2] != pytest.approx(plain["rolling"][2], abs=1e-2)
    assert ours["answer"] != plain["answer"]
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        assert 0.2 < cache(results, kind)["kept_share"] < 0.85
        assert cache(results, kind)["bytes_share"] < 1
        assert (cache(results, kind)["computed_share"] < 0.9) == (options is not SNAPKV)
    assert cache(results, "loglikelihood_rolling")["scored_after_one_token"] < 0.5
    assert options["policy"] in results["config"]["pyramidinfer"]["policy"].lower()


def test_scores_are_those_of_llm_score(snapkv: PyramidInferLM, folder: str) -> None:
    pairs = [(words(seed, 40 + seed), " the map .") for seed in range(4)]
    answers = snapkv.loglikelihood(asked(*pairs), disable_tqdm=True)
    options = {name: value for name, value in COMMON.items() if name != "max_length"}
    llm = LLM(folder, policy=snapkv.llm.policy, page_size=4, **options)
    scores = llm.score([context for context, _ in pairs], [text for _, text in pairs])
    for (value, greedy), score in zip(answers, scores, strict=True):
        assert value == pytest.approx(sum(score.logprobs), abs=1e-6)
        assert greedy == all(score.greedy)
    assert not snapkv.llm.engine.pool.tables


@pytest.mark.parametrize("share", [0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("longest", [2, 10, 32])
def test_windows_score_every_token_once(
    snapkv: PyramidInferLM, monkeypatch: pytest.MonkeyPatch, share: float, longest: int
) -> None:
    monkeypatch.setattr(snapkv, "rolling_context", share)
    monkeypatch.setattr(snapkv, "max_length", longest)
    for count in (0, 1, 2, 9, 10, 11, 32, 33, 77):
        text = list(range(100, 100 + count))
        whole = [snapkv.prefix_token_id, *text]
        done = 0
        for index, (context, scored) in enumerate(snapkv.windows(text)):
            assert scored == text[done : done + len(scored)]
            assert context == whole[: done + 1][-len(context) :]
            assert len(context) >= 1 and len(context) + len(scored) <= longest + 1
            if index == 0:
                assert context == whole[:1]
            elif share:
                window = min(longest, count)
                assert len(context) >= share * window
                assert len(scored) <= window - math.ceil(share * window) + 1
            done += len(scored)
        assert done == count


@pytest.fixture(scope="module")
def shy(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model with a tokenizer that has a BOS and adds none by itself."""
    place = tmp_path_factory.mktemp("shy") / "model"
    shutil.copytree(folder, place)
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": False,
        "use_regex": True,
    }
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(place)


@pytest.mark.parametrize("wanted", [None, True, False])
def test_add_bos_token_is_that_of_hf(wanted: bool | None, shy: str) -> None:
    own = HFLM(shy, device="cpu", max_length=LONGEST, add_bos_token=wanted)
    ours = PyramidInferLM(shy, "full", add_bos_token=wanted, **COMMON)
    assert ours.tok_encode("the map") == own.tok_encode("the map")
    assert (ours.tok_encode("the map")[0] == ours.prefix_token_id) == bool(wanted)
    assert ours.tok_encode("<bos> the map").count(ours.prefix_token_id) == 1
    pairs = asked(("the old baker", " walked"), ("", "the map"), (words(1, 40), " room 472 ."))
    ends = asked(("the old baker", {"until": ["."], "max_gen_toks": 6}))
    texts = asked((words(3, 50),))
    for value, other in zip(
        ours.loglikelihood(pairs, disable_tqdm=True),
        own.loglikelihood(pairs, disable_tqdm=True),
        strict=True,
    ):
        assert value == (pytest.approx(other[0], abs=1e-4), other[1])
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        own.loglikelihood_rolling(texts, disable_tqdm=True), abs=1e-4
    )
    assert ours.generate_until(ends, disable_tqdm=True) == own.generate_until(
        ends, disable_tqdm=True
    )


def test_add_bos_token_without_effect(shy: str) -> None:
    """Refused, and a tokenizer that is somebody's own is left as it is."""
    tokenizer = AutoTokenizer.from_pretrained(shy)
    with pytest.raises(ValueError, match="the tokenizer that was given adds no BOS"):
        PyramidInferLM(shy, "full", tokenizer=tokenizer, add_bos_token=True, **COMMON)
    assert not tokenizer.add_bos_token
    tokenizer.add_bos_token = True
    assert PyramidInferLM(shy, "full", tokenizer=tokenizer, add_bos_token=True, **COMMON)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"add_bos_token=True has no effect: .*has no BOS"):
        PyramidInferLM(shy, "full", tokenizer=tokenizer, add_bos_token=True, **COMMON)


# --- text, truncation, generation options --------------------------------------------------------


def test_chat_templates_and_tokens_are_those_of_hf(snapkv: PyramidInferLM, folder: str) -> None:
    own = HFLM(folder, device="cpu", max_length=LONGEST)
    chat = [{"role": "user", "content": "Where is the map ?"}]
    for prompt in (True, False):
        assert snapkv.apply_chat_template(chat, prompt) == own.apply_chat_template(chat, prompt)
    text = snapkv.apply_chat_template(chat)
    assert snapkv.tok_encode(text) == own.tok_encode(text)
    assert snapkv.tok_encode(text).count(snapkv.prefix_token_id) == 1
    assert snapkv.tok_encode("the map") == own.tok_encode("the map")
    assert snapkv.tokenizer_name == own.tokenizer_name
    assert snapkv.chat_template(True) == own.chat_template(True)
    assert (snapkv.prefix_token_id, snapkv.eot_token_id) == (own.prefix_token_id, own.eot_token_id)


def test_answers_go_into_lm_evals_cache(snapkv: PyramidInferLM) -> None:
    class Hook:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def add_partial(self, *entry: Any) -> None:
            self.seen.append(entry)

    snapkv.set_cache_hook(Hook())
    hook = snapkv.cache_hook
    (value,) = snapkv.loglikelihood(asked(("the old baker", " walked")), disable_tqdm=True)
    (total,) = snapkv.loglikelihood_rolling(asked(("the old baker",)), disable_tqdm=True)
    options = {"until": ["."], "max_gen_toks": 3}
    (text,) = snapkv.generate_until(asked(("the old", options)), disable_tqdm=True)
    assert hook.seen == [
        ("loglikelihood", ("the old baker", " walked"), value),
        ("loglikelihood_rolling", ("the old baker",), total),
        ("generate_until", ("the old", options), text),
    ]


def test_generation_options(snapkv: PyramidInferLM) -> None:
    params, stop = snapkv.sampling(
        {"until": "\n\n", "max_new_tokens": 5, "do_sample": False, "top_p": 0.9, "num_beams": 1}
    )
    assert (params.max_tokens, params.temperature, params.top_p) == (5, 0, 0.9)
    assert stop == ["\n\n", "<end>"] == list(params.stop)
    assert params.stop_token_ids == (snapkv.eot_token_id,)
    assert snapkv.sampling({})[0].max_tokens == snapkv.max_gen_toks == 256
    # a special token is not in the text, so that as a stop string it is an id
    user = snapkv.tokenizer.convert_tokens_to_ids("<user>")
    assert user in snapkv.sampling({"until": ["<user"]})[0].stop_token_ids
    sampled = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 8}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        (text,) = snapkv.generate_until(asked((words(1, 9), sampled)), disable_tqdm=True)
        texts.append(text)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_pp": 0.9}, "generation option 'top_pp'; did you mean 'top_p'"),
        ({"do_sample": True}, "do_sample=True needs a temperature"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"max_gen_toks": LONGEST}, "leaves no room for a context"),
        ({"max_gen_toks": 0}, "max_tokens=0"),
        ({"until": [5]}, "must be a text, or a list of texts"),
    ],
)
def test_bad_generation_options(
    snapkv: PyramidInferLM, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        snapkv.generate_until(asked(("the old baker", options)), disable_tqdm=True)


def test_continuations_that_cannot_be_scored(snapkv: PyramidInferLM) -> None:
    for text in (words(1, LONGEST + 1), "<bos>"):
        with pytest.raises(ValueError, match=r"tokens cannot be scored: .*max_length=96"):
            snapkv.loglikelihood(asked(("", text)), disable_tqdm=True)
    assert not snapkv.llm.engine.pool.tables


# --- arguments and the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"polcy": "full"},
            "unknown model argument 'polcy' with policy 'pyramid'; did you mean 'policy'",
        ),
        ({"policy": "snapkv", "windw": 8}, "did you mean 'window'"),
        ({"lora_modules": {"sql": "folder"}}, "give its folder as pretrained="),
        ({"policy": "full", "window": 8}, "unknown model argument 'window' with policy 'full'"),
        ({"policy": "snap"}, "unknown policy 'snap'; did you mean 'snapkv'"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"policy": "full", "keep": 0.5}, "policy 'full' keeps everything"),
        ({"page_size": 0}, "page_size=0"),
        ({"policy": "full", "max_length": POSITIONS + 1}, "more than the model's 160 positions"),
        ({"max_gen_toks": 0}, "max_gen_toks=0"),
        ({"rolling_context": 1}, "rolling_context=1 must be"),
        ({"kv_memory": "2 apples"}, "kv_memory='2 apples'"),
        ({"tokenizer": None}, "has no tokenizer"),
        ({"pretrained": "./nowhere"}, "'./nowhere' does not exist"),
    ],
)
def test_bad_arguments(folder: str, arguments: dict[str, Any], message: str) -> None:
    given = {"pretrained": folder, "kv_memory": "16MiB", **arguments}
    with pytest.raises(ValueError, match=re.escape(message)):
        get_model("pyramidinfer").create_from_arg_obj(given)


def test_arguments_as_text(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model arguments win over the command's own, whose default device may not be there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = f"pretrained={folder},policy=pyramidkv,keep=0.4,window=6,kv_memory=4MiB,max_requests=3"
    others = {"batch_size": "auto", "max_batch_size": None, "device": "cuda:0"}
    for arguments in (text, f"{text},device=cpu,batch_size=7"):
        lm = PyramidInferLM.create_from_arg_string(arguments, others)
        assert lm.device.type == "cpu"
        assert (lm.llm.policy.name, lm.llm.policy.keep, lm.llm.policy.window) == (
            "pyramidkv",
            0.4,
            6,
        )
        assert lm.llm.engine.config.max_requests == 3
    with pytest.raises(ValueError, match="model_args needs pretrained="):
        PyramidInferLM.create_from_arg_string("policy=full")


def test_the_entry_point_is_the_model() -> None:
    """What releases of lm-eval that look for plugins find."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    value = project["entry-points"]["lm_eval.models"]["pyramidinfer"]
    found: Registry[type[LM]] = Registry("model", base_cls=LM)
    found.register("pyramidinfer", target=EntryPoint("pyramidinfer", value, "lm_eval.models"))
    assert found.get("pyramidinfer") is get_model("pyramidinfer") is PyramidInferLM


def test_the_command_with_the_shipped_model(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": words(seed, 300)}) + "\n" for seed in range(2)))
    task = tmp_path / "stories.yaml"
    task.write_text(
        f"task: stories\ndataset_path: json\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        f'test_split: test\ndoc_to_text: ""\ndoc_to_target: "{{{{text}}}}"\n'
        f"metric_list: [{{metric: word_perplexity}}]\n"
    )
    code = (
        "import functools, runpy, sys, lm_eval.tasks as tasks;"
        # looking through lm-eval's thousands of own tasks takes most of the time
        "tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False);"
        "runpy.run_module('pyramidinfer.integrations.lm_eval', run_name='__main__')"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "--model",
            "pyramidinfer",
            "--model_args",
            f"pretrained={shipped_model()},policy=snapkv,keep=0.3,window=16,kv_memory=64MiB",
            "--tasks",
            str(task),
            "--output_path",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "word_perplexity" in done.stdout
    assert "'kept_share': 0.3" in done.stderr
    (written,) = (tmp_path / "out").rglob("results_*.json")
    shares = json.loads(written.read_text())["config"]["pyramidinfer"]["cache"]
    assert shares["loglikelihood_rolling"]["kept_share"] == pytest.approx(0.3, abs=0.02)
