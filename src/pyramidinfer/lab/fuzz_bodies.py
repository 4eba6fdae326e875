"""Bodies that the fuzz changes, and generated bodies reduced to the limits of a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["BODIES", "tame"]

BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "The storm", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2},
        {"prompt": [[5, 6], [7]], "echo": True, "logprobs": 2, "compression": {"policy": "full"}},
        {"prompt": "x", "stream": True, "stream_options": {"include_kv": True}, "stop": ["a"]},
        {"prompt": "The storm", "cache_salt": "a", "compression": {"prefix": 3}, "max_tokens": 2},
        {"model": "adapter-0", "prompt": "x", "max_tokens": 2},
        {
            "prompt": "x",
            "logit_bias": {"5": 3},
            "seed": 1,
            "min_p": 0.1,
            "top_k": 3,
            "repetition_penalty": 1.5,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "return_token_ids": True,
        },
    ],
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "x"}], "max_completion_tokens": 2, "n": 2},
        {
            "messages": [{"role": "system", "content": [{"type": "text", "text": "x"}]}],
            "logprobs": True,
            "top_logprobs": 3,
            "compression": {"keep": 0.5, "reuse": False},
        },
        {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object"}},
            },
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {
                    "role": "assistant",
                    "content": "y",
                    "reasoning_content": "z",
                    "tool_calls": [
                        {
                            "id": "a",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "x"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning_effort": "low",
            "stream": True,
        },
    ],
    "/v1/responses": [
        {"input": "x", "instructions": "y", "max_output_tokens": 2, "stream": True},
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "x"}]},
                {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "a", "output": "x"},
            ],
            "tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}],
            "tool_choice": {"type": "function", "name": "f"},
            "previous_response_id": "resp_1",
            "store": False,
            "reasoning": {"effort": "low"},
        },
        {
            "model": "adapter-0",
            "input": "x",
            "max_output_tokens": 2,
            "cache_salt": "a",
            "compression": {"prefix": 1, "keep": 0.5},
        },
        {
            "input": "x",
            "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "metadata": {"a": "b"},
            "compression": {"keep": 0.5},
        },
    ],
    "/tokenize": [{"prompt": "x"}, {"messages": [{"role": "user", "content": "x"}]}],
    "/detokenize": [{"tokens": [5, 6]}],
}


def tame(body: Any, models: Sequence[str], stored: str) -> None:
    """Reduce a body that follows the schema to the server's limits, so that it generates.

    models : names that the server has;  stored : the id of a stored response.
    """
    if not isinstance(body, dict) or not {"prompt", "messages", "input"} & set(body):
        return
    for name, most in (
        ("max_tokens", 4),
        ("max_completion_tokens", 4),
        ("max_output_tokens", 4),
        ("n", 3),
        ("logprobs", 5),
        ("top_logprobs", 5),
        ("min_tokens", 2),
        ("prompt_logprobs", 5),
    ):
        if type(body.get(name)) is int:
            body[name] = min(body[name], most)
    for name in ("max_completion_tokens" if "max_tokens" in body else "", "best_of"):
        body.pop(name, None)
    if isinstance(body.get("model"), str):
        body["model"] = models[len(body["model"]) % len(models)]
    if stored and body.get("previous_response_id"):
        body["previous_response_id"] = stored
    else:
        body.pop("previous_response_id", None)
    for name in ("reasoning_effort", "reasoning", "chat_template_kwargs"):
        body.pop(name, None)  # not supported or unknown here
    for name in [name for name in body if name.startswith(("guided_", "structured_"))]:
        del body[name]  # the shipped model's tokenizer supports none
    body.pop("response_format", None)
    if isinstance(body.get("tools"), list):
        _tame_tools(body)
    if isinstance(body.get("messages"), list):
        body["messages"] = [_tame_message(each) for each in body["messages"][:4]]
    if body.get("stream"):
        body.pop("prompt_logprobs", None)
    if "top_logprobs" in body and "input" not in body:
        body["logprobs"] = True
    if isinstance(body.get("logit_bias"), dict):
        biases = enumerate(body["logit_bias"].values())
        body["logit_bias"] = {str(7 * index): amount for index, amount in biases}
    if isinstance(body.get("compression"), dict):
        _tame_compression(body["compression"])
    if isinstance(body.get("stop"), list):
        body["stop"] = body["stop"][:8]
    if not body.get("stream"):
        body.pop("stream_options", None)
    for name in ("stop_token_ids", "prompt"):
        if isinstance(body.get(name), list):
            body[name] = _within(body[name])[:8]


def _tame_compression(given: dict[str, Any]) -> None:
    if "policy" in given:
        given["policy"] = "snapkv"
    if type(given.get("prefix")) is int:
        given["prefix"] = 1  # the first message, or letter


def _tame_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message with text that does not depend on others: no tool call, no tool result."""
    role = "user" if message["role"] == "tool" else message["role"]
    content = message.get("content") or "x"
    parts = content[:4] if isinstance(content, list) else content
    return {"role": role, "content": parts}


def _tame_tools(body: dict[str, Any]) -> None:
    """At most three functions with different names, none of them required: the shipped model's
    tokenizer does not support enforced calls."""
    functions = [each.get("function", each) for each in body["tools"] if isinstance(each, dict)]
    for number, function in enumerate(functions):
        function.pop("strict", None)
        function |= {"name": f"f{number}"}
    body["tools"] = body["tools"][:3]
    if body.get("tool_choice") not in ("auto", "none"):
        body.pop("tool_choice", None)


def _within(tokens: list[Any]) -> list[Any]:
    """Replace token IDs, also in nested lists, by IDs that the shipped model has."""
    return [
        _within(each[:50]) if isinstance(each, list) else each % 1000 if type(each) is int else each
        for each in tokens
    ]
