"""``llm``, a chat program for the terminal: prompts, a schema, a tool, and a chat of two turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import GREETING, PERSON, QUESTION, SHORT, expect, main

FUNCTION = '''
def add(a: int, b: int) -> int:
    """Add two whole numbers."""
    return a + b
'''


def run(url: str, model: str, *words: str, typed: str = "") -> str:
    """What ``llm WORDS`` prints; its model is the server's."""
    with tempfile.TemporaryDirectory() as folder:
        entry = {"model_id": "local", "model_name": model, "api_base": url}
        entry |= {"supports_tools": True, "supports_schema": True}
        (Path(folder) / "extra-openai-models.yaml").write_text(json.dumps([entry]))
        done = subprocess.run(
            [Path(sys.executable).with_name("llm"), *words, "-m", "local"],
            input=typed,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"},
        )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


OPTIONS = ("-o", "max_tokens", str(SHORT), "-o", "temperature", "0")


def prompt(url: str, model: str) -> str:
    whole = run(url, model, "prompt", GREETING, "--no-stream", *OPTIONS)
    assert run(url, model, "prompt", GREETING, *OPTIONS) == whole
    return expect(whole)


def schema(url: str, model: str) -> str:
    person = json.loads(run(url, model, "prompt", PERSON, "--schema", "name, age int", *OPTIONS))
    assert set(person) == {"name", "age"} and type(person["age"]) is int
    return str(person)


def tool(url: str, model: str) -> str:
    """The model may choose not to call it."""
    words = ("prompt", QUESTION, "--functions", FUNCTION, "--chain-limit", "2", "--td")
    return expect(run(url, model, *words, *OPTIONS))


def chat(url: str, model: str) -> str:
    said = run(url, model, "chat", *OPTIONS, typed=f"{GREETING}\nAnd once more?\nquit\n")
    _, first, second, _ = said.split("\n> ")
    return f"{expect(first)}; {expect(second)}"


if __name__ == "__main__":
    main("llm", {"prompt": prompt, "schema": schema, "tool": tool, "chat": chat})
