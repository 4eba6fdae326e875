"""LiteLLM, as a library and as a proxy in front of the server."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import litellm
from common import GREETING, PERSON, QUESTION, SHORT, Calls, expect, main
from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two whole numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORM = {
    "type": "json_schema",
    "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
}


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def library(url: str, model: str) -> str:
    calls = Calls()
    usual: dict[str, Any] = {
        "model": f"openai/{model}",
        "api_base": url,
        "api_key": "none",
        "max_tokens": SHORT,
        "temperature": 0,
    }
    asked = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    messages: list[Any] = said(QUESTION)
    message = litellm.completion(messages=messages, **asked, **usual).choices[0].message
    messages.append(message.model_dump())
    for call in message.tool_calls:
        result = str(calls.add(**json.loads(call.function.arguments)))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = litellm.completion(messages=messages, **{**asked, "tool_choice": "none"}, **usual)
    formed = litellm.completion(messages=said(PERSON), response_format=FORM, **usual)
    person = json.loads(formed.choices[0].message.content)
    assert set(person) == {"name", "age"}
    parts = list(litellm.completion(messages=said(GREETING), stream=True, **usual))
    assert len(parts) > 2
    return f"{calls.words()}; {expect(answer.choices[0].message.content)}; {person}"


def responses(url: str, model: str) -> str:
    usual = {"model": f"openai/{model}", "api_base": url, "api_key": "none"}
    answer = litellm.responses(input=GREETING, max_output_tokens=SHORT, temperature=0, **usual)
    return expect(answer.output[0].content[0].text)


@contextmanager
def proxy(url: str, model: str) -> Iterator[OpenAI]:
    """A client of a LiteLLM proxy in front of the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        params = {"model": f"openai/{model}", "api_base": url, "api_key": "none"}
        listed = {"model_list": [{"model_name": model, "litellm_params": params}]}
        config.write_text(json.dumps(listed))
        program, key = Path(sys.executable).with_name("litellm"), f"sk-{secrets.token_hex(32)}"
        process = subprocess.Popen(
            [program, "--config", config, "--port", str(port), "--host", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LITELLM_MASTER_KEY": key},
        )
        try:
            _wait(f"http://127.0.0.1:{port}/health/liveliness", process)
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, timeout=600)
        finally:
            process.terminate()
            process.wait()


def _wait(url: str, process: Any) -> None:
    for _ in range(600):
        assert process.poll() is None, "the proxy ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError("the proxy did not start")


def through_proxy(url: str, model: str) -> str:
    calls = Calls()
    with proxy(url, model) as client:
        usual: dict[str, Any] = {"model": model, "max_tokens": SHORT, "temperature": 0}
        create = client.chat.completions.create
        answer = create(messages=said(QUESTION), tools=[TOOL], tool_choice="required", **usual)
        for call in answer.choices[0].message.tool_calls:
            calls.add(**json.loads(call.function.arguments))
        formed = create(messages=said(PERSON), response_format=FORM, **usual)
        assert set(json.loads(formed.choices[0].message.content)) == {"name", "age"}
        parts = [
            part.choices[0].delta.content or ""
            for part in create(messages=said(GREETING), stream=True, **usual)
            if part.choices
        ]
        assert len(parts) > 2
        told = client.responses.create(model=model, input=GREETING, max_output_tokens=SHORT)
        return f"{calls.words()}; {expect(''.join(parts))}; {expect(told.output_text)}"


if __name__ == "__main__":
    main("litellm", {"library": library, "responses": responses, "proxy": through_proxy})
