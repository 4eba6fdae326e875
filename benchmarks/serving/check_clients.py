"""Clients by others against our server: ``make check-clients``.

This starts ``pyramidinfer serve --model smollm2`` and runs every script in ``clients/`` in the
clients' own environment: agent frameworks, chat front ends and a proxy, each as its documentation
says, with nothing changed but the address and the model's name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pyramidinfer.lab.bench.served import serving
from pyramidinfer.lab.record import write_result

SCRIPTS = Path(__file__).parent / "clients"
LIMIT = 1800  # seconds for all checks of one client
MODEL = "smollm2"
#: Nothing may leave this machine: frameworks would report traces and fetch prices.
QUIET = {
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_OFFLINE": "1",
    "OPENAI_API_KEY": "none",
}


def run_script(script: Path, python: Path, url: str) -> dict[str, Any]:
    """The report of one client; what it wrote to standard error goes to ours."""
    done = subprocess.run(
        [python, script, f"{url}/v1", MODEL],
        stdout=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        env={**os.environ, **QUIET},
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise ValueError(f"{script.name} ended with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--environment", type=Path, default=Path(".peers/clients"))
    add("--only", default="", help="clients to run, as names of scripts: llm,litellm")
    add("--serve-options", default="", help="further options for `pyramidinfer serve`")
    add("--json", type=Path, default=Path("benchmarks/results/clients.json"))
    given = parser.parse_args()
    wanted = set(given.only.split(",")) - {""}
    scripts = [
        each
        for each in sorted(SCRIPTS.glob("use_*.py"))
        if not wanted or each.stem.removeprefix("use_") in wanted
    ]
    python = given.environment.absolute() / "bin" / "python"
    words = ["--model", MODEL, "--port", "0", *given.serve_options.split()]
    try:
        if not python.exists() or not scripts:
            raise ValueError(f"no {python} or no script named {given.only!r}")
        with serving({MODEL: words}) as servers:
            rows = [run_script(each, python, servers[MODEL].url) for each in scripts]
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_result(given.json, {"serve": words}, {"clients": rows})
    failed = 0
    for row in rows:
        for name, told in row["checks"].items():
            failed += not told["passed"]
            verdict = "ok    " if told["passed"] else "FAILED"
            print(f"{verdict} {row['client']} {row['version']}, {name}: {told['said']}")
    print(given.json)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
