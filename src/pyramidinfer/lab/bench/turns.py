"""``bench turns``: conversations over HTTP, with and without reuse of the last turn's cache.

A turn's prompt is the conversation so far and some new tokens.  With reuse, the server continues on
the cache of the turn before; without reuse, it computes everything again.  Both ways alternate,
turn by turn, on the same server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from pyramidinfer.lab.bench.load import Record, ask, client, httpx
from pyramidinfer.lab.bench.serve import check_length, check_tokens, chosen_ids, servers_for
from pyramidinfer.lab.bench.serve_plan import TurnsPlan
from pyramidinfer.lab.bench.served import PROGRAM, Remote
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.bench.timing import ratios, spread
from pyramidinfer.lab.record import write_result

__all__ = ["run_turns"]

#: How a conversation is continued; the second way is the reference.
MODES = {"reuse": True, "anew": False}
Said = dict[str, list[Record]]  # by mode, turn by turn


def run_turns(
    plan: TurnsPlan, out: Path, api_key: str | None = None, program: Sequence[str] = PROGRAM
) -> dict[str, Any]:
    """Measure, write ``out``, and return its result."""
    plan.check()
    said: dict[str, list[Said]] = {}
    load = psutil.getloadavg()[0]
    with servers_for(plan.setting, api_key, program) as servers:
        model = next(iter(servers.values())).model()
        check_length(model, plan.longest, plan.output_len)
        ids = chosen_ids(next(iter(servers.values())), plan.setting.token_ids)
        total = plan.warmup + plan.conversations
        with progress("turns", total * len(servers)) as done:
            for number in range(total):
                for spec, server in servers.items():
                    found = asyncio.run(_converse(plan, server, spec, ids, number))
                    if number >= plan.warmup:
                        said.setdefault(spec, []).append(found)
                    done(f"{spec}, conversation {number + 1}")
    rows = [row for spec in servers for row in _rows(plan, spec, said[spec])]
    result = {"model": model["id"], "load_before": load, "rows": rows}
    write_result(out, plan.configuration, result)
    return result


async def _converse(
    plan: TurnsPlan, server: Remote, spec: str, ids: list[int], number: int
) -> Said:
    """One conversation, both ways; the way that goes first changes from turn to turn."""
    draw = np.random.default_rng([plan.setting.seed, number])
    history: dict[str, list[int]] = {mode: [] for mode in MODES}
    said: Said = {mode: [] for mode in MODES}
    async with client(server.url, server.api_key, plan.setting.timeout) as http:
        for turn in range(plan.turns):
            new = draw.choice(ids, plan.turn_len if turn else plan.prompt_len).tolist()
            modes = list(MODES)
            for mode in modes if (turn + number) % 2 else modes[::-1]:
                history[mode] += new
                record = await _turn(plan, http, spec, mode, history[mode])
                said[mode].append(record)
                history[mode] += record.tokens
    return said


async def _turn(
    plan: TurnsPlan, http: httpx.AsyncClient, spec: str, mode: str, prompt: list[int]
) -> Record:
    """One answer; ``ValueError`` if it is not the requested one."""
    compression = {**plan.setting.compression(spec), "reuse": MODES[mode]}
    record = await ask(
        http,
        "/v1/completions",
        {
            "prompt": prompt,
            "max_tokens": plan.output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "compression": compression,
        },
    )
    check_tokens(record, plan.output_len)
    if record.outcome != "completed":
        raise ValueError(f"a turn of {len(prompt)} tokens {record.outcome}: {record.why}")
    if len(record.tokens) != plan.output_len:
        raise ValueError(
            f"the server returned {len(record.tokens)} of {plan.output_len} generated token ids; a "
            f"conversation needs all of them (return_token_ids)"
        )
    return record


def _rows(plan: TurnsPlan, spec: str, said: list[Said]) -> list[dict[str, Any]]:
    """One row per turn; ratios compare the two ways in the same conversation."""
    rows = []
    for turn in range(plan.turns):
        records = {mode: [each[mode][turn] for each in said] for mode in MODES}
        firsts = {mode: [r.arrivals[0] - r.sent for r in each] for mode, each in records.items()}
        cached = [_cached(record) for record in records["reuse"]]
        rows.append(
            {
                "policy": spec,
                "turn": turn + 1,
                "prompt_tokens": plan.prompt_len + turn * (plan.turn_len + plan.output_len),
                "first_token_seconds": {mode: spread(each) for mode, each in firsts.items()},
                "times_faster": ratios(firsts["anew"], firsts["reuse"]),
                "cached_tokens": {
                    mode: spread([_cached(r) for r in each]) for mode, each in records.items()
                },
                "reused": sum(each > 0 for each in cached),
                "conversations": len(said),
                "kv_tokens_kept": {
                    mode: spread([r.usage.get("kv_tokens_kept", 0) for r in each])
                    for mode, each in records.items()
                },
            }
        )
    return rows


def _cached(record: Record) -> int:
    return int((record.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
