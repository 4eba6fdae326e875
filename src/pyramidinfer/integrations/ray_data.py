"""A batch file through several engines under Ray Data.

``python -m pyramidinfer.integrations.ray_data requests.jsonl answers.jsonl NAME=VALUE …`` reads and
writes the lines of ``pyramidinfer batch``: either goes on where the other was stopped.  ``Answers``
is the stage for a pipeline of one's own.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import ray
    import ray.data
except ImportError as error:
    raise ImportError(f"Ray Data is missing ({error}): pip install 'pyramidinfer[ray]'") from error

from pyramidinfer.integrations.replicas import ReplicaOptions
from pyramidinfer.server.batch import (
    answer_line,
    batch_settings,
    check_requests,
    check_target,
    open_requests,
    parse_line,
    read_requests,
    take_up,
)
from pyramidinfer.server.service import Service

__all__ = ["Answers", "answer_file"]

#: Rows that a task takes along; an engine works on several tasks at a time.
ROWS = 16
#: Settings of a server that mean something here.
SERVER = ("model_name", "generation_config")


class Answers:
    """A stage of ``Dataset.map_batches``: an engine that answers rows.

    Rows have a column ``text``, a line of OpenAI's batch format each, as ``ray.data.read_text``
    gives them; out come ``custom_id`` and in ``text`` the answer's line, in the same order.  What
    cannot be served is answered with its error.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        _check(options)
        llm = replace(options, llm={"reuse_share": 0.0, **options.llm}).load()
        settings = batch_settings(llm.engine.config.max_requests, **options.server)
        self.service = Service(llm, settings)
        self.service.worker.start()

    async def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answers to some rows; ``ValueError`` for one that is no request."""
        texts = enumerate(map(str, rows["text"]), start=1)
        lines = [parse_line("the dataset", number, text) for number, text in texts]
        found = await asyncio.gather(*(answer_line(self.service, line) for line in lines))
        return {
            "custom_id": [each["custom_id"] for each in found],
            "text": [json.dumps(each) for each in found],
        }


def answer_file(source: Path, target: Path, options: ReplicaOptions) -> int:
    """Answer what ``target`` does not hold yet; how many requests could not be answered.

    Each answer is written whole and synced.  Requests are held in memory.  ``ValueError`` for files
    that cannot be, ``OSError`` where a request is left without an answer: the same call goes on.
    """
    _check(options)
    check_target(source, target)
    with open_requests(source) as requests, target.open("a+b") as out:
        wanted = check_requests(requests)
        done, failed = take_up(out, target, requests, wanted)
        lines = [each._asdict() for each in read_requests(requests)]
        rows = [{"text": json.dumps(each)} for each in lines if each["custom_id"] not in done]
        if done:
            print(f"{len(done)} of {len(wanted)} answers are there already", file=sys.stderr)
        left = wanted - done
        for row in _answered(rows, options) if rows else ():
            answer = json.loads(row["text"])
            if answer["custom_id"] not in left:  # a task that was run again
                continue
            out.write(row["text"].encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
            left.discard(answer["custom_id"])
            failed += answer["response"]["status_code"] != 200
    if left:
        raise OSError(f"{len(left)} requests have no answer; the same command goes on where it was")
    return failed


def _answered(rows: list[dict[str, str]], options: ReplicaOptions) -> Any:
    """Rows of answers as blocks of them come in."""
    engines = ray.data.ActorPoolStrategy(
        min_size=options.min_replicas, max_size=options.max_replicas
    )
    asked = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // ROWS))
    return asked.map_batches(
        Answers,
        fn_constructor_args=(options,),
        batch_size=ROWS,
        batch_format="numpy",
        compute=engines,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus or None,
    ).iter_rows()


def _check(options: ReplicaOptions) -> None:
    """``ValueError`` for an option that would have no effect."""
    usual = ReplicaOptions()
    for name in ("target_ongoing_requests", "spill", "ingresses", "api_key_file"):
        if getattr(options, name) != getattr(usual, name):
            raise ValueError(f"{name} has no effect on a batch; leave it out")
    for name in options.server:
        if name not in SERVER:
            raise ValueError(f"{name} has no effect on a batch; leave it out")


def main(words: list[str]) -> int:
    """Exit code of the command: 0 where every request has its line, else 2 with one line why."""
    try:
        if len(words) < 2 or not all("=" in word for word in words[2:]):
            raise ValueError("give a file of requests, a file for answers, and NAME=VALUE options")
        given = dict(word.split("=", 1) for word in words[2:])
        failed = answer_file(Path(words[0]), Path(words[1]), ReplicaOptions.of(given))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if failed:
        print(f"{failed} requests could not be answered; their lines say why", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
