"""The kernels through Triton's compiler, with no GPU: the interpreter takes more than that does."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("triton")

#: Every kernel through the backend's own calls; a driver that knows a target and no device.
COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Ampere:
    def get_current_target(self): return GPUTarget("cuda", 80, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_active_torch_device(self): return torch.device("cpu")

driver.set_active(Ampere())
run, shared = JITFunction.run, {}

def compile_only(self, *args, grid, warmup, **options):
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    assert kernel.asm["cubin"]
    shared[self.__name__] = max(shared.get(self.__name__, 0), kernel.metadata.shared)
    return kernel

JITFunction.run = compile_only
torch.cuda.is_available = lambda: True

from pyramidinfer.attention.base import DecodePlan, Pages, Scale
from pyramidinfer.attention.triton_backend import TritonBackend
from pyramidinfer.cache import GroupSpec, Layout, Pool
from pyramidinfer.cache.mover import Slots
from pyramidinfer.cache.triton_compact import TritonMover, move_entries
from pyramidinfer.codec import CODECS
from pyramidinfer.models.ops import GATED, Heads
from pyramidinfer.models.triton_ops import TritonOps
from pyramidinfer.types import Reduce

backend, scale, one = TritonBackend(), Scale(0.1, 50.0, 8), torch.ones(1, 2, dtype=torch.int64)
half = torch.zeros(9, 2, 16, 128, dtype=torch.bfloat16)
paged = half.flatten(0, 1)
pages = Pages(paged, paged, torch.zeros(18, 16, dtype=torch.int32))
tables, lengths = torch.ones(1, 2, 2, 40, dtype=torch.int32), torch.ones(1, 2, 2, dtype=torch.int64)
plan = DecodePlan(tables, lengths, [1], one[0])
backend.run(plan, 0, half[:2, 0, :6], pages, scale, probs=True)
queries, keys, pos = half.flatten(0, 2)[:96].view(16, 6, 128), half[0], torch.arange(16)
seen = (queries, keys, pos, pos.expand(2, -1), scale)
backend.prefill(queries, keys, keys, *seen[2:])
for reduce in (Reduce("kv_max", "max"), Reduce("mean", "sum"), Reduce("kv_mean", "below")):
    backend.window_scores(*seen, reduce, rows=16)
backend.column_sums(*seen)
move_entries([*pages[:3], torch.zeros(18, 16)], one, *[one[0]] * 3, 16)
for name, dim, dtype in (
    ("int8", 128, torch.bfloat16), ("fp8", 64, torch.float16), ("int4", 80, torch.float32)
):
    codec = CODECS[name]
    spec = GroupSpec((0,), 2, dim, dim, dtype, codec)
    pool = Pool(Layout([spec], 1 << 16, 16, scores=True), poison=False)
    group, mover, number = pool.group(0), TritonMover(), torch.zeros(2, 6, dim, dtype=dtype)
    mover.write(group, Slots(*[one.expand(2, 2)] * 2), *[number[:, :2]] * 2, one[0])
    mover.decode(group, group.keys, group.key_scales, one.numpy(), 9)
    move_entries(group.tensors(), one, *[one[0]] * 3, 16)
    keys, values, positions, _, *scales = group.tensors()
    backend.run(plan, 0, number, Pages(keys, values, positions, *scales, codec), scale, probs=True)
ops, row, angles = TritonOps(), half.view(-1, 1152), torch.zeros(8, 128)
ops.norm(row, row[0], 1e-5)
ops.linear(row, (row[:16], None), GATED)
heads = Heads(5, 2, 128, 128, row[0, :128], row[1, :128], 1e-5)
ops.rotate(torch.zeros(8, 9, 128, dtype=torch.bfloat16), heads, angles, angles)
print(len(shared), max(shared.values()))
"""


def test_kernels_compile_for_a_gpu() -> None:
    """For Ampere; what they ask of shared memory fits in the smallest of its chips."""
    code = f"import os; os.environ.pop('TRITON_INTERPRET', None)\n{COMPILE}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels, shared = done.stdout.split()
    assert int(kernels) == 12 and 0 < int(shared) <= 99 * 1024
