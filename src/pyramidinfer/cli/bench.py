"""``pyramidinfer bench …``: speed and memory, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pyramidinfer.cli.fields import command
from pyramidinfer.lab.bench.plans import (
    AdaptersPlan,
    FootprintPlan,
    KernelPlan,
    KvDtypesPlan,
    LatencyPlan,
    LosslessPlan,
    MemoryPlan,
    StepPlan,
    ThroughputPlan,
    WeightsPlan,
)
from pyramidinfer.lab.bench.scaling_plans import (
    OffloadPlan,
    PrefixPlan,
    ReplicasPlan,
    ScalePlan,
    StagesPlan,
)
from pyramidinfer.lab.bench.serve_plan import FuzzPlan, ServePlan, SoakPlan, TurnsPlan

__all__ = ["bench"]

bench = typer.Typer(
    help="Measure speed and memory. The result is a table and a JSON file, often also a picture.",
    no_args_is_help=True,
)

Json = Annotated[
    Path, typer.Option("--json", help="JSON file for the result; a picture is written next to it.")
]
JsonOnly = Annotated[Path, typer.Option("--json", help="JSON file for the result.")]
ApiKey = Annotated[
    str | None, typer.Option(help="API key of the server at --url.", envvar="OPENAI_API_KEY")
]


def _target(json: Path) -> Path:
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    if json.is_dir():
        raise ValueError(f"{json} is a folder; name a file for the result")
    return json


def _show(table: Table, *paths: Path) -> None:
    Console().print(table)
    for path in paths:
        print(path)


@command(bench)
def throughput(plan: ThroughputPlan, json: Json = Path("out/bench_throughput.json")) -> None:
    """Many concurrent requests: tokens/s, prefill, decode step, memory, hardware utilization."""
    from pyramidinfer.lab.bench.plots import draw_throughput
    from pyramidinfer.lab.bench.table import throughput_table
    from pyramidinfer.lab.bench.throughput import run_throughput

    result = run_throughput(plan, _target(json))
    picture = draw_throughput(plan.configuration, result, json.with_suffix(".png"))
    _show(throughput_table(plan.configuration, result), json, picture)


@command(bench)
def weights(plan: WeightsPlan, json: JsonOnly = Path("out/weights.json")) -> None:
    """Weights quantized to 8 and 4 bits: perplexity, bytes, prefill time, decode step."""
    from pyramidinfer.lab.bench.table import weights_table
    from pyramidinfer.lab.bench.weights import run_weights

    _show(weights_table(run_weights(plan, _target(json))), json)


@command(bench)
def step(plan: StepPlan, json: JsonOnly = Path("out/step.json")) -> None:
    """Time of a decode step by part, and its share of the memory's read bandwidth."""
    from pyramidinfer.lab.bench.step import run_step
    from pyramidinfer.lab.bench.table import step_table

    _show(step_table(run_step(plan, _target(json))), json)


@command(bench)
def adapters(plan: AdaptersPlan, json: JsonOnly = Path("out/bench_adapters.json")) -> None:
    """Decode step and prefill with LoRA adapters, compared with the model alone."""
    from pyramidinfer.lab.bench.adapters import run_adapters
    from pyramidinfer.lab.bench.table import adapters_table

    _show(adapters_table(run_adapters(plan, _target(json))), json)


@command(bench, "kv-dtypes")
def kv_dtypes(plan: KvDtypesPlan, json: JsonOnly = Path("out/kv_dtype_kernels.json")) -> None:
    """Decode attention on a cache of 8 and 4 bits, compared with 16 bits and a plain read."""
    from pyramidinfer.lab.bench.kv_dtypes import run_kv_dtypes
    from pyramidinfer.lab.bench.table import kv_dtypes_table

    _show(kv_dtypes_table(run_kv_dtypes(plan, _target(json))), json)


@command(bench)
def lossless(plan: LosslessPlan, json: Json = Path("out/lossless.json")) -> None:
    """Lossless requests, compared with the full cache without speculative decoding."""
    from pyramidinfer.lab.bench.lossless import run_lossless
    from pyramidinfer.lab.bench.plots import draw_lossless
    from pyramidinfer.lab.bench.table import lossless_table

    result = run_lossless(plan, _target(json))
    picture = draw_lossless(result, json.with_suffix(".png"))
    _show(lossless_table(result), json, picture)


@command(bench)
def latency(plan: LatencyPlan, json: Json = Path("out/bench_latency.json")) -> None:
    """Time to first token and between tokens, p50 and p99, by prompt length."""
    from pyramidinfer.lab.bench.latency import run_latency
    from pyramidinfer.lab.bench.plots import draw_latency
    from pyramidinfer.lab.bench.table import latency_table

    result = run_latency(plan, _target(json))
    picture = draw_latency(plan.configuration, result, json.with_suffix(".png"))
    _show(latency_table(plan.configuration, result), json, picture)


@command(bench)
def memory(plan: MemoryPlan, json: Json = Path("out/bench_memory.json")) -> None:
    """How many requests fit into --kv-memory at once, and the bytes of each."""
    from pyramidinfer.lab.bench.memory import run_memory
    from pyramidinfer.lab.bench.plots import draw_memory
    from pyramidinfer.lab.bench.table import memory_table

    result = run_memory(plan, _target(json))
    picture = draw_memory(plan.configuration, result, json.with_suffix(".png"))
    _show(memory_table(plan.configuration, result), json, picture)


@command(bench)
def footprint(plan: FootprintPlan, json: JsonOnly = Path("out/footprint.json")) -> None:
    """Memory of a server beyond weights and --kv-memory, and the installed size of packages."""
    from pyramidinfer.lab.bench.footprint import run_footprint
    from pyramidinfer.lab.bench.table import footprint_table

    _show(footprint_table(run_footprint(plan, _target(json))), json)


@command(bench)
def scale(plan: ScalePlan, json: JsonOnly = Path("out/scale.json")) -> None:
    """A model split over processes: memory and traffic of each, compared with predictions."""
    from pyramidinfer.lab.bench.scale import run_scale
    from pyramidinfer.lab.bench.scale_page import scale_table

    _show(scale_table(run_scale(plan, _target(json))), json)


@command(bench)
def replicas(plan: ReplicasPlan, json: JsonOnly = Path("out/replicas.json")) -> None:
    """Two replicas under Ray Serve: cache reuse of chats, and the loss of one replica."""
    from pyramidinfer.lab.bench.replicas import run_replicas
    from pyramidinfer.lab.bench.replicas_page import replicas_table

    _show(replicas_table(run_replicas(plan, _target(json))), json)


@command(bench)
def stages(plan: StagesPlan, json: JsonOnly = Path("out/stages.json")) -> None:
    """Two pipeline stages of equally many layers, compared with stages of equal work."""
    from pyramidinfer.lab.bench.scale_page import stages_table
    from pyramidinfer.lab.bench.stages import run_stages

    _show(stages_table(run_stages(plan, _target(json))), json)


@command(bench)
def offload(plan: OffloadPlan, json: JsonOnly = Path("out/offload.json")) -> None:
    """Conversations held in the pool, in host memory and on disk; time to reuse them."""
    from pyramidinfer.lab.bench.offload import run_offload
    from pyramidinfer.lab.bench.offload_page import offload_table

    _show(offload_table(run_offload(plan, _target(json))), json)


@command(bench)
def prefix(plan: PrefixPlan, json: JsonOnly = Path("out/prefix.json")) -> None:
    """Chats with the same system prompt, which is shared or computed for each chat."""
    from pyramidinfer.lab.bench.prefix import run_prefix
    from pyramidinfer.lab.bench.prefix_page import prefix_table

    _show(prefix_table(run_prefix(plan, _target(json))), json)


@command(bench)
def kernels(plan: KernelPlan, json: Json = Path("out/bench_kernels.json")) -> None:
    """Attention and compaction kernels, compared with a plain read or copy of the same bytes."""
    from pyramidinfer.lab.bench.kernels import run_kernels
    from pyramidinfer.lab.bench.plots import draw_kernels
    from pyramidinfer.lab.bench.table import kernels_table

    result = run_kernels(plan, _target(json))
    configuration = {"dtype": plan.dtype}
    picture = draw_kernels(configuration, result, json.with_suffix(".png"))
    _show(kernels_table(configuration, result), json, picture)


@command(bench)
def serve(
    plan: ServePlan, api_key: ApiKey = None, json: Json = Path("out/bench_serve.json")
) -> None:
    """A server under load, by request rate: latencies, goodput, concurrent requests."""
    from pyramidinfer.lab.bench.serve import run_serve
    from pyramidinfer.lab.bench.serve_views import draw_serve, serve_table

    result = run_serve(plan, _target(json), api_key)
    picture = draw_serve(plan.configuration, result, json.with_suffix(".png"))
    _show(serve_table(plan.configuration, result), json, picture)


@command(bench)
def turns(
    plan: TurnsPlan, api_key: ApiKey = None, json: Json = Path("out/bench_turns.json")
) -> None:
    """Time to first token of conversations, with and without reuse of the cache."""
    from pyramidinfer.lab.bench.serve_views import draw_turns, turns_table
    from pyramidinfer.lab.bench.turns import run_turns

    result = run_turns(plan, _target(json), api_key)
    picture = draw_turns(plan.configuration, result, json.with_suffix(".png"))
    _show(turns_table(plan.configuration, result), json, picture)


@command(bench)
def soak(plan: SoakPlan, json: JsonOnly = Path("out/soak.json")) -> None:
    """A server under many clients for minutes; exit code 1 if anything was wrong."""
    from pyramidinfer.lab.soak import report, run_soak

    result = run_soak(plan, _target(json))
    report(result)
    print(json)
    raise typer.Exit(bool(result["breaches"]))


@command(bench)
def fuzz(plan: FuzzPlan, json: JsonOnly = Path("out/fuzz.json")) -> None:
    """Send generated requests, valid and invalid, to a server; exit code 1 if one fails."""
    from pyramidinfer.lab.fuzz import report, run_fuzz

    passed = report(run_fuzz(plan, _target(json)))
    print(json)
    raise typer.Exit(not passed)
