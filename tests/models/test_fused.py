"""Plain layers fused and prepacked say what the model's own forward says, and leave it alone."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models import ModelRunner
from pyramidinfer.models import fused as fusing
from pyramidinfer.models.families import FAMILIES
from pyramidinfer.models.loading import shipped_model
from pyramidinfer.models.ops import ADD, GATED, PLAIN, Heads, KernelOps, TorchOps
from tests.engine.build import policy_named
from tests.native.isas import ISAS, backend, random
from tests.tiny import model_greedy, random_prompt, tiny_model

PLAIN_FAMILIES = sorted(name for name, family in FAMILIES.items() if family.plain)
#: family, changes of the config: biases, groups of all sizes, sizes that fill no panel, tied heads.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PLAIN_FAMILIES},
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "num_key_value_heads": 1}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "one-kv-head": ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "three-heads": (
        "llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "hidden_size": 36,
            "intermediate_size": 70,
            "vocab_size": 121,
        },
    ),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied-qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "some-of-a-head": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "wide": (
        "llama",
        {
            "hidden_size": 320,
            "intermediate_size": 400,
            "num_attention_heads": 5,
            "num_key_value_heads": 1,
            "initializer_range": 0.05,
        },
    ),
}
KERNELS = backend("native").kernels
DTYPES = [each for each in (torch.float32, torch.bfloat16) if KERNELS.multiplies(each)]
#: In units of the largest logit.
CLOSE = {torch.float32: 1e-4, torch.float16: 5e-3}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def varied(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model whose norms and biases are no ones and zeros."""
    model = tiny_model(family, **changes)
    for index, parameter in enumerate(model.parameters()):
        if parameter.dim() == 1:
            parameter.data += 0.3 * random(index, *parameter.shape)
    return model.to(dtype)


def build(model: Any, policy: str = "full", **options: Any) -> LLM:
    options = {"kv_memory": "8MiB", "page_size": 4, "backend": "cpu", **options}
    return LLM(model, policy=policy_named(policy), **options)


@torch.no_grad()
def own_logits(model: Any, tokens: list[int]) -> Tensor:
    """``[tokens, vocab]`` of the model's own forward."""
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def assert_close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.shape == expected.shape
    unit = float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected.double(), atol=CLOSE[dtype] * unit, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [90, 6])  # both sides of long-rope's original positions
def test_logits_are_the_models_own(variant: str, length: int) -> None:
    """Of a prompt in chunks, of many rows on top of it, and of single decoded tokens."""
    family, changes = VARIANTS[variant]
    model = varied(family, **changes)
    llm = build(model, prefill_chunk=40)
    assert llm.engine.runner.decoder.is_fused
    tokens = random_prompt(length, length + 20)
    (scored,) = llm.score([tokens[:length]], [tokens[length:]], logits=True)
    assert scored.logits is not None
    assert_close(scored.logits, own_logits(model, tokens)[length - 1 : -1], torch.float32)
    traced = llm.trace(tokens[:length], max_tokens=8)
    expected = own_logits(model, [*tokens[:length], *traced.token_ids])
    assert_close(traced.final_logits, expected[-1], torch.float32)
    assert traced.token_ids == expected[length - 1 : -1].argmax(-1).tolist()


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="no products of bf16 on this CPU")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [90, 6])
def test_bf16_is_no_further_off_than_the_models_own(variant: str, length: int) -> None:
    """From the same weights in float32: of all rows on top of a prompt, and of decoded tokens."""
    family, changes = VARIANTS[variant]
    model = varied(family, torch.bfloat16, **changes)
    llm = build(model, prefill_chunk=40)
    assert llm.engine.runner.decoder.is_fused
    tokens = random_prompt(length, length + 30)
    (scored,) = llm.score([tokens[:length]], [tokens[length:]], logits=True)
    traces = [llm.trace(random_prompt(seed, length), max_tokens=8) for seed in range(8)]
    texts = [[*trace.prompt_token_ids, *trace.token_ids] for trace in traces]

    def said() -> list[Tensor]:
        return [
            own_logits(model, tokens)[length - 1 : -1].float(),
            torch.stack([own_logits(model, text)[-1] for text in texts]).float(),
        ]

    assert scored.logits is not None
    found = [scored.logits, torch.stack([trace.final_logits for trace in traces])]
    own = said()
    model.float()
    for got, theirs, exact in zip(found, own, said(), strict=True):
        assert (got.float() - exact).norm() <= 1.3 * (theirs - exact).norm()


@dtypes
@pytest.mark.parametrize("variant", ["llama", "phi3", "tied", "biases", "qwen3"])
def test_a_model_handed_in_stays_as_it_was(variant: str, dtype: torch.dtype) -> None:
    family, changes = VARIANTS[variant]
    model = varied(family, dtype, **changes)
    prompt = random_prompt(3, 30)
    before = model_greedy(model, prompt, 8)
    state = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    modules = [type(each) for each in model.modules()]
    llm = build(model, "pyramid")
    llm.generate([prompt, random_prompt(4, 70)], SamplingParams(max_tokens=12))
    llm.score([prompt], [random_prompt(5, 9)])
    after = model.state_dict()
    assert after.keys() == state.keys()
    for name, (place, value) in state.items():
        assert after[name].data_ptr() == place, name
        assert after[name].equal(value), name
    assert [type(each) for each in model.modules()] == modules
    assert model_greedy(model, prompt, 8) == before


@pytest.mark.parametrize("variant", ["llama", "phi3", "tied"])
def test_of_a_model_that_is_ours_packed_weights_are_let_go(variant: str, tmp_path: Path) -> None:
    """Their memory is not taken twice; a tied head's embeddings are read from what is packed."""
    family, changes = VARIANTS[variant]
    model = varied(family, **changes)
    model.save_pretrained(tmp_path)
    llm = LLM(str(tmp_path), "full", kv_memory="4MiB", tokenizer=None, backend="cpu")
    assert llm.engine.runner.decoder.is_fused
    layers = llm.engine.runner.body.layers
    linears = [each for each in layers.modules() if isinstance(each, nn.Linear)]
    assert linears and all(each.weight.numel() == 0 and each.bias is None for each in linears)
    assert llm.engine.runner.head.weight.numel() == 0
    embedding = llm.engine.runner.body.embed_tokens.weight.numel()
    assert embedding == (0 if variant == "tied" else model.lm_head.weight.numel())
    prompt = random_prompt(6, 50)
    params = SamplingParams(max_tokens=10)
    assert llm.generate([prompt], params)[0].token_ids == model_greedy(model, prompt, 10)


# --- what is not plain ---------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear with a low-rank addition beside it, as adapters put in its place."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.base(x) + self.up(self.down(x))
        return added


def subclass(model: Any) -> None:
    attention = model.model.layers[1].self_attn

    class Doubled(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    attention.__class__ = Doubled


def runner(model: Any) -> None:
    model.model.layers[2].mlp.up_proj = Adapted(model.model.layers[2].mlp.up_proj)


def patched(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 0.5


def hooked(name: str) -> Any:
    def change(model: Any) -> None:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, given, out: 1.5 * out)

    change.__name__ = f"hook on {name}"
    return change


def hooked_before(model: Any) -> None:
    module = model.model.layers[3].self_attn.o_proj
    module.register_forward_pre_hook(lambda module, given: (0.5 * given[0],))


CHANGES = [
    subclass,
    runner,
    patched,
    hooked_before,
    hooked("model.layers.1.mlp"),
    hooked("model.layers.0.input_layernorm"),
    hooked("model.norm"),
    hooked("lm_head"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda each: each.__name__)
def test_a_layer_that_was_changed_runs_as_changed(change: Any) -> None:
    """Through its own modules, whatever somebody did to them."""
    prompt = random_prompt(8, 40)
    model = varied("llama")
    untouched = own_logits(model, prompt)[-1]
    change(model)
    expected = own_logits(model, prompt)[-1]
    assert not torch.allclose(expected, untouched, atol=1e-2)
    llm = build(model)
    assert not llm.engine.runner.decoder.is_fused
    traced = llm.trace(prompt, max_tokens=6)
    assert_close(traced.prefill_logits, expected, torch.float32)
    assert_close(
        traced.final_logits, own_logits(model, prompt + traced.token_ids)[-1], torch.float32
    )


@pytest.mark.parametrize("why", ["gelu", "float64", "float16", "odd", "reference", "gemma2"])
def test_what_the_kernels_do_not_do_runs_in_torch(why: str) -> None:
    dtype = {"float64": torch.float64, "float16": torch.float16}.get(why, torch.float32)
    changes: dict[str, Any] = {"gelu": {"hidden_act": "gelu"}, "odd": {"intermediate_size": 49}}
    model = varied("gemma2" if why == "gemma2" else "llama", dtype, **changes.get(why, {}))
    llm = build(model, backend="reference" if why == "reference" else "cpu")
    assert not llm.engine.runner.decoder.is_fused
    prompt = random_prompt(8, 40)
    traced = llm.trace(prompt, max_tokens=6)
    limit = torch.float16 if why == "float16" else torch.float32
    assert_close(traced.final_logits, own_logits(model, prompt + traced.token_ids)[-1], limit)


def test_without_weights_nothing_is_packed() -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    assert not ModelRunner(model, "cpu").decoder.is_fused


# --- the last layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "pyramid", "pyramidinfer", "snapkv", "h2o", "tova"])
@pytest.mark.parametrize("chunk", [1024, 16])
def test_the_last_layer_answers_for_last_tokens_only(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reads the others; logits, entries and tokens are the same without the short cut."""
    model, prompt = varied("llama"), random_prompt(1, 100)
    given: list[int] = []
    run = fusing.FusedLayer.__call__

    def watched(self: Any, flat: Tensor, ropes: Any, call: Any) -> Tensor:
        out = run(self, flat, ropes, call)
        if call.layer == 3:
            given.append(len(out))
        return out

    monkeypatch.setattr(fusing.FusedLayer, "__call__", watched)
    llm = build(model, name, prefill_chunk=chunk)
    given.clear()  # of the model's head profile
    short = llm.trace(prompt, max_tokens=10)
    assert sum(given) == 1  # decode steps run in one call of the kernels
    monkeypatch.setattr(ModelRunner, "_last_only", lambda self, layer: False)
    llm = build(model, name, prefill_chunk=chunk)
    given.clear()
    whole = llm.trace(prompt, max_tokens=10)
    assert sum(given) == whole.computed_by_layer[3]
    torch.testing.assert_close(short.prefill_logits, whole.prefill_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(short.final_logits, whole.final_logits, atol=1e-4, rtol=1e-4)
    assert short.token_ids == whole.token_ids
    assert short.kept_len_by_step == whole.kept_len_by_step
    for one, other in zip(short.kept_positions, whole.kept_positions, strict=True):
        assert all(mine.equal(its) for mine, its in zip(one, other, strict=True))
    if name == "full":
        assert short.prefill_logits.equal(whole.prefill_logits)


def test_several_prompts_and_decoding_rows_share_a_last_layer() -> None:
    """Prompts that end in one step, beside rows that decode and chunks that do not end."""
    model = varied("llama")
    llm = build(model, prefill_chunk=20, step_tokens=64)
    params, prompts = SamplingParams(max_tokens=12, ignore_eos=True), []
    requests = []
    for seed, length in enumerate((30, 5, 90, 20, 41, 1)):
        prompts.append(random_prompt(seed, length))
        requests.append(llm.engine.add(prompts[-1], params))
        llm.engine.step()
    while not llm.engine.scheduler.idle:
        llm.engine.step()
    for request, prompt in zip(requests, prompts, strict=True):
        expected = own_logits(model, prompt + request.output)[len(prompt) - 1 : -1].argmax(-1)
        assert request.output == expected.tolist()


# --- one operation at a time ---------------------------------------------------------------------

OPS = [
    pytest.param(isa, dtype, id=f"{isa}-{dtype}")
    for isa in ISAS
    for dtype in (torch.float32, torch.bfloat16)
    if backend(isa).kernels.multiplies(dtype)
]
SHAPES = [(1, 32, 48), (5, 64, 120), (3, 6, 10), (200, 96, 70), (13, 320, 129)]
#: One rounding of a result whose size is about that of ``unit``; sums in another order.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2**-7}


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    unit = max(1.0, float(expected.float().abs().max()))
    torch.testing.assert_close(got, expected, atol=NEAR[dtype] * unit, rtol=0)


@pytest.mark.parametrize("isa,dtype", OPS)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_equal_torch(isa: str, dtype: torch.dtype, bias: bool) -> None:
    """Side by side, with a residual, gated; rows and columns that fill no tile or panel."""
    kernels, plain = KernelOps(backend(isa).kernels, dtype), TorchOps()
    for rows, depth, columns in SHAPES:
        x = random(1, rows, depth, dtype=dtype)
        weights = [random(2 + i, n, depth, dtype=dtype) * 0.2 for i, n in enumerate((columns, 6))]
        # The second has none of its own: its part of the joined bias is zero.
        biases = [random(5, columns, dtype=dtype) if bias else None, None]
        residual = random(6, rows, columns + 6, dtype=dtype)
        for how, more in ((PLAIN, None), (ADD, residual)):
            got, expected = (
                ops.linear(x, ops.pack(weights, biases, how), how, more) for ops in (kernels, plain)
            )
            near(got, expected, dtype)
        gates = [weights[0], random(7, columns, depth, dtype=dtype) * 0.2]
        biases[1] = random(8, columns, dtype=dtype) if bias else None
        got, expected = (
            ops.linear(x, ops.pack(gates, biases, GATED), GATED) for ops in (kernels, plain)
        )
        near(got, expected, dtype)


@pytest.mark.parametrize("isa,dtype", OPS)
@pytest.mark.parametrize("size", [6, 32, 100])
def test_norms_equal_torch(isa: str, dtype: torch.dtype, size: int) -> None:
    x, weight = random(1, 7, size, dtype=dtype), random(2, size, dtype=dtype)
    got = KernelOps(backend(isa).kernels, dtype).norm(x, weight, 1e-5)
    near(got, TorchOps().norm(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("isa,dtype", OPS)
@pytest.mark.parametrize("size,rotated", [(8, 8), (64, 64), (80, 80), (96, 24), (16, 0)])
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_equals_torch(
    isa: str, dtype: torch.dtype, size: int, rotated: int, normed: bool
) -> None:
    """Queries and keys turn (the first ``rotated`` numbers of a head), values stay as they are."""
    norms = [random(i, size, dtype=dtype) if normed else None for i in (1, 2)]
    heads = Heads(3, 2, size, rotated, *norms, 1e-5)
    angles = random(3, 9, rotated)
    qkv = random(4, 9, 7, size, dtype=dtype)
    got, expected = qkv.clone(), qkv.clone()
    KernelOps(backend(isa).kernels, dtype).rotate(got, heads, angles.cos(), angles.sin())
    TorchOps().rotate(expected, heads, angles.cos(), angles.sin())
    near(got, expected, dtype)
    assert got[:, 5:].equal(qkv[:, 5:])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped: Linux only")
def test_the_weights_file_is_unmapped(tmp_path: Path) -> None:
    """Of a model that was loaded by us nothing but packed weights and copies of norms is left."""
    folder = shutil.copytree(shipped_model(), tmp_path / "model")
    llm = LLM(str(folder), kv_memory="4MiB", backend="cpu")
    gc.collect()
    assert llm.engine.runner.decoder.is_fused
    assert str(folder) not in Path("/proc/self/maps").read_text()
