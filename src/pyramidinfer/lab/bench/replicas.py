"""``bench replicas``: two replicas under Ray Serve on this machine, one of which is killed."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from pyramidinfer.integrations.replicas import SESSION_HEADER
from pyramidinfer.lab.bench.load import httpx
from pyramidinfer.lab.bench.scaling_plans import ReplicasPlan
from pyramidinfer.lab.bench.setting import progress
from pyramidinfer.lab.record import write_result
from pyramidinfer.lab.samples import SHIPPED

__all__ = ["ReplicasPlan", "Tally", "cluster", "run_replicas"]

#: Seconds after which a request without an answer counts as hanging.
PATIENCE = 120.0
#: Maximum attempts per turn if it gets a 503.
TRIES = 20
OBJECT_STORE = 200 * 2**20
#: Process names that Ray sets, by their name in the table.
ROLES = {
    "engine": "ServeReplica:default:engine",
    "ingress": "ServeReplica:default:ingress",
    "controller": "ServeController",
    "proxy": "ProxyActor",
}
WAYS = ("by conversation", "anywhere", "one killed")


@dataclass
class Tally:
    """The outcome of every request."""

    codes: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    further: int = 0
    same: int = 0
    reused: int = 0
    turns: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def row(self) -> dict[str, Any]:
        """The figures; shares refer to turns after the first."""
        return {
            "turns_answered": self.turns,
            "codes": dict(sorted(self.codes.items())),
            "hung": self.hung,
            "same_replica": self.same / max(1, self.further),
            "cache_taken_up": self.reused / max(1, self.further),
            "seconds_median": median(self.seconds) if self.seconds else None,
            "seconds_most": max(self.seconds, default=None),
        }


def run_replicas(plan: ReplicasPlan, out: Path) -> dict[str, Any]:
    """Serve, send requests, kill a replica, write ``out``, and return its result.
    ``ModuleNotFoundError`` without Ray."""
    rows = []
    with cluster(plan) as serve, progress("replicas", len(WAYS)) as done:
        sizes = _sizes()
        for way in WAYS:
            tally, killer = Tally(), None
            if way == "one killed":
                killer = _Killer(serve, tally, plan.chats * plan.turns // 2)
            begun = time.monotonic()
            asyncio.run(_ask_all(plan, way, tally))
            row = {"way": way, "seconds": time.monotonic() - begun, **tally.row}
            rows.append({**row, **({} if killer is None else killer.row())})
            done(way)
    result = {"rows": rows, "process_bytes": sizes}
    write_result(out, {**asdict(plan), "model": plan.model or SHIPPED, "ray": _version()}, result)
    return result


@contextmanager
def cluster(plan: ReplicasPlan) -> Iterator[Any]:
    """Ray with two CPUs and two replicas in it; gives ``ray.serve``."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    import ray
    from ray import serve

    from pyramidinfer.integrations.ray_serve import app

    options = {"min_replicas": 2, "max_replicas": 2, "kv_memory": plan.kv_memory}
    if plan.model is not None:
        options["model"] = plan.model
    ray.init(
        num_cpus=2,
        object_store_memory=OBJECT_STORE,
        include_dashboard=False,
        log_to_driver=False,
        # Otherwise workers run at a lower priority than all other processes.
        _system_config={"worker_niceness": 0},
    )
    try:
        serve.start(http_options={"port": plan.port})
        serve.run(app(options), logging_config={"log_level": "WARNING"})
        yield serve
        serve.shutdown()
    finally:
        ray.shutdown()


async def _ask_all(plan: ReplicasPlan, way: str, tally: Tally) -> None:
    """All chats, ``at_once`` at a time; each turn continues the answer before."""
    room = asyncio.Semaphore(plan.at_once)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=PATIENCE, trust_env=False, limits=limits) as client:

        async def chat(number: int) -> None:
            async with room:
                headers: dict[str, str] = {}
                # All ways begin differently, so that none reuses another's caches.
                messages = [{"role": "user", "content": f"{way} . {plan.opening(number)}"}]
                last = None
                for turn in range(plan.turns):
                    if way == "anywhere":
                        headers[SESSION_HEADER] = f"{number} {turn}"
                    found = await _turn(plan, client, headers, messages, tally)
                    if found is None:
                        return
                    if turn:
                        tally.further += 1
                        tally.same += found.headers["x-replica"] == last
                        cached = found.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                        tally.reused += cached > 0
                    last = found.headers["x-replica"]
                    messages.append(found.json()["choices"][0]["message"])
                    messages.append({"role": "user", "content": "Where is the harp of Ada Holt ?"})

        await asyncio.gather(*(chat(number) for number in range(plan.chats)))


async def _turn(
    plan: ReplicasPlan, client: Any, headers: Any, messages: Any, tally: Tally
) -> Any | None:
    """The answer to a turn, with retries after each 503 as in OpenAI's clients; None without an
    answer."""
    asked = [{key: each[key] for key in ("role", "content")} for each in messages]
    body = {"messages": asked, "max_tokens": plan.new, "temperature": 0}
    for _ in range(TRIES):
        begun = time.monotonic()
        try:
            answer = await client.post(
                f"{plan.url}/v1/chat/completions", json=body, headers=headers
            )
        except httpx.TimeoutException:
            tally.hung += 1
            return None
        except httpx.HTTPError as error:
            tally.codes[type(error).__name__] += 1
            return None
        if answer.status_code == 200:
            tally.codes["200"] += 1
            tally.turns += 1
            tally.seconds.append(time.monotonic() - begun)
            return answer
        tally.codes[_told(answer)] += 1
        if answer.status_code != 503:
            return None
        await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
    return None


def _told(answer: Any) -> str:
    """A status with OpenAI's code, if the body has one."""
    try:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    except (ValueError, LookupError, TypeError):
        return str(answer.status_code)


class _Killer(threading.Thread):
    """Kills an engine's process after a number of answered turns, and records when it is back."""

    def __init__(self, serve: Any, tally: Tally, after: int) -> None:
        super().__init__(daemon=True)
        self.serve, self.tally, self.after = serve, tally, after
        self.answered_before = 0
        self.back: float | None = None
        self.start()

    def run(self) -> None:
        while self.tally.turns < self.after:
            time.sleep(0.01)
        victim = _processes("engine")[0]
        self.answered_before = self.tally.turns
        begun = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        while time.monotonic() - begun < PATIENCE and self.back is None:
            time.sleep(0.25)
            alive = [each for each in _processes("engine") if each.pid != victim.pid]
            states = self.serve.status().applications["default"].deployments["engine"]
            if len(alive) == 2 and states.replica_states.get("RUNNING") == 2:
                self.back = time.monotonic() - begun

    def row(self) -> dict[str, Any]:
        """Turns answered at the time of the kill, and seconds until two replicas ran again."""
        self.join()
        return {"killed_after": self.answered_before, "seconds_back": self.back}


def _processes(role: str) -> list[psutil.Process]:
    """Processes of this cluster by their title."""
    found = []
    for each in psutil.Process().children(recursive=True):
        try:
            if ROLES[role] in " ".join(each.cmdline()):
                found.append(each)
        except psutil.Error:
            continue
    return found


def _sizes() -> dict[str, int]:
    """Private bytes of each kind of process (the largest), and of all other processes of Ray
    together."""
    own = {role: [_own(each) for each in _processes(role)] for role in ROLES}
    every = sum(map(_own, psutil.Process().children(recursive=True)))
    rest = every - sum(map(sum, own.values()))
    return {**{role: max(sizes, default=0) for role, sizes in own.items()}, "rest of Ray": rest}


def _own(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:
        return 0


def _version() -> str:
    import ray

    return str(ray.__version__)
