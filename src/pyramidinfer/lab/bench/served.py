"""A server in its own process, which benches and the soak test start, watch and stop."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from typing import Any

from pyramidinfer.lab.bench.load import httpx

__all__ = ["PROGRAM", "Remote", "Served", "parse_metrics", "serving"]

PROGRAM = (sys.executable, "-m", "pyramidinfer", "serve")
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PEAK = "pyramidinfer:peak_requests_running"
KEYS = "PYRAMIDINFER_API_KEYS"  # a server that we start needs none
START_SECONDS = 180.0  # a first start may build kernels
STOP_SECONDS = 90.0
Metrics = dict[str, float]


def parse_metrics(text: str) -> Metrics:
    """Prometheus text → values by name, series of one name added up."""
    from prometheus_client.parser import text_string_to_metric_families

    found: Metrics = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] += sample.value
    return dict(found)


class Remote:
    """A server at an address, and its requests other than generation."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url, self.api_key = url.rstrip("/"), api_key
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, **self._options)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return httpx.post(self.url + path, json=body, **self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "headers": self.headers,
            "timeout": 30.0,
            "trust_env": False,
            "verify": self.url.startswith("https"),
        }

    def metrics(self) -> Metrics:
        """Empty if the server has none."""
        try:
            answer = self.get("/metrics")
        except httpx.HTTPError:
            return {}
        return parse_metrics(answer.text) if answer.status_code == 200 else {}

    def model(self) -> dict[str, Any]:
        """The first of /v1/models; ``ValueError`` if no server answers there."""
        try:
            answer = self.get("/v1/models")
            answer.raise_for_status()
            return dict(answer.json()["data"][0])
        except (httpx.HTTPError, LookupError, ValueError) as error:
            raise ValueError(f"no model is served at {self.url}: {error}") from None

    def idle(self, seconds: float = 60.0) -> Metrics:
        """Wait until nothing runs or waits, and return the metrics; ``ValueError`` after
        ``seconds``."""
        end = time.monotonic() + seconds
        while True:
            now = self.metrics()
            if not now.get(RUNNING) and not now.get(WAITING):
                return now
            if time.monotonic() > end:
                raise ValueError(
                    f"the server at {self.url} still has {now.get(RUNNING, 0):.0f} requests "
                    f"running and {now.get(WAITING, 0):.0f} waiting after {seconds:.0f} seconds"
                )
            time.sleep(0.1)


class Served(Remote):
    """A subprocess that serves; ``ready`` waits for it.

    words : arguments after ``serve``;  threads : 0 leaves the choice to the server.
    """

    def __init__(
        self, words: Sequence[str], threads: int = 0, program: Sequence[str] = PROGRAM
    ) -> None:
        super().__init__("")
        self.words = list(words)
        setting = {name: value for name, value in os.environ.items() if name != KEYS}
        setting |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(
            [*program, *self.words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            env=setting,
        )
        self.said: deque[str] = deque(maxlen=200)
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip())
            match = re.search(r"serves .* at (https?://[^\s\"]+)", line)
            if match and not self.url:
                self.url = match[1].rstrip("/")

    @property
    def pid(self) -> int:
        return self.process.pid

    def ready(self, seconds: float = START_SECONDS) -> Served:
        """Wait until it accepts requests; ``ValueError`` with its last output if it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if self.url and self.get("/ready").status_code == 200:
                    return self
            time.sleep(0.05)
        self.kill()
        said = [line.removeprefix("error: ") for line in self.said if line.strip()]
        raise ValueError(f"the server did not start: {said[-1] if said else 'it said nothing'}")

    def stop(self, seconds: float = STOP_SECONDS) -> int | None:
        """Send SIGTERM and return the exit code; None if it was killed."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None
        self._close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        self.listener.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()


@contextlib.contextmanager
def serving(
    commands: dict[str, list[str]], threads: int = 0, program: Sequence[str] = PROGRAM
) -> Iterator[dict[str, Served]]:
    """Servers by name, started at the same time and ready; stopped at the end."""
    servers: dict[str, Served] = {}
    try:
        for name, words in commands.items():
            servers[name] = Served(words, threads, program)
        for server in servers.values():
            server.ready()
        yield servers
    finally:
        for server in servers.values():
            with contextlib.suppress(ProcessLookupError):
                server.process.terminate()
        for server in servers.values():
            server.stop()
