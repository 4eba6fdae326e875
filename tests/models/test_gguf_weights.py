"""Linears with the codes of a GGUF file: against gguf's own dequantizing, to the bit."""

from __future__ import annotations

from itertools import combinations_with_replacement
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor
from torch.nn import functional as F

from pyramidinfer import LLM, SamplingParams
from pyramidinfer.models.fingerprint import fingerprint
from pyramidinfer.models.gguf_weights import FORMATS
from pyramidinfer.models.ops import GATED, PLAIN, KernelOps
from pyramidinfer.models.weights import CODED, CODES, HALVES, Rows, joined_format
from tests.models.test_fused import near
from tests.models.test_gguf import write
from tests.models.test_weights import apart, rounded_rows
from tests.native.isas import ISAS, backend, random
from tests.tiny import tiny_model

DEPTH = 512
KINDS = list(FORMATS)
Q4_0, Q4_1, Q5_1, Q8_0 = (GGMLQuantizationType[each] for each in ("Q4_0", "Q4_1", "Q5_1", "Q8_0"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend("native")  # built where kernels always are
    monkeypatch.setenv("PYRAMIDINFER_CACHE", str(tmp_path / "cache"))


def blocks(kind: GGMLQuantizationType, count: int, seed: int) -> tuple[Rows, Tensor]:
    """Random blocks, every bit of the codes in use, and what they stand for."""
    block, size = GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 256, (count, DEPTH // block, size), dtype=np.uint8)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}
    for at in halves.get(kind.name, (0,)):
        scales = draw.normal(0, 0.01, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    held = torch.from_numpy(data.reshape(count, -1))
    addresses = torch.arange(count) * held.shape[1] + held.data_ptr()
    expected = torch.from_numpy(gguf.quants.dequantize(held.numpy(), kind))
    return Rows(addresses, kind, FORMATS[kind], DEPTH, held), expected


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_are_kept(kind: GGMLQuantizationType) -> None:
    """Alone, and beside those of any other type, each number is the file's."""
    ops = KernelOps(backend("native").kernels, torch.float32, "gguf")
    mine, expected = blocks(kind, 70, 1)
    for other in KINDS:
        theirs, more = blocks(other, 6, 2)
        packed = ops.pack([mine, theirs], [None, None], PLAIN)
        assert ops.rows(packed, torch.arange(76)).equal(torch.cat([expected, more]))
    assert mine.numbers(torch.tensor([5, 0])).equal(expected[[5, 0]])


@pytest.mark.parametrize("isa", ISAS)
def test_products_are_of_what_codes_stand_for(isa: str) -> None:
    """Of each format that there is, in every set of instructions."""
    ops = KernelOps(backend(isa).kernels, torch.float32, "gguf")
    x, seen = random(1, 7, DEPTH), set()
    for pair in combinations_with_replacement(KINDS, 2):
        if (form := joined_format([FORMATS[each] for each in pair])) in seen:
            continue
        seen.add(form)
        (gate, one), (up, two) = (blocks(kind, 70, 3 + i) for i, kind in enumerate(pair))
        expected = F.linear(rounded_rows(x), torch.cat([one, two]))
        for rows in (1, 4, 7):
            got = ops.linear(x[:rows], ops.pack([gate, up], [None, None], PLAIN), PLAIN)
            near(got, expected[:rows], torch.float32)
        first, second = expected.chunk(2, dim=1)
        got = ops.linear(x, ops.pack([gate, up], [None, None], GATED), GATED)
        near(got, F.silu(first) * second, torch.float32)
    assert seen == set(CODED)


def test_formats_that_no_kernel_reads_are_refused() -> None:
    """Any linears of a file may be packed together; their format is among the kernels'."""
    for count in (2, 3):
        for some in combinations_with_replacement(set(FORMATS.values()), count):
            assert joined_format(list(some)) in CODED, some
    ops, (rows, _) = KernelOps(backend("native").kernels, torch.float32, "gguf"), blocks(Q8_0, 4, 1)
    odd = rows._replace(format=CODES | HALVES)
    with pytest.raises(ValueError, match=f"no weights in the format {CODES | HALVES}$"):
        ops.pack([odd], [None], PLAIN)


def test_a_file_is_read_as_it_is(tmp_path: Path, cache: None) -> None:
    """Heads in the file's order, mixed types, a tied head: the logits of the converted model."""
    kinds = {"attn_v": Q8_0, "attn_q": Q4_0, "ffn_down": Q5_1, "token_embd": Q8_0}
    file = write(tmp_path / "tiny.gguf", kinds=kinds)
    options = {"policy": "full", "kv_memory": "4MiB", "dtype": "float32"}
    llm = LLM(str(file), backend="cpu", weights="gguf", **options)
    plain = LLM(str(file), backend="reference", weights="gguf", **options)
    assert 0 < llm.engine.runner.weight_bytes < 0.4 * plain.engine.runner.weight_bytes
    tokens = torch.randint(3, 200, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    got, expected = (
        each.score([tokens[:40]], [tokens[40:]], logits=True)[0] for each in (llm, plain)
    )
    assert got.logits is not None and expected.logits is not None
    assert apart(got.logits, expected.logits) < 5e-3
    ours, theirs = (fingerprint(each.engine.runner) for each in (llm, plain))
    assert ours == theirs
    assert llm.engine.end_ids == plain.engine.end_ids
    (out,) = llm.generate([tokens], SamplingParams(max_tokens=4, ignore_eos=True))
    assert len(out.token_ids) == 4


def test_what_has_no_file_is_refused() -> None:
    with pytest.raises(ValueError, match="was not made from an existing GGUF file"):
        LLM("src/pyramidinfer/assets/demo-model", "full", backend="cpu", weights="gguf")
    with pytest.raises(ValueError, match="loaded from a GGUF file: name the file"):
        LLM(tiny_model("llama"), "full", backend="cpu", weights="gguf")
