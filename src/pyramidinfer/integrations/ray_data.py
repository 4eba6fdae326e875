"""A batch file through several engines under Ray Data.

``python -m pyramidinfer.integrations.ray_data requests.jsonl answers.jsonl NAME=VALUE …`` reads and
writes the lines of ``pyramidinfer batch``: each command resumes a file that the other one left
unfinished.  ``Answers`` is a stage for other pipelines.
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

#: Rows per task; an engine works on several tasks at a time.
ROWS = 16
#: Server settings that apply to a batch.
SERVER = ("model_name", "generation_config")


class Answers:
    """A stage of ``Dataset.map_batches``: an engine that answers rows.

    Input rows have a column ``text`` with one line of OpenAI's batch format, as
    ``ray.data.read_text`` returns them.  Output rows have ``custom_id``, and in ``text`` the line
    of the answer, in the same order.  A request that cannot be served gets a line with the error.
    """

    def __init__(self, options: ReplicaOptions) -> None:
        _check(options)
        llm = replace(options, llm={"reuse_share": 0.0, **options.llm}).load()
        settings = batch_settings(llm.engine.config.max_requests, **options.server)
        self.service = Service(llm, settings)
        self.service.worker.start()

    async def __call__(self, rows: Mapping[str, Any]) -> dict[str, list[str]]:
        """Answers to rows; ``ValueError`` for a row that is not a request."""
        texts = enumerate(map(str, rows["text"]), start=1)
        lines = [parse_line("the dataset", number, text) for number, text in texts]
        found = await asyncio.gather(*(answer_line(self.service, line) for line in lines))
        return {
            "custom_id": [each["custom_id"] for each in found],
            "text": [json.dumps(each) for each in found],
        }


def answer_file(source: Path, target: Path, options: ReplicaOptions) -> int:
    """Answer the requests without a line in ``target``; returns the number of errors.

    Each answer is written whole and synced to disk.  Requests are held in memory.  ``ValueError``
    for unsuitable files, ``OSError`` if requests have no answer: call it again to answer them.
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
            if answer["custom_id"] not in left:  # Ray ran a task twice
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
    """Rows of answers, in the order in which their blocks are finished."""
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
    """Exit code of the command, as of ``pyramidinfer batch``: 0 if every request was answered, 1 if
    all requests have a line and some lines hold errors, else 2 and a one-line error."""
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
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
