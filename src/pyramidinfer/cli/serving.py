"""Options of ``serve``, ``chat`` and ``batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pyramidinfer.cli.common import (
    BACKENDS,
    DEFAULT_POLICY,
    DraftTokens,
    Dtype,
    FromModel,
    Keep,
    KvDtype,
    Lossless,
    Model,
    NoProfile,
    Options,
    PipelineParallel,
    PolicyName,
    TemplateKwargs,
    TensorParallel,
    Weights,
    check_drafts,
    json_object,
    names_model,
    plain_errors,
    policy_from,
    profiling,
    said,
)

__all__ = ["add_serving"]

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Backend = Annotated[str, typer.Option(help=f"auto, {', '.join(BACKENDS)}.")]
KvMemory = Annotated[str, typer.Option(help="Memory for the caches of all requests together.")]
Threads = Annotated[int, typer.Option(help="Threads of torch; 0 leaves its choice.")]
MaxRequests = Annotated[int, typer.Option(help="Requests in flight at once.")]
SERVER, ENGINE, LIMITS, SAFETY = "Server", "Memory and scheduling", "Limits", "Safety"


def _choice(
    model: str | None,
    policy: str,
    keep: float | None,
    option: list[str] | None,
    lossless: bool,
    dtype: str,
    device: str,
    backend: str,
    threads: int,
    no_profile: bool,
    **options: Any,
) -> Any:
    from pyramidinfer.cli.serve import ModelChoice

    chosen = policy_from(policy, keep, option or [], lossless)
    options["profile"] = profiling(chosen, no_profile)
    return ModelChoice(model, chosen, dtype, device, backend, threads, options)


def add_serving(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (serve, chat, batch):
        app.command()(plain_errors()(names_model(command)))


def serve(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    lossless: Lossless = False,
    draft_tokens: DraftTokens = None,
    kv_memory: KvMemory = "1GiB",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    no_profile: NoProfile = False,
    threads: Threads = 0,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    pipeline_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of each stage, such as 16,14; default: by the work that the policy "
            "forecasts.",
        ),
    ] = None,
    rank_timeout: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which a rank that does not answer ends the server; default: 60.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on.", rich_help_panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; 0 picks a free one.", rich_help_panel=SERVER)
    ] = 8000,
    served_model_name: Annotated[
        str,
        typer.Option(
            "--served-model-name",
            "--model-name",
            help="Name that clients ask for; default: the folder's.",
            rich_help_panel=SERVER,
        ),
    ] = "",
    generation_config: FromModel = "auto",
    default_chat_template_kwargs: TemplateKwargs = None,
    page: Annotated[bool, typer.Option(help="The page at /.", rich_help_panel=SERVER)] = True,
    drain_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that running requests get after SIGTERM.", rich_help_panel=SERVER
        ),
    ] = 60.0,
    max_requests: Annotated[
        int, typer.Option(help="Requests in flight at once.", rich_help_panel=ENGINE)
    ] = 64,
    step_tokens: Annotated[
        int,
        typer.Option(
            help="Work of one step, in tokens through the whole model.", rich_help_panel=ENGINE
        ),
    ] = 2048,
    page_size: Annotated[
        int, typer.Option(help="Entries in a page of the cache.", rich_help_panel=ENGINE)
    ] = 16,
    reuse_share: Annotated[
        float,
        typer.Option(
            help="Share of kv_memory that finished conversations may hold while "
            "nobody needs it; 0 switches reuse off.",
            rich_help_panel=ENGINE,
        ),
    ] = 0.5,
    compress_idle: Annotated[
        bool,
        typer.Option(
            "--compress-idle",
            help="While nobody asks for anything, choose what "
            "held conversations keep anew, for questions to come.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
    slot_scores: Annotated[
        bool,
        typer.Option(
            "--slot-scores",
            help="Room for running scores, so that requests may ask for h2o.",
            rich_help_panel=ENGINE,
        ),
    ] = False,
    admission: Annotated[
        str,
        typer.Option(help="reserve (nothing can run short) or overcommit.", rich_help_panel=ENGINE),
    ] = "reserve",
    expected_output: Annotated[
        float,
        typer.Option(
            help="overcommit: share of max_tokens a request is expected to generate.",
            rich_help_panel=ENGINE,
        ),
    ] = 0.5,
    preempt: Annotated[
        str,
        typer.Option(
            help="overcommit: swap, or recompute (policy full only; others swap).",
            rich_help_panel=ENGINE,
        ),
    ] = "swap",
    elastic: Annotated[
        float | None,
        typer.Option(
            help="overcommit: tighten running requests down to this keep before one is preempted.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    host_kv_memory: Annotated[
        str | None,
        typer.Option(
            help="Host memory for caches that kv_memory has no room for; default: none, with "
            "overcommit as much as kv_memory.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    disk_kv_cache: Annotated[
        Path | None,
        typer.Option(
            help="A folder for conversations that host memory has no room for, which a restart "
            "finds again.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    disk_kv_memory: Annotated[
        str | None, typer.Option(help="Bytes of files in that folder.", rich_help_panel=ENGINE)
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Requests that may wait; one more gets 429.", rich_help_panel=LIMITS)
    ] = 128,
    queue_timeout: Annotated[
        float, typer.Option(help="Seconds in the queue, then 429.", rich_help_panel=LIMITS)
    ] = 30.0,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds a request may take.", rich_help_panel=LIMITS)
    ] = 600.0,
    stall_timeout: Annotated[
        float,
        typer.Option(
            help="Seconds without the end of a step until /health gives 503.",
            rich_help_panel=LIMITS,
        ),
    ] = 600.0,
    max_connections: Annotated[
        int | None,
        typer.Option(
            help="Connections open at once; default: what the limit of open files leaves.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    keep_alive_on_engine_death: Annotated[
        bool,
        typer.Option(
            "--keep-alive-on-engine-death",
            help="When the engine's thread "
            "has died, answer 503 instead of ending with exit code 1.",
            rich_help_panel=SERVER,
        ),
    ] = False,
    default_max_tokens: Annotated[
        int | None,
        typer.Option(
            help="For requests without max_tokens; default: the model's, or 256.",
            rich_help_panel=LIMITS,
        ),
    ] = None,
    max_tokens_limit: Annotated[
        int | None, typer.Option(help="The most a request may generate.", rich_help_panel=LIMITS)
    ] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(help="The longest prompt.", rich_help_panel=LIMITS)
    ] = None,
    max_n: Annotated[int, typer.Option(help="Choices of one request.", rich_help_panel=LIMITS)] = 8,
    max_stop: Annotated[
        int, typer.Option(help="Stop strings of one request.", rich_help_panel=LIMITS)
    ] = 8,
    max_body: Annotated[
        str, typer.Option(help="The largest request.", rich_help_panel=LIMITS)
    ] = "4MiB",
    max_schema: Annotated[
        str, typer.Option(help="The largest JSON schema or grammar.", rich_help_panel=LIMITS)
    ] = "64KiB",
    policies: Annotated[
        str | None,
        typer.Option(
            help="Policies a request may ask for, NAME,NAME; default: all.", rich_help_panel=LIMITS
        ),
    ] = None,
    min_keep: Annotated[
        float, typer.Option(help="The least keep a request may ask for.", rich_help_panel=LIMITS)
    ] = 0.02,
    max_keep: Annotated[float, typer.Option(help="The most.", rich_help_panel=LIMITS)] = 1.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            help="Keys, one a line (also: PYRAMIDINFER_API_KEYS).", rich_help_panel=SAFETY
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another name a server on loopback without keys may be "
            "called by; may be repeated.",
            rich_help_panel=SAFETY,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="A site that may ask from a browser; may be repeated.", rich_help_panel=SAFETY
        ),
    ] = None,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log", help="A line in the log for every request.", rich_help_panel=SERVER
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="First measure what the policy keeps of the full "
            "cache's quality; below the floor, do not serve.",
            rich_help_panel=SAFETY,
        ),
    ] = False,
    verify_floor: Annotated[
        float | None,
        typer.Option(help="--verify: the share to be kept; default: 0.8.", rich_help_panel=SAFETY),
    ] = None,
    log_prompts: Annotated[
        bool,
        typer.Option(
            "--log-prompts", help="Write prompts and answers to the log.", rich_help_panel=SAFETY
        ),
    ] = False,
) -> None:
    """Serve a model under the OpenAI API, with a page at /."""
    from pyramidinfer.cli.serve import run_serve
    from pyramidinfer.config import parse_bytes
    from pyramidinfer.server.settings import ServerSettings, read_keys

    choice = _choice(
        model,
        policy,
        keep,
        option,
        lossless,
        dtype,
        device,
        backend,
        threads,
        no_profile,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        weights=weights,
        draft_tokens=draft_tokens,
        max_requests=max_requests,
        step_tokens=step_tokens,
        page_size=page_size,
        reuse_share=reuse_share,
        slot_scores=slot_scores,
        admission=admission,
        expected_output=expected_output,
        preempt=preempt,
        elastic=elastic,
        host_kv_memory=host_kv_memory,
        disk_kv_cache=disk_kv_cache,
        disk_kv_memory=disk_kv_memory,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        pipeline_layers=pipeline_layers,
        rank_timeout=rank_timeout,
    )
    names = None if policies is None else tuple(each.strip() for each in policies.split(","))
    settings = ServerSettings(
        host=host,
        port=port,
        model_name=served_model_name,
        api_keys=read_keys(api_key_file),
        max_waiting=max_waiting,
        queue_timeout=queue_timeout,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        stall_timeout=stall_timeout,
        max_connections=max_connections,
        keep_alive_on_engine_death=keep_alive_on_engine_death,
        compress_idle=compress_idle,
        default_max_tokens=default_max_tokens,
        generation_config=generation_config,
        chat_template_kwargs=json_object(
            "--default-chat-template-kwargs", default_chat_template_kwargs
        ),
        max_tokens_limit=max_tokens_limit,
        max_prompt_tokens=max_prompt_tokens,
        max_n=max_n,
        max_stop=max_stop,
        max_body_bytes=parse_bytes(max_body),
        max_schema_bytes=parse_bytes(max_schema),
        policies=names,
        min_keep=min_keep,
        max_keep=max_keep,
        access_log=access_log,
        log_prompts=log_prompts,
        allowed_hosts=tuple(allowed_host or ()),
        cors_origins=tuple(cors_origin or ()),
        page=page,
    )
    if compress_idle and not reuse_share:
        raise ValueError(
            f"--compress-idle with --reuse-share {reuse_share:g}: no conversation is held then; "
            f"give a share above 0"
        )
    if verify and weights != "auto":
        raise ValueError(
            f"--verify with --weights {weights}: what is measured has --weights auto; leave one of "
            f"them out"
        )
    if verify and lossless:
        raise ValueError(
            "--verify with --lossless: answers are the full cache's, so there is nothing to "
            "measure; leave one of them out"
        )
    if verify_floor is not None and not verify:
        raise ValueError(f"--verify-floor {verify_floor:g} has no effect without --verify")
    if not verify:
        run_serve(choice, settings)
        return
    from pyramidinfer.lab.verify import FLOOR, check_floor

    floor = FLOOR if verify_floor is None else verify_floor
    check_floor("--verify-floor", floor)
    run_serve(choice, settings, floor)


def chat(
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    lossless: Lossless = False,
    draft_tokens: DraftTokens = None,
    kv_memory: KvMemory = "1GiB",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    no_profile: NoProfile = False,
    threads: Threads = 0,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; default: the model's, or 256.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy; default: the model's, or 0.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="1 is off; default: the model's, or off.")
    ] = None,
    generation_config: FromModel = "auto",
    chat_template_kwargs: TemplateKwargs = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop text; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
) -> None:
    """Chat with a model in the terminal; every turn goes on with the last one's cache."""
    from pyramidinfer.cli.chat import run_chat

    asked = said(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or None
    )
    check_drafts(draft_tokens, lossless)
    choice = _choice(
        model,
        policy,
        keep,
        option,
        lossless,
        dtype,
        device,
        backend,
        threads,
        no_profile,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        weights=weights,
        draft_tokens=draft_tokens,
        reuse_share=1.0,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )
    run_chat(
        choice,
        system,
        asked,
        generation_config,
        json_object("--chat-template-kwargs", chat_template_kwargs),
    )


def batch(
    source: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, JSONL.")],
    target: Annotated[Path, typer.Argument(help="Answers; what is there already is not repeated.")],
    model: Model = None,
    policy: PolicyName = DEFAULT_POLICY,
    keep: Keep = None,
    option: Options = None,
    lossless: Lossless = False,
    draft_tokens: DraftTokens = None,
    kv_memory: KvMemory = "1GiB",
    dtype: Dtype = "auto",
    kv_dtype: KvDtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    no_profile: NoProfile = False,
    threads: Threads = 0,
    tensor_parallel_size: TensorParallel = 1,
    pipeline_parallel_size: PipelineParallel = 1,
    max_requests: MaxRequests = 64,
    served_model_name: Annotated[
        str,
        typer.Option(
            "--served-model-name",
            "--model-name",
            help="Name that requests give; default: the folder's.",
        ),
    ] = "",
    generation_config: FromModel = "auto",
) -> None:
    """Answer a file of requests; stopped or killed, it goes on where it was."""
    from pyramidinfer.cli.batch import run_batch

    choice = _choice(
        model,
        policy,
        keep,
        option,
        lossless,
        dtype,
        device,
        backend,
        threads,
        no_profile,
        kv_memory=kv_memory,
        kv_dtype=kv_dtype,
        weights=weights,
        draft_tokens=draft_tokens,
        max_requests=max_requests,
        reuse_share=0.0,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )
    run_batch(choice, source, target, served_model_name, generation_config)
