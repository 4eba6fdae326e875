"""``pyramidinfer batch``: a file of requests, in OpenAI's batch format.

Every answer is one line, written whole and synced to disk before the next.  When run again, the
command cuts off an unfinished line, and answers the rest.  Requests may come from a pipe, which is
read once, into a temporary file.

The exit code is 0 if every request was answered, 1 if all requests have a line and some lines hold
an error (a second run does not retry them), and 2 if some requests have no line.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyramidinfer.cli.common import check_asked, defaults_of
from pyramidinfer.cli.serve import ModelChoice, load
from pyramidinfer.server.batch import (
    Line,
    Requests,
    answer_line,
    batch_settings,
    check_requests,
    check_target,
    open_requests,
    read_requests,
    take_up,
)
from pyramidinfer.server.service import Service

__all__ = ["run_batch"]


def run_batch(
    choice: ModelChoice,
    source: Path,
    target: Path,
    model_name: str,
    generation_config: str = "auto",
) -> None:
    """Answer the requests that have no line in the target; exit code 1 if some answers are
    errors."""
    check_asked({}, generation_config)
    check_target(source, target)
    with open_requests(source) as requests:
        wanted = check_requests(requests)
        with target.open("a+b") as out:
            failed = _answer_rest(
                choice, requests, wanted, out, target, model_name, generation_config
            )
    if failed:
        print(
            f"{failed} requests could not be answered; their lines in the answers have the errors",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _answer_rest(
    choice: ModelChoice,
    requests: Requests,
    wanted: set[str],
    out: BinaryIO,
    target: Path,
    model_name: str,
    generation_config: str,
) -> int:
    """Answer the requests that have no line yet; return the number of errors among all answers.

    ``OSError`` if a request is left without an answer.
    """
    done, failed = take_up(out, target, requests, wanted)
    console = Console(stderr=True)
    if done:
        console.print(f"{len(done)} of {len(wanted)} answers are there already")
    if len(done) == len(wanted):
        return failed
    llm = load(choice)
    defaults_of(llm, generation_config)
    most = llm.engine.config.max_requests
    settings = batch_settings(most, model_name=model_name, generation_config=generation_config)
    service = Service(llm, settings)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    left = wanted - done
    with bar:
        task = bar.add_task(Path(requests.name).name, total=len(wanted), completed=len(done))

        def write(answer: dict[str, Any]) -> None:
            nonlocal failed
            failed += answer["response"]["status_code"] != 200
            out.write(json.dumps(answer).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
            left.discard(answer["custom_id"])
            bar.advance(task)

        lines = (line for line in read_requests(requests) if line.custom_id not in done)
        asyncio.run(_answer_all(service, lines, write, most))
    if left:
        raise OSError(
            f"{requests.name!r} was changed during the run: {len(left)} of its requests "
            f"(such as {min(left)!r}) have no answer; run the same command again to answer them"
        )
    return failed


async def _answer_all(service: Service, lines: Iterator[Line], write: Any, width: int) -> None:
    """Run a bounded number of requests at a time; answers in the order in which they end."""
    service.worker.start()
    running: set[asyncio.Task[dict[str, Any]]] = set()
    try:
        for line in lines:
            running.add(asyncio.create_task(answer_line(service, line)))
            if len(running) >= width:
                running = await _write_ended(running, write)
        while running:
            running = await _write_ended(running, write)
    finally:
        for task in running:
            task.cancel()
        service.close()


async def _write_ended(
    running: set[asyncio.Task[dict[str, Any]]], write: Any
) -> set[asyncio.Task[dict[str, Any]]]:
    ended, left = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in ended:
        write(task.result())
    return left
