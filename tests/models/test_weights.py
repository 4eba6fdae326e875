"""Weights in few bits: codes, products on them, whole models, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.config import EngineConfig
from pyramidinfer.engine import Engine
from pyramidinfer.models import ModelRunner
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.models.loading import empty_model
from pyramidinfer.models.ops import ADD, GATED, PLAIN, KernelOps
from pyramidinfer.models.weights import GROUP, code, decode, round_weights, stored_bytes
from tests.engine.build import policy_named
from tests.models.test_fused import PLAIN_FAMILIES, SHAPES, VARIANTS, near, own_logits, varied
from tests.native.isas import ISAS, backend, random
from tests.tiny import random_prompt, tiny_model

FEW = ("int8", "int4")
names = pytest.mark.parametrize("name", FEW)
DTYPES = (torch.float32, torch.bfloat16)
#: Of a group's range, what codes may be off: half a step, the rounding of a scale, and where 4 bits
#: cut a range off, what is outside.
OFF = {"int8": 0.51 / 254, "int4": 0.14}
#: Mean square error over mean square of normal numbers.
LOST = {"int8": 0.006, "int4": 0.08}


def rounded_rows(x: Tensor) -> Tensor:
    """What the kernels make of rows on their way in: 8 bits in groups, in float32."""
    groups = F.pad(x.float(), (0, -x.shape[1] % GROUP)).view(len(x), -1, GROUP)
    top = groups.abs().amax(-1, keepdim=True)
    by = torch.where(top > 0, 127 / top, 0)
    return ((groups * by).round() * (top / 127)).flatten(1)[:, : x.shape[1]]


@names
@pytest.mark.parametrize("depth", [32, 100, 576])
def test_codes_are_near(name: str, depth: int) -> None:
    weights = random(1, 70, depth) * random(2, 70, 1).exp()
    weights[3], weights[4] = 0, 0.25
    found = decode(code(weights, name))
    assert found.shape == weights.shape
    groups = F.pad(weights, (0, -depth % GROUP)).view(70, -1, GROUP)
    low, high = groups.aminmax(dim=-1)
    spread = (high - low) if name == "int4" else 2 * groups.abs().amax(-1)
    off = F.pad(found - weights, (0, -depth % GROUP)).view(70, -1, GROUP).abs()
    limit = OFF[name] * spread + 2**-10 * groups.abs().amax(-1)
    assert (off <= limit[..., None]).all()
    assert (found - weights).norm() <= LOST[name] * weights.norm()
    assert found[3].count_nonzero() == 0
    torch.testing.assert_close(found[4], weights[4], atol=0, rtol=2**-9)


@names
def test_what_has_been_coded_comes_back(name: str) -> None:
    """Coding what codes stand for changes next to nothing, as where a file had few bits before."""
    once = decode(code(random(1, 40, 96), name))
    again = decode(code(once, name))
    assert (again - once).norm() <= 1e-3 * once.norm()


def test_four_bits_search_a_range() -> None:
    """An outlier does not take all of the range from the others."""
    weights = random(1, 64, 32)
    weights[:, 0] = 6.0
    low, high = weights.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    whole = ((weights - low) / step).round() * step + low
    assert (decode(code(weights, "int4")) - weights).norm() < (whole - weights).norm()


# --- products -------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_equal_torch(isa: str, dtype: torch.dtype, bias: bool, name: str) -> None:
    """On what codes of weights and of rows stand for: as near as linears of 16 bits are."""
    ops = KernelOps(backend(isa).kernels, dtype, name)
    for rows, depth, columns in SHAPES:
        x = random(1, rows, depth, dtype=dtype)
        weights = [random(2 + i, n, depth, dtype=dtype) * 0.2 for i, n in enumerate((columns, 6))]
        biases = [random(5, columns, dtype=dtype) if bias else None, None]
        residual = random(6, rows, columns + 6, dtype=dtype)

        def product(weights: list[Tensor], biases: list[Tensor | None], x: Tensor = x) -> Tensor:
            parts = zip(weights, biases, strict=True)
            return torch.cat(
                [
                    F.linear(
                        rounded_rows(x), decode(code(w, name)), None if b is None else b.float()
                    )
                    for w, b in parts
                ],
                dim=1,
            ).to(x.dtype)

        expected = product(weights, biases)
        near(ops.linear(x, ops.pack(weights, biases, PLAIN), PLAIN), expected, dtype)
        got = ops.linear(x, ops.pack(weights, biases, PLAIN), ADD, residual)
        near(got, expected + residual, dtype)
        gates = [weights[0], random(7, columns, depth, dtype=dtype) * 0.2]
        biases[1] = random(8, columns, dtype=dtype) if bias else None
        gate, up = product(gates, biases).chunk(2, dim=1)
        got = ops.linear(x, ops.pack(gates, biases, GATED), GATED)
        near(got, F.silu(gate) * up, dtype)


@names
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_its_company(isa: str, name: str) -> None:
    ops = KernelOps(backend(isa).kernels, torch.float32, name)
    x, weights = random(1, 300, 96), ops.pack([random(2, 130, 96)], [None], PLAIN)
    whole = ops.linear(x, weights, PLAIN)
    for count in (1, 2, 3, 4, 5, 6, 7, 16, 200):
        assert ops.linear(x[:count], weights, PLAIN).equal(whole[:count])
        assert ops.linear(x[-count:], weights, PLAIN).equal(whole[-count:])


@names
@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_shows(isa: str, name: str) -> None:
    """In its own row, and in no other."""
    ops = KernelOps(backend(isa).kernels, torch.float32, name)
    weights = ops.pack([random(2, 70, 64)], [None], PLAIN)
    for wrong in (float("nan"), float("inf")):
        x = random(1, 3, 64)
        x[1, 40] = wrong
        found = ops.linear(x, weights, PLAIN)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()


@names
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_kernels_make_the_same_codes(isa: str, dtype: torch.dtype, name: str) -> None:
    """As the rules in torch, bit for bit: told by the numbers that they stand for."""
    ops = KernelOps(backend(isa).kernels, torch.float32, name)
    table = random(1, 130, 100) * (3 * random(2, 130, 1)).exp()
    table[3], table[4], table[5], table[6] = 0, 0.25, table[5] * 1e-7, table[6].abs()
    table = table.to(dtype)
    ids = torch.tensor([129, *range(130), 7])
    got = ops.rows(ops.pack([table], [None], PLAIN), ids)
    assert got.equal(decode(code(table, name))[ids])


@names
def test_what_is_no_number_stays_none(name: str) -> None:
    ops, table = KernelOps(backend("native").kernels, torch.float32, name), random(1, 5, 64)
    table[2, 40], table[3, 1] = float("nan"), float("inf")
    got = ops.rows(ops.pack([table], [None], PLAIN), torch.arange(5))
    assert got[2, 32:].isnan().all() and not got[3, :32].isfinite().any()
    assert got[[0, 1, 4]].isfinite().all() and got[2, :32].isfinite().all()


# --- whole models ---------------------------------------------------------------------------------


def build(model: Any, name: str, backend: str = "cpu", **options: Any) -> LLM:
    return LLM(model, "full", kv_memory="8MiB", backend=backend, weights=name, **options)


def apart(got: Tensor, expected: Tensor) -> float:
    """Mean divergence of next tokens."""
    a, b = got.float().log_softmax(-1), expected.float().log_softmax(-1)
    return float((b.exp() * (b - a)).sum(-1).mean())


@names
@pytest.mark.parametrize("variant", [*PLAIN_FAMILIES, "biases", "tied", "three-heads", "wide"])
def test_a_model_says_what_its_rounded_weights_say(variant: str, name: str) -> None:
    """All but for the rounding of rows: of a prompt in chunks, and of decoded tokens."""
    family, changes = VARIANTS[variant]
    model = varied(family, **changes)
    llm = build(model, name, prefill_chunk=40)
    assert llm.engine.runner.decoder.is_fused
    tokens = random_prompt(1, 100)
    (scored,) = llm.score([tokens[:80]], [tokens[80:]], logits=True)
    traced = llm.trace(tokens[:80], max_tokens=8)
    assert scored.logits is not None
    round_weights(model, name)
    expected = own_logits(model, tokens)[79:-1]
    assert apart(scored.logits, expected) < 5e-3
    decoded = own_logits(model, [*tokens[:80], *traced.token_ids])[-1]
    assert apart(traced.final_logits, decoded) < 5e-3


@names
def test_the_reference_rounds_a_copy(name: str) -> None:
    model, tokens = varied("gemma3_text"), random_prompt(1, 60)
    before = own_logits(model, tokens)
    llm = build(model, name, "reference")
    (scored,) = llm.score([tokens[:40]], [tokens[40:]], logits=True)
    assert own_logits(model, tokens).equal(before)
    round_weights(model, name)
    assert scored.logits is not None
    torch.testing.assert_close(scored.logits, own_logits(model, tokens)[39:-1], atol=1e-4, rtol=0)


@names
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_request_does_not_depend_on_its_company(dtype: torch.dtype, name: str) -> None:
    prompts = [random_prompt(seed, length) for seed, length in enumerate((90, 3, 300, 41, 1))]
    params = SamplingParams(max_tokens=16, ignore_eos=True, logprobs=2)
    model = tiny_model("llama", dtype)

    def answers(asked: list[list[int]], **options: Any) -> list[Any]:
        found = build(model, name, page_size=4, **options).generate(asked, params)
        return [(each.token_ids, each.logprobs) for each in found]

    together = answers(prompts)
    assert [answers([prompt])[0] for prompt in prompts] == together
    assert answers(prompts, prefill_chunk=13, step_tokens=40) == together


@names
@pytest.mark.parametrize("policy", ["pyramid", "h2o"])
def test_policies_run(policy: str, name: str) -> None:
    llm = LLM(
        tiny_model("llama"), policy_named(policy), kv_memory="8MiB", backend="cpu", weights=name
    )
    (out,) = llm.generate([random_prompt(1, 90)], SamplingParams(max_tokens=9, ignore_eos=True))
    assert len(out.token_ids) == 9 and out.kv.bytes < out.kv.full_bytes


@names
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_are_those_that_are_told(name: str, tied: bool, tmp_path: Path) -> None:
    """Of a model that is ours nothing stays in 16 bits but what is no linear."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    model = tiny_model("llama", tie_word_embeddings=tied, num_key_value_heads=2, **sizes)
    model.save_pretrained(tmp_path)
    plain = LLM(str(tmp_path), "full", kv_memory="4MiB", tokenizer=None, backend="cpu")
    llm = LLM(str(tmp_path), "full", kv_memory="4MiB", tokenizer=None, backend="cpu", weights=name)
    runner = llm.engine.runner
    left = [each.numel() for each in (*runner.body.parameters(), *runner.head.parameters())]
    assert sorted(left)[-1] == 64  # norms
    assert runner.weight_bytes == stored_bytes(empty_model(tmp_path)[0], name)
    assert runner.weight_bytes < 0.35 * plain.engine.runner.weight_bytes  # of float32
    assert fingerprint(runner) == fingerprint(plain.engine.runner)
    params = SamplingParams(max_tokens=8)
    prompt = random_prompt(6, 50)
    given = LLM(model, "full", kv_memory="4MiB", backend="cpu", weights=name)
    assert llm.generate([prompt], params)[0].token_ids == (
        given.generate([prompt], params)[0].token_ids
    )


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family,options,words",
    [
        ("gemma2", {}, "layers of Gemma 2 are not of Llama's kind"),
        ("llama", {"dtype": torch.float16}, "dtype='bfloat16'"),
        ("llama", {"hidden_act": "gelu"}, "gated by 'gelu'"),
    ],
)
def test_models_without_such_linears(family: str, options: Any, words: str, tmp_path: Path) -> None:
    """Before weights are read, and of a model that is handed in."""
    model = tiny_model(family, **options)
    with pytest.raises(ValueError, match=f"weights='int8': .*{words}.*backend='reference'"):
        build(model, "int8")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=words):
        build(str(tmp_path), "int8", tokenizer=None)


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="weights='int3' .*auto, gguf, int4, int8"):
        EngineConfig(weights="int3")
    with pytest.raises(ValueError, match="weights='int8' works on one rank only"):
        EngineConfig(weights="int8", tensor_parallel_size=2)
    with pytest.raises(
        ValueError, match="backend 'triton' multiplies weights in the model's dtype"
    ):
        build(tiny_model("llama"), "int4", "triton")
    runner = ModelRunner(tiny_model("llama"), "cpu", weights="int8")
    with pytest.raises(ValueError, match="weights='auto', but the runner given .* 'int8'"):
        Engine(runner, policy_named("full"), EngineConfig(kv_memory="4MiB"))


@names
def test_inspect_tells_bytes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pyramidinfer.cli.choices import InspectOptions
    from pyramidinfer.cli.inspect import run_inspect

    asked = InspectOptions(prompt_len=100, max_tokens=10, as_json=True)
    run_inspect(None, policy_named("full"), "float32", EngineConfig(weights=name), asked)
    told = json.loads(capsys.readouterr().out)
    assert told["weights"] == name
    run_inspect(None, policy_named("full"), "float32", EngineConfig(), asked)
    assert told["weight_bytes"] < 0.35 * json.loads(capsys.readouterr().out)["weight_bytes"]
