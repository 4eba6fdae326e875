"""What each head needs, against attention worked out as a full matrix; and where it is found."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AttentionInterface

from pyramidinfer import LLM
from pyramidinfer.engine import profiling
from pyramidinfer.engine.english import library_paragraphs, paragraphs
from pyramidinfer.engine.passages import (
    AGAIN,
    LENGTH,
    Passages,
    english_passages,
    passages_for,
    room_for,
    text_passages,
)
from pyramidinfer.engine.profiling import (
    ensure_profile,
    find_profile,
    head_shares,
    look_up,
    profile_model,
    rank_correlation,
    store_profile,
    watch,
)
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.policies.profile import Profile
from tests.lab.test_samples import WORDS, other_tokenizer
from tests.tiny import random_prompt, tiny_model

PASSAGES = Passages(
    "made up", ((random_prompt(1, 60), random_prompt(2, 50)), (random_prompt(3, 60),)), 1, [5, 6, 7]
)


def engine_of(family: str, dtype: torch.dtype = torch.float64, **sizes: Any) -> LLM:
    model = tiny_model(family, dtype, **sizes)
    return LLM(model, "full", kv_memory="4MiB", page_size=4)


def weights(family: str, passage: list[int], repeated: list[int], **sizes: Any) -> list[Any]:
    """``[kv_heads, passage]`` per layer: transformers' model, its attention as a full matrix."""
    seen: list[Any] = []

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        kv, length = key.shape[1], key.shape[2]
        logits = torch.einsum("kgqd,knd->kgqn", query[0].unflatten(0, (kv, -1)), key[0]) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        back = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (back < 0) | (back >= (sliding_window or length))
        probs = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        seen.append(probs[:, :, len(passage) :, : len(passage)].amax((1, 2)).numpy())
        out = torch.einsum("kgqn,knd->kgqd", probs, value[0]).flatten(0, 1)
        return out.transpose(0, 1)[None], None

    AttentionInterface.register("full_matrix", attend)
    model = tiny_model(family, torch.float64, **sizes)
    model.set_attn_implementation("full_matrix")
    with torch.no_grad():
        model(torch.tensor([[*passage, *repeated]]), use_cache=False)
    assert len(seen) == model.config.num_hidden_layers
    return seen


# --- the measurement ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma2", "gemma3_text", "granite"])
def test_scores_are_those_of_the_full_matrix(family: str) -> None:
    passage = random_prompt(4, 70)
    repeated = [9, 8, *passage[1:]]
    llm = engine_of(family)
    found = watch(llm.engine.runner, llm.engine.pool, passage, repeated).scores
    governed = llm.engine.runner.layers_for(142).governed
    assert [layer for layer, each in enumerate(governed) if each] == sorted(found)
    assert all(governed) == (not family.startswith("gemma"))
    for layer, wanted in enumerate(weights(family, passage, repeated)):
        if layer in found:
            assert found[layer].numpy() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert llm.engine.scheduler.idle and llm.engine.pool.budget_used == 0
    llm.engine.check()


@pytest.mark.parametrize("chunk", [7, 1024])
def test_chunks_and_kernels_change_nothing(chunk: int) -> None:
    passage, repeated = random_prompt(4, 70), [9, 8, *random_prompt(4, 70)[1:]]
    llm = LLM(tiny_model("llama"), "full", kv_memory="4MiB", prefill_chunk=chunk, step_tokens=11)
    found = watch(llm.engine.runner, llm.engine.pool, passage, repeated).scores
    for layer, wanted in enumerate(weights("llama", passage, repeated)):
        assert found[layer].numpy() == pytest.approx(wanted, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_a_profile_is_what_brute_force_finds(family: str) -> None:
    """Sorted scores of all heads, by hand: every step is done another way."""
    profile = profile_model(engine_of(family).engine.shared, PASSAGES, progress=False)
    layers = [layer for layer, each in enumerate(profile.governed) if each]
    halves = []
    for half in PASSAGES.halves:
        shares = []
        for passage in half:
            seen = weights(family, passage, [5, 6, 7, *passage[1:]])
            heads = [row[4:].tolist() for layer in layers for row in seen[layer]]
            every = sorted((value for row in heads for value in row), reverse=True)
            least = every[round(0.2 * len(every)) - 1]
            shares.append([sum(value >= least for value in row) / len(row) for row in heads])
        halves.append(shares)
    wanted = np.mean(halves[0] + halves[1], axis=0)
    flat = [share for layer in layers for share in profile.share[layer]]
    assert flat == pytest.approx(wanted, abs=1e-5) and len(set(flat)) > 3
    assert sum(flat) / len(flat) == pytest.approx(0.2, abs=0.01)
    first, second = (np.mean(half, axis=0) for half in halves)
    assert profile.agreement == pytest.approx(spearmanr(first, second).statistic, abs=1e-4)
    assert profile.lengths == (60, 50, 60) and profile.text == "made up" and profile.kept == 0.2
    for layer, row in enumerate(profile.share):
        assert profile.governed[layer] or not any(row)


def unrotated(family: str, passage: list[int]) -> list[Tensor]:
    """Per layer ``[heads, n, key_dim]``: queries as transformers' modules have them before they
    rotate, times the softmax's scale."""
    model, found = tiny_model(family, torch.float64), []
    body = model.get_submodule(
        {"gpt_neox": "gpt_neox", "opt": "model.decoder"}.get(family, "model")
    )
    for layer in body.layers:
        attention: Any = layer.attention if family == "gpt_neox" else layer.self_attn
        part = {"gpt_neox": "query_key_value", "gemma3_text": "q_norm"}.get(family, "q_proj")
        attention.get_submodule(part).register_forward_hook(lambda *seen: found.append(seen[2]))
    with torch.no_grad():
        model(torch.tensor([passage]), use_cache=False)
    if family == "gemma3_text":  # [1, heads, n, key_dim] already
        return [each[0] * 8**-0.5 for each in found]
    if family == "gpt_neox":  # a head's queries, keys and values side by side
        found = [each.unflatten(-1, (4, 3, 8))[..., 0, :] for each in found]
    return [
        each[0].unflatten(-1, (4, 8)).transpose(0, 1) * 8**-0.5
        if each.dim() == 3
        else each[0].transpose(0, 1) * 8**-0.5
        for each in found
    ]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "opt"])
def test_centres_are_means_of_queries_before_rotation(family: str) -> None:
    """Of all passages, their first four tokens left out, in layers with a window as well."""
    found = profile_model(engine_of(family).engine.shared, PASSAGES, progress=False).queries
    assert found is not None
    pairs = {"gpt_neox": 2, "opt": 0}.get(family, 4)
    passages = [unrotated(family, passage) for passage in PASSAGES.all]
    for layer, (means, sizes) in enumerate(zip(found.mean, found.sizes, strict=True)):
        for head, (mean, size) in enumerate(zip(means, sizes, strict=True)):
            rows = [each[layer][head, 4:] for each in passages]
            wanted = sum(row.mean(0) for row in rows) / len(rows)
            assert list(mean) == pytest.approx(wanted.tolist(), rel=1e-3)
            lengths = [
                float(sum(row[:, f].hypot(row[:, f + pairs]).mean() for row in rows)) / len(rows)
                for f in range(pairs)
            ]
            assert list(size) == pytest.approx(lengths, rel=1e-3)
            assert all(float(f"{value:.4g}") == value for value in (*mean, *size))


def test_a_profile_is_the_same_again_and_leaves_the_engine_alone() -> None:
    llm = engine_of("llama")
    before = llm.engine.pool.peak_bytes
    first = profile_model(llm.engine.shared, PASSAGES, progress=False)
    assert profile_model(llm.engine.shared, PASSAGES, progress=False) == first
    assert llm.engine.pool.peak_bytes == before and llm.engine.scheduler.idle
    tight = LLM(tiny_model("llama", torch.float64), "full", kv_memory=9000, page_size=4)
    assert profile_model(tight.engine.shared, PASSAGES, progress=False) == first, (
        "its own pool is of no matter"
    )


def test_shares_by_hand() -> None:
    scores = {
        0: torch.tensor([[9.0] * 4 + [5, 1, 1, 1, 1], [9.0] * 4 + [4, 4, 4, 0, 0]]),
        3: torch.tensor([[9.0] * 4 + [0, 0, 0, 0, 0], [0.0] * 4 + [0, 0, 0, 0, 6]]),
    }  # the first four are sinks
    assert head_shares(scores, 0.25) == {0: [0.2, 0.6], 3: [0.0, 0.2]}
    assert head_shares(scores, 0.15) == {0: [0.2, 0.2], 3: [0.0, 0.2]}  # of equals the earlier


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 90]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    mine, other = [0.1, 0.1, 0.4, 0.2, 0.9], [0.3, 0.1, 0.1, 0.2, 0.8]
    assert rank_correlation(mine, other) == pytest.approx(spearmanr(mine, other).statistic)
    assert rank_correlation([1, 1], [2, 2]) == 1 and rank_correlation([1, 1], [1, 2]) == 0


def test_layers_bounded_by_a_window_are_left_out_or_refused() -> None:
    profile = profile_model(engine_of("gemma3_text").engine.shared, PASSAGES, progress=False)
    assert profile.governed == (False, False, True) * 2
    with pytest.raises(ValueError, match="every layer of this model has a sliding window"):
        profile_model(engine_of("mistral").engine.shared, PASSAGES)


def test_the_bar_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for wanted in (None, False, True):
        profile_model(engine_of("llama").engine.shared, PASSAGES, progress=wanted)
        shown = capsys.readouterr()
        assert ("what each head needs" in shown.err) == (wanted is True) and not shown.out
    told: list[int] = []
    engine = engine_of("llama").engine
    watch(engine.runner, engine.pool, [3] * 30, [3] * 20, told.append)
    assert sum(told) == 4 * 50 and min(told) >= 0


def test_an_interrupted_measurement_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = engine_of("llama")

    def stopped(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(llm.engine.runner, llm.engine.pool, [3] * 30, [3] * 20, stopped)
    assert llm.engine.pool.budget_used == 0 and llm.engine.scheduler.idle
    llm.engine.check()


# --- passages -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaks() -> LLM:
    """A tiny model whose tokenizer knows English words."""
    model = tiny_model("llama", vocab_size=len(WORDS), max_position_embeddings=2048)
    return LLM(model, "full", kv_memory="4MiB", tokenizer=other_tokenizer())


def test_the_halves_are_of_two_texts(speaks: LLM) -> None:
    found = english_passages(speaks.engine.runner, speaks.tokenizer)
    texts = " ".join(paragraphs()), " ".join(library_paragraphs())
    encode = speaks.tokenizer.encode
    whole = [" ".join(map(str, encode(each, add_special_tokens=False))) for each in texts]
    for half, mine, other in zip(found.halves, whole, whole[::-1], strict=True):
        assert len(half) == 2 and half[0] != half[1]
        for passage in half:
            assert len(passage) == LENGTH and passage[0] == speaks.tokenizer.bos_token_id
            said = " ".join(map(str, passage[1:]))
            assert said in mine and said not in other
    assert found.repeated(found.all[0])[-(LENGTH - 1) :] == found.all[0][1:]
    assert found.again == encode(AGAIN, add_special_tokens=False) and found.head == 1
    assert "language reference" in found.name and "docstrings" in found.name


def test_a_text_of_ones_own_is_halved(speaks: LLM) -> None:
    runner, tokenizer = speaks.engine.runner, speaks.tokenizer
    text = " ".join(paragraphs())[:40_000]
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = text_passages(runner, tokenizer, text, "mine.txt")
    starts = [ids.index(passage[1]) for passage in found.all]
    assert starts[0] == 0 and all(passage[0] == tokenizer.bos_token_id for passage in found.all)
    for index, passage in enumerate(found.all):
        at = index * (len(ids) // 4)
        assert passage[1:] == ids[at : at + LENGTH - 1]
    few = tokenizer.decode(ids[:900])
    assert all(len(each) == 226 for each in text_passages(runner, tokenizer, few, "a").all)
    with pytest.raises(ValueError, match=r"mine.txt has \d+ tokens; .* at least 796 of them"):
        text_passages(runner, tokenizer, tokenizer.decode(ids[:700]), "mine.txt")


def test_models_with_few_positions(speaks: LLM) -> None:
    def of(family: str, **sizes: Any) -> Any:
        return engine_of(family, vocab_size=len(WORDS), **sizes).engine.runner

    again = len(speaks.tokenizer.encode(AGAIN, add_special_tokens=False))
    room = room_for(of("llama", max_position_embeddings=512), again)
    assert 2 * room + again + 1 <= 512 < 2 * (room + 1) + again + 1
    small = engine_of("llama", vocab_size=len(WORDS), max_position_embeddings=160)
    small.tokenizer = small.engine.shared.tokenizer = speaks.tokenizer
    made = profile_model(small.engine.shared)
    assert made.lengths[0] == room_for(small.engine.runner, again) > 64
    with pytest.raises(ValueError, match="the model has 100 positions"):
        room_for(of("llama", max_position_embeddings=100), again)
    with pytest.raises(ValueError, match="the model has 64 positions"):
        room_for(of("phi3"), again)  # its rotary positions change there


def test_without_a_tokenizer_random_tokens_are_read() -> None:
    bare = engine_of("llama")
    found = passages_for(bare.engine.runner, None)
    every = [token for passage in found.all for token in passage]
    assert len(found.all) == 4 and len(set(map(tuple, found.all))) == 4
    assert set(every) <= set(range(bare.engine.runner.vocab_size)) and len(set(every)) > 50
    profile = profile_model(bare.engine.shared)
    assert "without a tokenizer" in profile.text and profile.lengths == (len(found.all[0]),) * 4
    assert profile == profile_model(engine_of("llama").engine.shared), "the same tokens every time"


def test_what_cannot_be_measured_is_told(speaks: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="without a tokenizer, so a text cannot be read"):
        text_passages(engine_of("llama").engine.runner, None, "a text", "mine.txt")
    shipped = LLM(shipped_model(), "full", kv_memory="4MiB")
    with pytest.raises(ValueError, match="most of .* is unknown to the model's tokenizer"):
        profile_model(shipped.engine.shared)
    with pytest.raises(ValueError, match="at least one passage in each half"):
        Passages("x", ((), ([1],)))
    monkeypatch.setattr("pyramidinfer.engine.passages.library_paragraphs", tuple)
    with pytest.raises(ValueError, match="without its library's sources"):
        profile_model(speaks.engine.shared)


# --- where it is found ----------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """The package's profiles, and the user's."""
    monkeypatch.setattr(profiling, "shipped_folder", lambda: tmp_path / "package")
    monkeypatch.setattr(profiling, "profiles_folder", lambda: tmp_path / "user" / "profiles")
    yield tmp_path / "package", tmp_path / "user" / "profiles"


def test_the_packages_profile_goes_before_the_users(folders: tuple[Path, Path]) -> None:
    llm = engine_of("llama")
    assert find_profile(llm.engine.shared) is None and look_up(llm.engine.runner) is None
    made = profile_model(llm.engine.shared, PASSAGES, progress=False)
    path = store_profile(made)
    assert path.parent == folders[1] and find_profile(llm.engine.shared) == made
    other = replace(made, text="shipped")
    other.save(folders[0] / f"{made.fingerprint.key}-x.json")
    found = look_up(llm.engine.runner)
    assert found is not None and found.profile == other and found.path.parent == folders[0]
    assert find_profile(engine_of("llama", torch.bfloat16).engine.shared) == other
    assert find_profile(engine_of("llama", vocab_size=121).engine.shared) is None
    assert find_profile(engine_of("qwen3").engine.shared) is None
    stranger = engine_of("llama")
    with torch.no_grad():
        stranger.engine.runner.body.norm.weight *= 1.1
    assert find_profile(stranger.engine.shared) is None, "of the same sizes, but other weights"


def test_what_is_not_there_is_measured_once(
    folders: tuple[Path, Path], speaks: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measure(source: Any, passages: Any = None, progress: Any = None) -> Profile:
        calls.append(progress)
        return profile_model(source, passages or few, progress)

    few = Passages("few", ((random_prompt(1, 40),), (random_prompt(2, 40),)))
    monkeypatch.setattr(profiling, "profile_model", measure)
    first = ensure_profile(speaks.engine.shared, progress=False)
    assert ensure_profile(speaks.engine.shared) == first == find_profile(
        speaks.engine.shared
    ) and calls == [False]
    (path,) = folders[1].iterdir()
    assert path.name.startswith(first.fingerprint.key)

    path.write_text(path.read_text()[:200])  # as a full disk leaves it
    with pytest.warns(RuntimeWarning, match=rf"passed over: '{path}' is not a head profile"):
        assert find_profile(speaks.engine.shared) is None
    with pytest.warns(RuntimeWarning, match="passed over"):
        assert ensure_profile(speaks.engine.shared) == first
    assert len(calls) == 2 and find_profile(speaks.engine.shared) == first

    (folders[1] / f"{first.fingerprint.key}-zzz.json").write_text("{")
    store_profile(replace(first, text="newer"))
    assert list(folders[1].iterdir()) == [path], "what it takes the place of is gone"
    assert ensure_profile(speaks.engine.shared).text == "newer" and len(calls) == 2


def test_another_models_file_stays(folders: tuple[Path, Path]) -> None:
    llm, other = engine_of("llama"), engine_of("llama")
    with torch.no_grad():
        other.engine.runner.body.norm.weight *= 1.1
    paths = [store_profile(profile_model(each.engine.shared, PASSAGES)) for each in (llm, other)]
    assert sorted(folders[1].iterdir()) == sorted(paths) and paths[0] != paths[1]
    assert [look_up(each.engine.runner).path for each in (llm, other)] == paths  # type: ignore[union-attr]


def test_a_folder_that_cannot_be_written(
    folders: tuple[Path, Path], speaks: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = profile_model(
        speaks.engine.shared, Passages("few", ((random_prompt(1, 40),), (random_prompt(2, 40),)))
    )
    monkeypatch.setattr(profiling, "profile_model", lambda *a, **k: made)
    folders[1].parent.mkdir()
    folders[1].write_text("a file stands where the folder should")
    with pytest.warns(RuntimeWarning, match="cannot be stored in .*set PYRAMIDINFER_CACHE"):
        assert ensure_profile(speaks.engine.shared) == made


def test_files_can_be_read_by_others(folders: tuple[Path, Path]) -> None:
    path = store_profile(profile_model(engine_of("llama").engine.shared, PASSAGES))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_the_package_holds_profiles() -> None:
    """Whole ones, and the shipped model's is found by its weights."""
    files = sorted(profiling.shipped_folder().glob("*.json"))
    assert len(files) == 3
    for path in files:
        profile = Profile.load(path)
        assert path.name.startswith(profile.fingerprint.key)
        assert profile.agreement > 0.9 and profile.commit and profile.queries is not None
    for dtype in ("float32", "bfloat16"):
        found = look_up(LLM(shipped_model(), "full", kv_memory="4MiB", dtype=dtype).engine.runner)
        assert found is not None and found.path.name.endswith("-shipped.json")
