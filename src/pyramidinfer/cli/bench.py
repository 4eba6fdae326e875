"""``pyramidinfer bench …``: speed and memory, one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pyramidinfer.cli.common import plain_errors
from pyramidinfer.cli.study import numbers

__all__ = ["bench"]

bench = typer.Typer(
    help="Measure speed and memory: JSON, a table, a picture.", no_args_is_help=True
)

Model = Annotated[str | None, typer.Option(help="Folder, hub id, fetched model or GGUF file.")]
Shape = Annotated[
    str | None,
    typer.Option(
        help="Random weights in the shape of llama2-7b, llama2-13b, llama3-8b or bench-200m "
        "(the default where no model is given)."
    ),
]
Policies = Annotated[
    str, typer.Option(help="NAME,NAME or 'NAME NAME:option=value,…'; the first is the yardstick.")
]
Keep = Annotated[float, typer.Option(help="Budget of every policy that has one, a share.")]
Dtype = Annotated[str, typer.Option(help="auto (bfloat16 for a shape), float32, bfloat16, …")]
Weights = Annotated[
    str,
    typer.Option(help="How the weights of linears are stored: auto (in --dtype), int8 or int4."),
]
KvDtype = Annotated[
    str,
    typer.Option(
        help="How the cache stores keys and values: auto (in --dtype), int8, fp8 or int4."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Backend = Annotated[str, typer.Option(help="Attention backend; auto is the engine's choice.")]
Threads = Annotated[int, typer.Option(help="Threads of torch; 0 leaves its choice.")]
Repeats = Annotated[int, typer.Option(help="Passes that count, policies taking turns.")]
Warmup = Annotated[int, typer.Option(help="Passes before them.")]
KvMemory = Annotated[
    str, typer.Option(help="Memory for the cache; auto holds all requests at once.")
]
Json = Annotated[Path, typer.Option("--json", help="Where the result goes; a picture beside it.")]
Seed = Annotated[int, typer.Option(help="Which weights and prompts are drawn.")]
POLICIES = "full,pyramidinfer,pyramid"


def _setting(policies: str, **values: Any) -> Any:
    from pyramidinfer.lab.bench.setting import Setting
    from pyramidinfer.lab.quality import split_specs
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    return Setting(policies=split_specs(policies), **values)


def _target(json: Path) -> Path:
    if json.is_dir():
        raise ValueError(f"{json} is a folder; name a file for the result")
    return json


def _show(table: Table, *paths: Path) -> None:
    Console().print(table)
    for path in paths:
        print(path)


@bench.command()
@plain_errors()
def throughput(
    model: Model = None,
    shape: Shape = None,
    policies: Policies = POLICIES,
    keep: Keep = 0.45,
    batch: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 64,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    repeats: Repeats = 3,
    warmup: Warmup = 1,
    threads: Threads = 0,
    kv_memory: KvMemory = "auto",
    seed: Seed = 0,
    json: Json = Path("out/bench_throughput.json"),
) -> None:
    """Many requests at once: tokens/s, prefill, decoding step, memory, shares of the machine."""
    from pyramidinfer.lab.bench.plots import draw_throughput
    from pyramidinfer.lab.bench.table import throughput_table
    from pyramidinfer.lab.bench.throughput import ThroughputPlan, run_throughput

    setting = _setting(
        policies,
        model=model,
        shape=shape,
        keep=keep,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weights=weights,
        device=device,
        backend=backend,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
        kv_memory=kv_memory,
        seed=seed,
    )
    plan = ThroughputPlan(setting, batch, prompt_len, output_len)
    result = run_throughput(plan, _target(json))
    picture = draw_throughput(plan.configuration, result, json.with_suffix(".png"))
    _show(throughput_table(plan.configuration, result), json, picture)


@bench.command("weights")
@plain_errors()
def weights_command(
    model: Annotated[str, typer.Option(help="Folder, hub id or fetched model.")] = "smollm2",
    text: Annotated[
        Path | None,
        typer.Option(help="A text file to score, instead of the English prose of Python's manual."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="What to hold against the model's dtype: int8, int4; a list.")
    ] = "int8,int4",
    samples: Annotated[int, typer.Option(help="Passages of text that are scored.")] = 20,
    batch: Annotated[
        str, typer.Option(help="Requests that decode together; a list, empty for no timings.")
    ] = "1,4,16",
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 64,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    kv_memory: Annotated[str, typer.Option(help="Bytes or text, for the caches.")] = "512MiB",
    repeats: Repeats = 5,
    warmup: Warmup = 1,
    seed: Seed = 0,
    json: Json = Path("out/weights.json"),
) -> None:
    """Weights of 8 and 4 bits: perplexity on real text, bytes, prefill and decode step."""
    from pyramidinfer.lab.bench.table import weights_table
    from pyramidinfer.lab.bench.weights import WeightsPlan, run_weights
    from pyramidinfer.lab.samples import Subject

    plan = WeightsPlan(
        Subject(model, None if text is None else str(text), dtype, "cpu", kv_memory, backend),
        tuple(each.strip() for each in weights.split(",")),
        samples,
        batches=tuple(numbers(batch, int, "--batch")) if batch else (),
        prompt_len=prompt_len,
        output_len=output_len,
        repeats=repeats,
        warmup=warmup,
        seed=seed,
    )
    _show(weights_table(run_weights(plan, _target(json))), json)


@bench.command("kv-dtypes")
@plain_errors()
def kv_dtypes(
    kv_dtypes: Annotated[
        str, typer.Option(help="What to hold against 16 bits: int8, int4, fp8; a list.")
    ] = "int8,int4,fp8",
    batch: Annotated[str, typer.Option(help="Requests that decode together; a list.")] = "1,16",
    prompt_len: Annotated[str, typer.Option(help="Entries of each head; a list.")] = (
        "512,2048,8192"
    ),
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    backend: Backend = "auto",
    repeats: Repeats = 7,
    warmup: Warmup = 1,
    json: Json = Path("out/kv_dtype_kernels.json"),
) -> None:
    """Decode attention over a cache of 8 and 4 bits, beside 16 bits and a plain read."""
    from pyramidinfer.lab.bench.kv_dtypes import KvDtypesPlan, run_kv_dtypes
    from pyramidinfer.lab.bench.table import kv_dtypes_table

    names = tuple(each.strip() for each in kv_dtypes.split(","))
    batches, lengths = numbers(batch, int, "--batch"), numbers(prompt_len, int, "--prompt-len")
    plan = KvDtypesPlan(names, backend, dtype, device, batches, lengths, repeats, warmup)
    _show(kv_dtypes_table(run_kv_dtypes(plan, _target(json))), json)


@bench.command()
@plain_errors()
def lossless(
    model: Annotated[
        str | None, typer.Option(help="A model with its weights, on real text (default: smollm2).")
    ] = None,
    shape: Shape = None,
    drafts: Annotated[
        str, typer.Option(help="Policies that choose what drafts read; as --policies elsewhere.")
    ] = "pyramid:keep=.1",
    draft_tokens: Annotated[
        str, typer.Option(help="Tokens guessed in a step: 0 to 8, or auto; a list.")
    ] = "1,2,4,auto",
    accept: Annotated[
        float | None,
        typer.Option(help="With --shape: the rate at which guesses are made right."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Requests that decode together; a list.")] = "1,4",
    prompt_len: Annotated[str, typer.Option(help="Tokens in each cache; a list.")] = (
        "1024,2048,4096,6500"
    ),
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 64,
    dtype: Dtype = "bfloat16",
    kv_dtype: KvDtype = "auto",
    device: Device = "auto",
    repeats: Repeats = 3,
    seed: Seed = 0,
    json: Json = Path("out/lossless.json"),
) -> None:
    """The full cache with drafts beside the full cache without, by context, batch and guesses."""
    from pyramidinfer.lab.bench.lossless import LosslessPlan, run_lossless
    from pyramidinfer.lab.bench.plots import draw_lossless
    from pyramidinfer.lab.bench.table import lossless_table
    from pyramidinfer.lab.quality import split_specs
    from pyramidinfer.models.loading import quiet_transformers

    quiet_transformers()
    plan = LosslessPlan(
        model="smollm2" if model is None and shape is None else model,
        shape=shape,
        drafts=split_specs(drafts),
        draft_tokens=tuple(each.strip() for each in draft_tokens.split(",")),
        batches=numbers(batch, int, "--batch"),
        contexts=numbers(prompt_len, int, "--prompt-len"),
        accept=accept,
        output_len=output_len,
        repeats=repeats,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
        seed=seed,
    )
    result = run_lossless(plan, _target(json))
    picture = draw_lossless(result, json.with_suffix(".png"))
    _show(lossless_table(result), json, picture)


@bench.command()
@plain_errors()
def latency(
    model: Model = None,
    shape: Shape = None,
    policies: Policies = POLICIES,
    keep: Keep = 0.45,
    batch: Annotated[str, typer.Option(help="Requests that arrive together; a list.")] = "1",
    prompt_len: Annotated[str, typer.Option(help="Tokens of a prompt; a list.")] = "128,512,2048",
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 32,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    repeats: Repeats = 3,
    warmup: Warmup = 1,
    threads: Threads = 0,
    kv_memory: KvMemory = "auto",
    seed: Seed = 0,
    json: Json = Path("out/bench_latency.json"),
) -> None:
    """Time to first token and between tokens, p50 and p99, over prompt lengths."""
    from pyramidinfer.lab.bench.latency import LatencyPlan, run_latency
    from pyramidinfer.lab.bench.plots import draw_latency
    from pyramidinfer.lab.bench.table import latency_table

    setting = _setting(
        policies,
        model=model,
        shape=shape,
        keep=keep,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weights=weights,
        device=device,
        backend=backend,
        repeats=repeats,
        warmup=warmup,
        threads=threads,
        kv_memory=kv_memory,
        seed=seed,
    )
    batches, lengths = numbers(batch, int, "--batch"), numbers(prompt_len, int, "--prompt-len")
    plan = LatencyPlan(setting, batches, lengths, output_len)
    result = run_latency(plan, _target(json))
    picture = draw_latency(plan.configuration, result, json.with_suffix(".png"))
    _show(latency_table(plan.configuration, result), json, picture)


@bench.command()
@plain_errors()
def memory(
    model: Model = None,
    shape: Shape = None,
    policies: Policies = POLICIES,
    keep: Keep = 0.45,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 32,
    requests: Annotated[int, typer.Option(help="Requests to run at most.")] = 64,
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    threads: Threads = 0,
    kv_memory: Annotated[str, typer.Option(help="What the requests share.")] = "256MiB",
    seed: Seed = 0,
    json: Json = Path("out/bench_memory.json"),
) -> None:
    """How many requests fit into one kv_memory at once, and what each holds."""
    from pyramidinfer.lab.bench.memory import MemoryPlan, run_memory
    from pyramidinfer.lab.bench.plots import draw_memory
    from pyramidinfer.lab.bench.table import memory_table

    setting = _setting(
        policies,
        model=model,
        shape=shape,
        keep=keep,
        dtype=dtype,
        kv_dtype=kv_dtype,
        weights=weights,
        device=device,
        backend=backend,
        threads=threads,
        kv_memory=kv_memory,
        seed=seed,
    )
    plan = MemoryPlan(setting, prompt_len, output_len, requests)
    result = run_memory(plan, _target(json))
    picture = draw_memory(plan.configuration, result, json.with_suffix(".png"))
    _show(memory_table(plan.configuration, result), json, picture)


@bench.command()
@plain_errors()
def scale(
    model: Model = None,
    sizes: Annotated[
        str,
        typer.Option(
            help="What to run on, a list of ranks that split layers x stages that have some; 1x1 "
            "first."
        ),
    ] = "1x1,2x1,4x1,1x2,1x4,2x2",
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    output_len: Annotated[int, typer.Option(help="Tokens generated.")] = 16,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …")] = "float32",
    kv_memory: Annotated[str, typer.Option(help="Of each rank.")] = "64MiB",
    json: Json = Path("out/scale.json"),
) -> None:
    """A model over several processes: memory and traffic of each, beside the formula."""
    from pyramidinfer.lab.bench.scale import ScalePlan, pairs_of, run_scale
    from pyramidinfer.lab.bench.scale_page import scale_table

    plan = ScalePlan(model, pairs_of(sizes), prompt_len, output_len, kv_memory, dtype)
    result = run_scale(plan, _target(json))
    _show(scale_table(result), json)


@bench.command()
@plain_errors()
def replicas(
    model: Model = None,
    chats: Annotated[int, typer.Option(help="Conversations.")] = 40,
    turns: Annotated[int, typer.Option(help="Turns of each.")] = 5,
    at_once: Annotated[int, typer.Option(help="Conversations at a time.")] = 8,
    words: Annotated[int, typer.Option(help="Words of a first turn.")] = 600,
    output_len: Annotated[int, typer.Option(help="Tokens of an answer.")] = 16,
    kv_memory: Annotated[str, typer.Option(help="Of each replica.")] = "256MiB",
    port: Annotated[int, typer.Option(help="Port that Ray Serve listens on.")] = 8017,
    json: Json = Path("out/replicas.json"),
) -> None:
    """Two replicas under Ray Serve: chats that find their cache again, and one that is killed."""
    from pyramidinfer.lab.bench.replicas import ReplicasPlan, run_replicas
    from pyramidinfer.lab.bench.replicas_page import replicas_table

    plan = ReplicasPlan(model, chats, turns, at_once, words, output_len, kv_memory, port)
    result = run_replicas(plan, _target(json))
    _show(replicas_table(result), json)


@bench.command()
@plain_errors()
def stages(
    model: Annotated[str, typer.Option(help="Folder, hub id or fetched model.")] = "smollm2",
    policies: Annotated[str, typer.Option(help="A list.")] = "full pyramidinfer:keep=.45",
    requests: Annotated[int, typer.Option(help="Requests at once.")] = 8,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1000,
    output_len: Annotated[int, typer.Option(help="Tokens generated of each.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …")] = "float32",
    kv_memory: Annotated[str, typer.Option(help="Of each rank.")] = "1GiB",
    repeats: Annotated[int, typer.Option(help="Runs of each way, in turns.")] = 3,
    json: Json = Path("out/stages.json"),
) -> None:
    """Layers dealt to two stages evenly, beside by what the policy forecasts."""
    from pyramidinfer.lab.bench.scale_page import stages_table
    from pyramidinfer.lab.bench.stages import StagesPlan, run_stages
    from pyramidinfer.lab.quality import split_specs

    specs = split_specs(policies)
    plan = StagesPlan(model, specs, requests, prompt_len, output_len, kv_memory, dtype, repeats)
    result = run_stages(plan, _target(json))
    _show(stages_table(result), json)


@bench.command()
@plain_errors()
def offload(
    model: Annotated[str, typer.Option(help="Folder, hub id or fetched model.")] = "smollm2",
    policies: Annotated[str, typer.Option(help="A list.")] = "full pyramid:keep=.3",
    tokens: Annotated[int, typer.Option(help="Of a conversation that is counted.")] = 300,
    kv_memory: Annotated[str, typer.Option(help="Half of it for conversations.")] = "48MiB",
    host: Annotated[str, typer.Option(help="Host memory below it.")] = "32MiB",
    disk: Annotated[str, typer.Option(help="Bytes of files below that.")] = "64MiB",
    prompt: Annotated[int, typer.Option(help="Tokens of a first turn that is timed.")] = 600,
    turn: Annotated[int, typer.Option(help="New tokens of the second one.")] = 30,
    repeats: Annotated[int, typer.Option(help="Second turns from each place, in turns.")] = 3,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, …")] = "auto",
    threads: Threads = 0,
    json: Json = Path("out/offload.json"),
) -> None:
    """Conversations that pool, host memory and disk hold; the second turn's first token."""
    from pyramidinfer.lab.bench.offload import OffloadPlan, run_offload
    from pyramidinfer.lab.bench.offload_page import offload_table
    from pyramidinfer.lab.quality import split_specs

    plan = OffloadPlan(
        model,
        split_specs(policies),
        tokens,
        kv_memory,
        host,
        disk,
        prompt,
        turn,
        repeats,
        dtype,
        threads,
    )
    result = run_offload(plan, _target(json))
    _show(offload_table(result), json)


@bench.command()
@plain_errors()
def kernels(
    batch: Annotated[str, typer.Option(help="Requests in a decoding step; a list.")] = "1,4,16",
    prompt_len: Annotated[
        str, typer.Option(help="Entries a request has in a layer; a list.")
    ] = "512,1024,2048,4096,8192",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, …")] = "bfloat16",
    device: Device = "auto",
    backend: Backend = "auto",
    repeats: Annotated[int, typer.Option(help="Samples that count, taken in turns.")] = 5,
    warmup: Annotated[int, typer.Option(help="Calls before them.")] = 1,
    page_size: Annotated[int, typer.Option(help="Entries in a page.")] = 16,
    threads: Threads = 0,
    json: Json = Path("out/bench_kernels.json"),
) -> None:
    """Attention and compaction alone, beside a plain read or copy of the same bytes."""
    from pyramidinfer.lab.bench.kernels import KernelPlan, run_kernels
    from pyramidinfer.lab.bench.plots import draw_kernels
    from pyramidinfer.lab.bench.table import kernels_table

    plan = KernelPlan(
        backend,
        dtype,
        device,
        numbers(batch, int, "--batch"),
        numbers(prompt_len, int, "--prompt-len"),
        threads,
        repeats,
        warmup,
        page_size=page_size,
    )
    result = run_kernels(plan, _target(json))
    configuration = {"dtype": dtype}
    picture = draw_kernels(configuration, result, json.with_suffix(".png"))
    _show(kernels_table(configuration, result), json, picture)


Url = Annotated[
    str | None, typer.Option(help="A server that runs already; none starts one for every policy.")
]
ServedModel = Annotated[
    str | None,
    typer.Option(help="Folder, hub id, fetched model or GGUF file to serve. Default: shipped."),
]
ServedPolicies = Annotated[
    str | None,
    typer.Option(
        help="NAME,NAME or 'NAME NAME:keep=.3'; the first is the yardstick. Default: full,pyramid; "
        "with --url the server's own, and those named are asked for by each request."
    ),
]
ServedMemory = Annotated[str, typer.Option(help="Memory for the cache of each server.")]
ServeOptions = Annotated[str, typer.Option(help="Further options for `pyramidinfer serve`.")]
TokenIds = Annotated[
    str | None,
    typer.Option(help="LOW-HIGH, to draw prompts from. Default: what /tokenize makes of a text."),
]
ApiKey = Annotated[str | None, typer.Option(help="Key for --url.", envvar="OPENAI_API_KEY")]
Timeout = Annotated[float, typer.Option(help="Seconds without a word until a request has failed.")]
ServerThreads = Annotated[int, typer.Option(help="Threads of each server; 0 leaves its choice.")]


def _server(policies: str | None, url: str | None, **values: Any) -> Any:
    from pyramidinfer.lab.bench.serve_plan import ServerSetting
    from pyramidinfer.lab.quality import split_specs

    if policies is None:
        policies = "" if url else "full,pyramid"
    return ServerSetting(policies=split_specs(policies), url=url, **values)


@bench.command()
@plain_errors()
def serve(
    model: ServedModel = None,
    url: Url = None,
    policies: ServedPolicies = None,
    keep: Keep = 0.45,
    kv_memory: ServedMemory = "64MiB",
    rates: Annotated[str, typer.Option(help="Requests a second; inf sends all at once.")] = (
        "1,2,4,8,inf"
    ),
    requests: Annotated[int, typer.Option(help="Requests of a pass.")] = 32,
    prompt_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1000,
    output_len: Annotated[int, typer.Option(help="Tokens each request generates.")] = 64,
    slo_ttft: Annotated[float, typer.Option(help="Seconds a first token may take.")] = 1.0,
    slo_itl: Annotated[float, typer.Option(help="Seconds a further token may take, mean.")] = 0.1,
    repeats: Annotated[int, typer.Option(help="Passes at each rate, policies in turns.")] = 1,
    warmup: Annotated[int, typer.Option(help="Requests to each server before them.")] = 2,
    serve_options: ServeOptions = "",
    token_ids: TokenIds = None,
    api_key: ApiKey = None,
    threads: ServerThreads = 0,
    timeout: Timeout = 300.0,
    seed: Seed = 0,
    json: Json = Path("out/bench_serve.json"),
) -> None:
    """A server under load, rate by rate: latencies, goodput, requests at once."""
    from pyramidinfer.lab.bench.serve import run_serve
    from pyramidinfer.lab.bench.serve_plan import ServePlan
    from pyramidinfer.lab.bench.serve_views import draw_serve, serve_table

    setting = _server(
        policies,
        url,
        model=model,
        keep=keep,
        kv_memory=kv_memory,
        options=serve_options,
        threads=threads,
        token_ids=token_ids,
        timeout=timeout,
        seed=seed,
    )
    plan = ServePlan(
        setting,
        numbers(rates, float, "--rates"),
        requests,
        prompt_len,
        output_len,
        slo_ttft,
        slo_itl,
        repeats,
        warmup,
    )
    result = run_serve(plan, _target(json), api_key)
    picture = draw_serve(plan.configuration, result, json.with_suffix(".png"))
    _show(serve_table(plan.configuration, result), json, picture)


@bench.command()
@plain_errors()
def turns(
    model: ServedModel = None,
    url: Url = None,
    policies: ServedPolicies = None,
    keep: Keep = 0.45,
    kv_memory: ServedMemory = "64MiB",
    turns: Annotated[int, typer.Option(help="Turns of a conversation.")] = 5,
    prompt_len: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 1000,
    turn_len: Annotated[int, typer.Option(help="New tokens of each later prompt.")] = 50,
    output_len: Annotated[int, typer.Option(help="Tokens each turn generates.")] = 32,
    conversations: Annotated[int, typer.Option(help="Conversations that count.")] = 5,
    warmup: Annotated[int, typer.Option(help="Conversations before them.")] = 1,
    serve_options: ServeOptions = "",
    token_ids: TokenIds = None,
    api_key: ApiKey = None,
    threads: ServerThreads = 0,
    timeout: Timeout = 300.0,
    seed: Seed = 0,
    json: Json = Path("out/bench_turns.json"),
) -> None:
    """Conversations, with the last turn's cache taken up and without: time to first token."""
    from pyramidinfer.lab.bench.serve_plan import TurnsPlan
    from pyramidinfer.lab.bench.serve_views import draw_turns, turns_table
    from pyramidinfer.lab.bench.turns import run_turns

    setting = _server(
        policies,
        url,
        model=model,
        keep=keep,
        kv_memory=kv_memory,
        options=serve_options,
        threads=threads,
        token_ids=token_ids,
        timeout=timeout,
        seed=seed,
    )
    plan = TurnsPlan(setting, turns, prompt_len, turn_len, output_len, conversations, warmup)
    result = run_turns(plan, _target(json), api_key)
    picture = draw_turns(plan.configuration, result, json.with_suffix(".png"))
    _show(turns_table(plan.configuration, result), json, picture)
