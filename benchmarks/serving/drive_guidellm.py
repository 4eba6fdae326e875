"""guidellm against our server: ``make bench-guidellm``.

guidellm (https://github.com/vllm-project/guidellm) is a load generator by others, and its figures
are its own: this starts the server, once for every policy, runs guidellm in its own environment,
and keeps the key figures of its report.

Its synthetic prompts are cut from English text and come out nearly empty where a tokenizer knows
few words, as the shipped model's; so prompts of the asked length are written to a file for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pyramidinfer.lab.bench.serve_plan import ServerSetting
from pyramidinfer.lab.bench.served import Served, serving
from pyramidinfer.lab.documents import document
from pyramidinfer.lab.record import write_result
from pyramidinfer.models.catalog import find_model
from pyramidinfer.models.loading import shipped_model

LIMIT = 900  # seconds one run of guidellm may take
LATENCIES = {"first_token_ms": "time_to_first_token_ms", "inter_token_ms": "inter_token_latency_ms"}


def write_prompts(path: Path, given: argparse.Namespace, server: Served) -> None:
    """A line a request; documents of the generator, cut to the asked number of tokens."""
    count = math.ceil(1.5 * max(map(float, given.rates.split(","))) * given.seconds) + 20
    lines = []
    for number in range(count):
        text = document(random.Random(f"{given.seed} {number}"), given.prompt_len, 2).text
        body = {"prompt": text, "add_special_tokens": False}
        ids = server.post("/tokenize", body).json()["tokens"][: given.prompt_len]
        cut = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
        counts = {"prompt_tokens_count": len(ids), "output_tokens_count": given.output_len}
        lines.append({"prompt": cut, **counts})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_guidellm(given: argparse.Namespace, url: str, work: Path) -> dict[str, Any]:
    """guidellm's own report."""
    report = work / "report.json"
    model = find_model(given.model) if given.model else shipped_model()
    profile = f"kind=poisson,rate={given.rates.split(',')[0]}"
    command = [
        str(given.environment / "bin" / "guidellm"),
        "run",
        "--backend",
        f"kind=openai_http,target={url},request_format=/v1/completions,http2=false",
        "--profile",
        profile,
        "--override",
        "profile.rate",
        given.rates,
        "--constraint",
        f"kind=max_duration,seconds={given.seconds:g}",
        "--tokenizer",
        f"kind=huggingface_auto,model={model}",
        "--data",
        f"kind=json_file,path={work / 'prompts.jsonl'}",
        "--seed",
        f"kind=static,value={given.seed}",
        "--output",
        f"kind=json,path={report}",
        "--disable-console",
    ]
    setting = {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
    }
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=work,
        env={**os.environ, **setting},
    )
    if done.returncode:
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise ValueError(f"guidellm failed: {said[-1][:300] if said else done.returncode}")
    found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return found


def short(error: str) -> str:
    """A status and its name where there is one."""
    status = re.search(r"'(\d{3} [^']+)'", error)
    return status[1] if status else error[:200]


def row(policy: str, benchmark: dict[str, Any]) -> dict[str, Any]:
    """Key figures of one rate; percentiles are of requests that were answered."""
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    errors = {
        short(request["info"]["error"])
        for request in benchmark["requests"]["errored"]
        if request.get("info", {}).get("error")
    }
    found: dict[str, Any] = {
        "policy": policy,
        "rate": benchmark["config"]["strategy"]["rate"],
        "completed": totals["successful"],
        "errors": totals["errored"],
        "cut_off": totals["incomplete"],
        "error_words": sorted(errors)[:5],
        "seconds": benchmark["duration"],
        "requests_per_second": metrics["requests_per_second"]["successful"]["mean"],
        "output_tokens_per_second": metrics["output_tokens_per_second"]["successful"]["mean"],
        "output_tokens": metrics["output_token_count"]["successful"]["mean"],
        "prompt_tokens": metrics["prompt_token_count"]["successful"]["mean"],
        "concurrency": metrics["request_concurrency"]["successful"]["mean"],
    }
    for name, theirs in LATENCIES.items():
        shares = metrics[theirs]["successful"]["percentiles"]
        found[name] = {"p50": shares["p50"], "p99": shares["p99"]}
    return found


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    """One server after the other; a row for each policy and rate."""
    setting = ServerSetting(
        model=given.model,
        policies=tuple(given.policies.split(",")),
        keep=given.keep,
        kv_memory=given.kv_memory,
        options=given.serve_options,
    )
    setting.check()
    rows = []
    for policy in setting.policies:
        print(f"{policy} …", file=sys.stderr, flush=True)
        with (
            serving({policy: setting.words(policy)}) as servers,
            tempfile.TemporaryDirectory() as folder,
        ):
            server, work = servers[policy], Path(folder)
            write_prompts(work / "prompts.jsonl", given, server)
            report = run_guidellm(given, server.url, work)
            rows += [row(policy, each) for each in report["benchmarks"]]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--environment", type=Path, default=Path(".peers/guidellm"))
    add("--model", help="as for `pyramidinfer serve`; default: the shipped model")
    add("--policies", default="full,pyramid")
    add("--keep", type=float, default=0.45)
    add("--kv-memory", default="16MiB")
    add("--rates", default="2,4,8,16", help="requests a second, Poisson")
    add("--seconds", type=float, default=15.0, help="at each rate")
    add("--prompt-len", type=int, default=1000)
    add("--output-len", type=int, default=64)
    add("--seed", type=int, default=0)
    add("--serve-options", default="", help="further options for `pyramidinfer serve`")
    add("--json", type=Path, default=Path("benchmarks/results/guidellm.json"))
    given = parser.parse_args()
    given.environment = given.environment.absolute()
    failed = given.environment / "failed.txt"
    try:
        if failed.is_file():
            raise ValueError(f"guidellm is not installed: {failed.read_text().splitlines()[0]}")
        if not (given.environment / "bin" / "guidellm").exists():
            raise ValueError(f"{given.environment} has no guidellm; run `make bench-guidellm`")
        rows = measure(given)
    except (ValueError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    versions = (given.environment / "versions.txt").read_text().split()
    version = next((each for each in versions if each.startswith("guidellm==")), "guidellm")
    configuration = {k: v for k, v in vars(given).items() if k not in ("json", "environment")}
    write_result(given.json, configuration, {"version": version, "rows": rows})
    for each in rows:
        first, between = each["first_token_ms"], each["inter_token_ms"]
        print(
            f"{each['policy']:10} {each['rate']:>4g}/s: {each['completed']} done, "
            f"{each['errors']} errors; first token p50 {first['p50']:.0f} ms, p99 "
            f"{first['p99']:.0f}; between p50 {between['p50']:.1f}, p99 {between['p99']:.1f}; "
            f"{each['output_tokens_per_second']:.0f} output tokens/s"
        )
    print(given.json)


if __name__ == "__main__":
    main()
