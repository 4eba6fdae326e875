"""``pyramidinfer generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pyramidinfer.cli.choices import PromptOptions, SamplingOptions
from pyramidinfer.cli.common import check_asked, defaults_of, drafts_told, human_bytes
from pyramidinfer.cli.serve import ModelChoice, load
from pyramidinfer.engine import LLM
from pyramidinfer.engine.chat_template import ChatTemplate
from pyramidinfer.types import RequestOutput, SamplingParams, TokenIds

__all__ = ["run_generate"]


def run_generate(choice: ModelChoice, sampling: SamplingOptions, what: PromptOptions) -> None:
    """Stream an answer to the terminal, or print it as one JSON object."""
    asked, as_json = sampling.asked, what.as_json
    check_asked(asked, sampling.generation_config)
    modules = choice.engine.adapters
    if what.lora is None and modules:
        raise ValueError(f"--lora-modules {min(modules)} has no effect without --lora NAME")
    text = _read_prompt(what.prompt, what.prompt_file)
    llm = load(choice)
    named = sampling.chat_template_kwargs or {}
    ids = _chat_ids(llm, text, named) if what.chat else llm.encode(text)
    params = SamplingParams(**{**defaults_of(llm, sampling.generation_config), **asked})
    output = None
    try:
        written = 0
        for output in llm.stream(ids, params, lora=what.lora):
            if not as_json:
                print(output.text[written:], end="", flush=True)
                written = len(output.text)
    except KeyboardInterrupt:
        if output is not None and as_json:
            _print_json(replace(output, finish_reason="abort"))
        raise
    assert output is not None
    if output.finish_reason == "length" and len(output.token_ids) < params.max_tokens:
        print(
            f"warning: {params.max_tokens} tokens were requested, but the model's context leaves "
            f"{len(output.token_ids)} after this prompt",
            file=sys.stderr,
        )
    if as_json:
        _print_json(output)
        return
    print(flush=True)
    kv, metrics = output.kv, output.metrics
    guessed = f"; {drafts_told(metrics.drafts)}" if metrics.drafts else ""
    Console(stderr=True).print(
        f"[dim]{len(output.prompt_token_ids)} prompt + {len(output.token_ids)} generated tokens, "
        f"{output.finish_reason}; computed {metrics.computed_share:.0%} and kept "
        f"{kv.kept_share:.0%} of layer-tokens; KV {human_bytes(kv.bytes)} of "
        f"{human_bytes(kv.full_bytes)}{guessed}; first token "
        f"{metrics.first_token_seconds or 0:.2f} s, total {metrics.total_seconds:.2f} s[/dim]"
    )


def _read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give a prompt with --prompt TEXT or --prompt-file FILE")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    if str(prompt_file) == "-":
        return sys.stdin.read()
    try:
        return prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read --prompt-file {str(prompt_file)!r}: {reason}") from error


def _chat_ids(llm: LLM, text: str, options: Mapping[str, Any]) -> TokenIds:
    template = ChatTemplate(llm.tokenizer)
    if not template.exists:
        raise ValueError(f"model {llm.name!r} has no chat template; leave out --chat")
    return template.ids([{"role": "user", "content": text}], options=options)


def _print_json(output: RequestOutput) -> None:
    entry = asdict(output)
    entry["kv"]["kept_share"] = output.kv.kept_share
    print(json.dumps(entry))
