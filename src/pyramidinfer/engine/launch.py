"""The processes of a model that is split over ranks: their start, messages, failures and end.

Rank 0 is the caller's own process.  It starts one process for each other rank, or finds them
started by ``torchrun``; all of them create the same ``LLM``.  Rank 0 then sends commands to the
others (``Link.tell``) in one order, and they run the same steps as rank 0 (``engine/ranks.py``).

A process that ends, hangs or has loaded something different breaks the link: rank 0 ends all others
and raises ``RanksError`` with one line; the others end with one line on standard error.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import psutil
import torch
from torch import Tensor

from pyramidinfer.engine.mail import Mail, framed, unframed

__all__ = ["Groups", "Link", "RanksError", "follow", "open_groups", "open_link"]

#: Seconds that other ranks may take longer to load the model than the first.
LOADING = 1800.0
#: Number of the next link of a started process, the same on all ranks.
_links = itertools.count()
#: The rendezvous store of torchrun's processes, kept for the next model.
_stores: dict[tuple[str, int], Any] = {}


class RanksError(RuntimeError):
    """The ranks of a model no longer work together; the message names the rank and the reason."""

    is_told = True  # shown to a user as one line without a trace


class World(NamedTuple):
    """torch.distributed's parts that a link uses: rank, size, the store, a group for commands."""

    rank: int
    size: int
    store: Any
    control: Any


class Link:
    """One rank's connection to the other ranks of a model.

    ``broken``: the reason why the link is broken, or None.
    """

    def __init__(self, world: World, timeout: float, processes: list[subprocess.Popen[bytes]]):
        self.rank, self.size, self.timeout = world.rank, world.size, timeout
        self.broken: str | None = None
        self.threads: int | None = None  # state of this process before the link
        self.world, self._processes = world, processes
        self.ahead = 0  # commands that may be in flight while this rank continues
        self._going: deque[tuple[Any, Tensor]] = deque()
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._listeners: list[Callable[[str], None]] = []
        if processes:
            threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    # --- commands -------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start to send commands; rank 0 also sends a sign of life regularly."""
        if self.rank == 0:
            threading.Thread(target=self._pulse, name="pulse", daemon=True).start()

    def tell(self, command: Any) -> None:
        """Send a command from rank 0 to all others; None is only a sign of life."""
        with self._lock:
            self.check()
            self._send(pickle.dumps(command))

    def hear(self) -> Any:
        """The next command; waits as long as rank 0 is alive."""
        while True:
            command = pickle.loads(self._receive())
            if command is not None:
                return command

    @property
    def is_over(self) -> bool:
        """Whether the link is broken or closed."""
        return self.broken is not None or self._closed.is_set()

    def check(self) -> None:
        """``RanksError`` if the link is broken or closed."""
        if self.broken is None and self._closed.is_set():
            self.broken = "the ranks of this model have been ended; create a new LLM"
        if self.broken is not None:
            raise RanksError(self.broken)

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Work of all ranks together: an exception in it breaks the link.

        Ctrl-C waits for its end, because other ranks do not receive it.
        """
        with self._lock, uninterrupted():
            self.check()
            try:
                yield
            except (RanksError, ValueError):  # the others raise the same ValueError
                raise
            except BaseException as error:
                raise self.fail(self._blame(error)) from error

    def _send(self, data: bytes, ahead: int | None = None) -> None:
        import torch.distributed as dist

        try:
            for part in framed(data):
                work = dist.broadcast(part, group_src=0, group=self.world.control, async_op=True)
                self._going.append((work, part))
            self._wait(self.ahead if ahead is None else ahead)
        except RuntimeError as error:
            if isinstance(error, RanksError):
                raise
            raise self.fail(self._blame(error)) from error

    def _wait(self, left: int) -> None:
        """Wait until at most this many parts of commands are in flight."""
        while len(self._going) > left:
            self._going.popleft()[0].wait()

    def _receive(self) -> bytes:
        import torch.distributed as dist

        return unframed(lambda part: dist.broadcast(part, group_src=0, group=self.world.control))

    def _pulse(self) -> None:
        """While there is nothing to do, send a sign of life to the others, and check that they are
        alive."""
        while not self._closed.wait(self.timeout / 4):
            with self._lock, contextlib.suppress(RanksError):
                if self.broken is None and not self._closed.is_set():
                    self._send(pickle.dumps(None), ahead=0)

    # --- loading --------------------------------------------------------------------------------

    def decide(self, name: str, make: Callable[[], Any]) -> Any:
        """Rank 0's result of a function as JSON; the same on all ranks."""
        store, key = self.world.store, f"decided/{name}"
        if self.rank == 0:
            store.set(key, json.dumps(make()))
        self.wait_for(key)
        return json.loads(store.get(key))

    def agree(self, what: dict[str, str], error: str | None = None) -> None:
        """Wait until every rank has loaded its part; ``ValueError`` if one could not, or has
        loaded something different from rank 0.

        what : values that must be equal on all ranks, by name;  error : why this rank failed.
        """
        store, size = self.world.store, self.size
        store.set(f"loaded/{self.rank}", json.dumps([what, error]))
        if self.rank:
            self.wait_for("agreed")
            if found := json.loads(store.get("agreed")):
                raise ValueError(found)
            return
        problem = error
        for rank in range(1, size):
            if problem is None:
                self.wait_for(f"loaded/{rank}")
                theirs, problem = json.loads(store.get(f"loaded/{rank}"))
                if problem is not None:
                    problem = f"rank {rank}: {problem}"
                elif other := next((name for name in what if theirs.get(name) != what[name]), None):
                    problem = f"rank {rank} has other {other} than rank 0; give all ranks the same"
        store.set("agreed", json.dumps(problem))
        if problem is not None:
            raise ValueError(problem)

    def wait_for(self, key: str) -> None:
        ends = time.monotonic() + LOADING
        while not self.world.store.check([key]):
            self.check()
            if time.monotonic() > ends:
                raise self.fail(f"{key} of the ranks did not arrive within {LOADING:.0f} s")
            time.sleep(0.02)

    # --- failing and ending ---------------------------------------------------------------------

    def when_broken(self, listener: Callable[[str], None]) -> None:
        """Register a function that is called, in any thread, with the reason why the link broke."""
        self._listeners.append(listener)
        if self.broken is not None:
            listener(self.broken)

    def fail(self, why: str) -> RanksError:
        """Break the link and end all other ranks; returns the error to raise."""
        if self.broken is None:
            self.broken = why
            self._end_processes()
            for listener in self._listeners:
                listener(why)
        return RanksError(self.broken)

    def _blame(self, error: BaseException) -> str:
        """One line that names the rank that failed."""
        ends = time.monotonic() + 1.0
        while self._processes and time.monotonic() < ends:  # a process that dies closes first
            if dead := self._dead():
                return dead
            time.sleep(0.05)
        text = str(error).strip().splitlines() or [type(error).__name__]
        if "timed out" in text[0].lower() or "timeout" in text[0].lower():
            states = ", ".join(
                f"rank {rank} (process {each.pid}) is {_state(each.pid)}"
                for rank, each in enumerate(self._processes, start=1)
            )
            return f"not all ranks answered within {self.timeout:g} s: {states or 'states unknown'}"
        return f"the ranks have stopped working together: {type(error).__name__}: {text[0]}"

    def _dead(self) -> str | None:
        for rank, each in enumerate(self._processes, start=1):
            if (code := each.poll()) is not None:
                how = f"exit code {code}"
                if code < 0:
                    how = f"signal {signal.Signals(-code).name}"
                return f"rank {rank} (process {each.pid}) has ended: {how}"
        return None

    def _watch(self) -> None:
        """Detect a process that ends, even while there is nothing to do."""
        while not self._closed.wait(0.2):
            if self.broken is None and (dead := self._dead()):
                self.fail(dead)

    def _end_processes(self) -> None:
        for each in self._processes:
            if each.poll() is None:
                each.kill()
        for each in self._processes:
            each.wait()
            if each.stdin is not None:
                with contextlib.suppress(OSError):
                    each.stdin.close()

    def close(self) -> None:
        """End all ranks; the model cannot be used afterwards."""
        if self._closed.is_set():
            return
        if self.rank == 0 and self.broken is None:
            with contextlib.suppress(RuntimeError), self._lock:
                self._send(pickle.dumps("close"), ahead=0)
        self._closed.set()
        ends = time.monotonic() + 5.0
        for each in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(0.0, ends - time.monotonic()))
        self._end_processes()
        _leave()
        if self.threads is not None:
            torch.set_num_threads(self.threads)


def _state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of this."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, pressed = signal.getsignal(signal.SIGINT), []
    if before is None:  # not set from Python
        yield
        return
    signal.signal(signal.SIGINT, lambda *caught: pressed.append(caught))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(*pressed[0])


# --- beginning ------------------------------------------------------------------------------------


class Groups(NamedTuple):
    """A rank's groups: the process group of the ranks that split its layers (None: it has them
    alone), and the mail to other stages."""

    heads: Any
    mail: Mail | None


def open_groups(link: Link, tensor: int, device: torch.device) -> Groups:
    """The groups of a rank, if ``tensor`` consecutive ranks are a stage."""
    import torch.distributed as dist

    stage, index = divmod(link.rank, tensor)
    stages = link.size // tensor
    heads, mail = None, None
    if tensor > 1:
        mine = list(range(stage * tensor, (stage + 1) * tensor))
        limit = timedelta(seconds=link.timeout)
        heads = dist.new_group(mine, timeout=limit, use_local_synchronization=True)
    if stages > 1:
        mail = Mail([index + each * tensor for each in range(stages)], device)
        link.ahead = 4 * stages
    return Groups(heads, mail)


def open_link(size: int, device: torch.device, timeout: float, options: dict[str, Any]) -> Link:
    """This process's link to the other ranks, which are started unless ``torchrun`` has done so.

    options : arguments of ``LLM`` for the others.  ``ValueError`` if the number of processes is not
    ``size``.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        raise ValueError(
            "this process has a process group of torch.distributed already (another LLM over "
            "several ranks?): close that first"
        )
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, found = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if found != size:
            raise ValueError(
                f"torchrun started {found} processes, and tensor_parallel_size times "
                f"pipeline_parallel_size is {size}: start that many"
            )
        return _joined(rank, size, device, timeout, [])
    for name, places in psutil.net_if_addrs().items():  # no other machine needs to reach them
        if any(each.address == "127.0.0.1" for each in places):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    store = _store("127.0.0.1", 0, size, True)
    processes = [_start(rank, size, store.port, device, options) for rank in range(1, size)]
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads_of(size))
    try:
        link = _joined(0, size, device, timeout, processes, store)
    except BaseException:
        for each in processes:
            each.kill()
        torch.set_num_threads(threads)
        raise
    link.threads = threads
    return link


def _store(host: str, port: int, size: int, is_master: bool) -> Any:
    import torch.distributed as dist

    limit = timedelta(seconds=LOADING)
    return dist.TCPStore(  # type: ignore[attr-defined]
        host, port, size, is_master, limit, wait_for_workers=False
    )


def _start(
    rank: int, size: int, port: int, device: torch.device, options: dict[str, Any]
) -> subprocess.Popen[bytes]:
    """Start a process that creates the same ``LLM`` as rank ``rank``; it ends when its input
    closes."""
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if device.type == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads_of(size))
    code = (
        "from pyramidinfer import LLM; from pyramidinfer.engine.launch import follow; follow(LLM)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    pickle.dump((sys.path, options), process.stdin)
    process.stdin.flush()
    return process


def threads_of(size: int) -> int:
    """Number of threads of each rank, if this many ranks share one machine."""
    return max(1, torch.get_num_threads() // size)


def _joined(
    rank: int,
    size: int,
    device: torch.device,
    timeout: float,
    processes: list[subprocess.Popen[bytes]],
    store: Any = None,
) -> Link:
    import torch.distributed as dist

    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    limit = timedelta(seconds=timeout)
    try:
        number = 0 if store is not None else next(_links)
        if store is None:
            store = _given_store(rank, size)
        here = dist.PrefixStore(f"link/{number}", store)  # type: ignore[attr-defined]
        link = Link(World(rank, size, here, None), timeout, processes)
        here.set(f"here/{rank}", "")
        for other in range(size):
            link.wait_for(f"here/{other}")
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=here, rank=rank, world_size=size, timeout=limit)
        link.world = link.world._replace(control=dist.new_group(backend="gloo", timeout=limit))
    except (RuntimeError, KeyError) as error:
        if isinstance(error, RanksError):
            raise
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RanksError(f"rank {rank} cannot reach the other ranks: {line}") from error
    return link


def _given_store(rank: int, size: int) -> Any:
    """The store at the address that the starting process passed on."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if place not in _stores:
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        _stores[place] = _store(*place, size, rank == 0 and not agent)
    return _stores[place]


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def follow(make: Callable[..., object]) -> NoReturn:
    """Main function of a process that rank 0 started: create the given ``LLM`` and follow
    commands."""
    for name in (signal.SIGINT, signal.SIGTERM):  # rank 0 decides when to end
        signal.signal(name, signal.SIG_IGN)
    source = sys.stdin.buffer
    sys.path[:], options = pickle.load(source)
    threading.Thread(target=_end_with, args=(source,), daemon=True).start()
    rank = os.environ["RANK"]
    try:
        make(**options)
        raise RuntimeError("a rank that was started is not led")
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"rank {rank}: {type(error).__name__}: {lines[0]}", file=sys.stderr, flush=True)
        os._exit(1)


def _end_with(source: Any) -> None:
    """End as soon as rank 0 has ended."""
    source.read()
    os._exit(1)
