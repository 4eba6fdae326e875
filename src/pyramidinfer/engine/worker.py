"""The engine in its own thread, with an async interface for requests.

One thread owns the engine and steps it while there is work.  ``submit`` queues requests and returns
a ``Stream``; after every step each stream receives the new tokens of its requests.  A request whose
client has disconnected is aborted before the next step begins.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol, TypeVar

import torch

from pyramidinfer.engine.engine import Engine
from pyramidinfer.engine.launch import RanksError
from pyramidinfer.engine.request import Request
from pyramidinfer.engine.stats import Stats
from pyramidinfer.native.forks import set_threads
from pyramidinfer.types import KVUsage, Logprob, TokenIds

__all__ = ["AsyncEngine", "Busy", "Observer", "Stream", "Update"]

log = logging.getLogger(__name__)
T = TypeVar("T")

#: Seconds without work after which the pool is checked.
QUIET = 0.05


class Busy(Exception):
    """The queue is full; ``retry_after``: seconds after which there may be room."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_after} s")
        self.retry_after = retry_after


class Update(NamedTuple):
    """What one of a stream's requests (``choice``) produced in a step.

    ``finish_reason``: as in ``RequestOutput``, or ``"timeout"``, or ``"queue_timeout"`` for a
    request that never began.  ``kv``: its cache now, if the stream watches it and in the last
    update.
    """

    choice: int
    text: str
    token_ids: TokenIds
    logprobs: list[Logprob]
    finish_reason: str | None
    error: str | None
    kv: KVUsage | None


class Observer(Protocol):
    """Collects metrics; called in the engine's thread."""

    def tokens(self, request: Request, count: int, since: float | None) -> None:
        """A request produced ``count`` tokens at once, ``since`` seconds after its previous ones
        (None: its first token is among them)."""

    def ended(self, request: Request, reason: str) -> None:
        """A request ended."""

    def stepped(self) -> None:
        """A step has ended and its results have been delivered."""

    def checked(self, sound: bool) -> None:
        """The idle engine checked its pool; ``sound``: whether no page is lost."""


@dataclass(slots=True, eq=False)
class Followed:
    """The output of one request that a stream has received so far."""

    request: Request
    given: int = 0
    written: int = 0
    last: float | None = None
    ended: bool = False


@dataclass(slots=True, eq=False)
class Stream:
    """Updates of one submission, in order: ``async for update in stream``.

    ``close`` aborts the requests that have not ended.  ``followed`` lists, for every prompt, a
    request followed by its samples.  ``over`` is called in the engine's thread when all of them
    have ended.
    """

    engine: AsyncEngine
    loop: asyncio.AbstractEventLoop
    followed: list[Followed]
    watch: bool
    timeout: float
    arrived: float = field(default_factory=time.monotonic)
    updates: asyncio.Queue[Update] = field(default_factory=asyncio.Queue)
    over: Callable[[list[Request]], None] | None = None
    left: int = 0
    again: bool = False

    def __post_init__(self) -> None:
        self.left = len(self.followed)

    @property
    def requests(self) -> list[Request]:
        return [each.request for each in self.followed]

    async def next(self) -> Update | None:
        """The next update, or None when every request has ended."""
        if not self.left:
            return None
        update = await self.updates.get()
        self.left -= update.finish_reason is not None
        return update

    async def __aiter__(self) -> AsyncIterator[Update]:
        while (update := await self.next()) is not None:
            yield update

    def close(self) -> None:
        """Abort the requests that still run; their pages are free before the next step."""
        if self.left:
            self.left = 0
            self.engine.tell(lambda: self.engine.abort(self))


class AsyncEngine:
    """Steps an engine in a thread.

    ``max_waiting``: the most requests that may wait to begin; above it ``submit`` raises ``Busy``.
    ``queue_timeout``: seconds after which a request that has not begun is ended.
    ``compress_idle``: recompress caches of finished conversations while there are no requests
    (``engine/recompress.py``).
    """

    def __init__(
        self,
        engine: Engine,
        observer: Observer,
        *,
        max_waiting: int,
        queue_timeout: float,
        compress_idle: bool = False,
    ) -> None:
        self.engine, self.observer = engine, observer
        self.recompressor = engine.recompressor() if compress_idle else None
        self.max_waiting, self.queue_timeout = max_waiting, queue_timeout
        self.pace = 0.0  # running mean of the seconds between two requests that end
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._live: list[Stream] = []
        self._arriving = 0
        self.stats = self._now()  # statistics as of the last step
        self._stopping = False
        self.died = False  # ended by an exception, not by ``stop``
        self.why = "the engine's thread has ended with an error, which the log has"
        engine.when_broken(lambda _: self.tell(self.engine.check_alive))
        self._last_end = time.monotonic()
        self._threads = torch.get_num_threads()
        self._beat = time.monotonic()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- from any thread ----------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Abort everything and end the thread."""
        if self._thread.is_alive() and not self.died:
            self.tell(self._stop)
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self.died

    @property
    def is_idle(self) -> bool:
        """Whether no request is waiting, running or arriving."""
        return not self._live and not self._arriving

    @property
    def stalled_seconds(self) -> float:
        """Seconds since the last step ended, if there is work."""
        return 0.0 if self.is_idle else time.monotonic() - self._beat

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        return self._arriving + self.stats.waiting

    def tell(self, command: Callable[[], None]) -> None:
        """Run a function in the engine's thread between two steps."""
        self._commands.put(command)

    def ask(self, look: Callable[[], T]) -> Future[T]:
        """The result of ``look`` (or its exception), called in the engine's thread between two
        steps.  ``RuntimeError`` if that thread has ended, at once or in the future."""
        found: Future[T] = Future()

        def answer() -> None:
            if self.died:
                found.set_exception(RuntimeError(self.why))
                return
            try:
                found.set_result(look())
            except Exception as error:
                found.set_exception(error)

        with self._lock:
            if not self.is_alive:
                raise RuntimeError("the engine's thread has ended")
            self.tell(answer)
        return found

    def submit(
        self,
        leaders: list[Request],
        *,
        timeout: float,
        watch: bool = False,
        arrived: float | None = None,
        over: Callable[[list[Request]], None] | None = None,
    ) -> Stream:
        """Queue requests that ``Engine.make`` built; call it in an event loop.

        ``watch``: every update includes the cache;  ``arrived``: when the requests arrived
        (``time.monotonic``); waiting times count from here;  ``over``: called in the engine's
        thread with all requests and their samples once they have ended.  Raises ``Busy`` if the
        queue is full.
        """
        if self.waiting and self.waiting + len(leaders) > self.max_waiting:
            raise Busy(self.waiting, self.retry_after())
        followed = [Followed(each) for leader in leaders for each in (leader, *leader.samples)]
        stream = Stream(self, asyncio.get_running_loop(), followed, watch, timeout, over=over)
        if arrived is not None:
            stream.arrived = arrived
        if self.is_idle:
            self._beat = time.monotonic()  # idle time does not count as a stall
        with self._lock:  # if the thread dies, requests in the queue get an error
            if not self.is_alive:
                raise RuntimeError("the engine's thread has ended")
            self._arriving += len(leaders)
            self.tell(lambda: self._begin(stream, leaders))
        return stream

    def retry_after(self) -> int:
        """Seconds after which the queue may have advanced by its length."""
        return max(1, min(60, math.ceil(self.pace * (self.waiting + 1))))

    # --- in the engine's thread ---------------------------------------------------------------

    def _begin(self, stream: Stream, leaders: list[Request]) -> None:
        self._live.append(stream)
        try:
            if not self.died:
                for leader in leaders:
                    self.engine.submit(leader)
        except Exception as error:
            is_bug = not isinstance(error, RanksError)
            log.error("a request could not be queued: %s", error, exc_info=is_bug)
            for each in stream.requests:
                self.engine.fail(each, error=f"{type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._arriving -= len(leaders)
                if not self.died:
                    self.stats = self._now()

    def abort(self, stream: Stream) -> None:
        """End a stream's requests at once (the engine's thread only; see ``Stream.close``)."""
        if self.died:
            return
        self._end(stream, "abort")
        if stream in self._live:
            self._live.remove(stream)
            _say_over(stream)

    def _end(self, stream: Stream, reason: str) -> None:
        for request in [each for each in stream.requests if not each.ended]:
            self.engine.fail(request, reason)  # samples that wait for it end with it
            self.observer.ended(request, reason)

    def abort_all(self) -> None:
        """End every request (from any thread)."""
        self.tell(self._abort_all)

    def _abort_all(self) -> None:
        if self.died:
            return
        for stream in self._live:
            self._end(stream, "abort")
        self._publish()

    def _stop(self) -> None:
        self._abort_all()
        self.engine.conversations.close()
        self._stopping = True

    def _work(self) -> None:
        set_threads(self._threads)  # OpenMP sets the thread count per calling thread
        try:
            self._loop()
        except RanksError as error:
            self.why = str(error)
            log.error("%s", error)
            self._die()
        except BaseException:  # a panic in a Rust library is not an Exception
            log.exception("the engine's thread has ended")
            self._die()

    def _die(self) -> None:
        """End all streams with an error, including those still in the queue, without using the
        engine."""
        with self._lock:
            self.died = True
        while True:
            try:
                command = self._commands.get_nowait()
            except Empty:
                break
            with suppress(Exception):
                command()
        told: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Update]]] = {}
        for stream in self._live:
            for index, each in enumerate(stream.followed):
                if not each.ended:
                    error = each.request.error or f"the engine has stopped: {self.why}"
                    update = Update(index, "", [], [], "error", error, None)
                    told.setdefault(stream.loop, []).append((stream, update))
        self._live = []
        _tell(told)

    def _loop(self) -> None:
        checked, due, recompressing = True, 0.0, False
        while not self._stopping:
            self._beat = time.monotonic()
            if not self.engine.scheduler.idle:
                self._obey(0.0)
            elif checked:
                self._obey(None)
            elif not self._obey(0.0 if recompressing else max(QUIET, due - self._beat)):
                recompressing = self._recompress()
                if not recompressing:
                    begun = time.monotonic()
                    self._check()
                    checked, due = True, 21 * time.monotonic() - 20 * begun  # 5% of the time
            steps = not self.engine.scheduler.idle
            if steps:
                checked = recompressing = False
                self._step()
            self._expire()
            self._publish()
            if steps:
                self.observer.stepped()

    def _obey(self, wait: float | None) -> bool:
        """Run the commands in the queue, waiting this many seconds for one (None: until one
        arrives); False if there was none."""
        try:
            command = self._commands.get(block=wait != 0.0, timeout=wait)
        except Empty:
            return False
        if self.recompressor is not None:
            self.recompressor.drop()  # requests take priority over recompression
        command()
        with suppress(Empty):
            while not self._stopping:
                self._commands.get_nowait()()
        return True

    def _now(self) -> Stats:
        found, idle = self.engine.stats(), self.recompressor
        if idle is None:
            return found
        return found._replace(recompressed=idle.done, recompressed_tokens=idle.tokens)

    def _recompress(self) -> bool:
        """Do a small step of recompressing held caches; False if there is nothing to do."""
        if self.recompressor is None:
            return False
        try:
            return self.recompressor.step()
        except Exception:
            log.exception("a held cache could not be recompressed; it stays as it was")
            return True

    def _check(self) -> None:
        try:
            self.engine.check()
            self.observer.checked(True)
        except AssertionError:
            log.exception("the pool is not sound")
            self.observer.checked(False)

    def _step(self) -> None:
        running = [
            each for stream in self._live for each in stream.followed if not each.request.ended
        ]
        try:
            self.engine.step()
        except RanksError:  # no further step is possible
            raise
        except Exception:
            log.exception("a step failed; its requests are tried one by one")
            try:
                self._restart()
                self.engine.step_singly()
            except Exception as worse:
                log.exception("so did trying them one by one: all are ended")
                for each in running:
                    self.engine.fail(each.request, error=f"{type(worse).__name__}: {worse}")
        for request in [each.request for each in running if each.request.ended]:
            self.observer.ended(request, request.finish_reason or "")
            now = time.monotonic()
            if self.engine.scheduler.waiting:  # otherwise no request waited in this gap
                gap = now - self._last_end
                self.pace += (0.1 if self.pace else 1.0) * (gap - self.pace)
            self._last_end = now

    def _restart(self) -> None:
        """After a failed step: restart a request without the cache, if the step could not restore
        it, it had just reused a conversation's cache, and it has delivered nothing yet.  If it
        cannot be restarted, its error stays."""
        for stream in self._live:
            for each in [each for each in stream.followed if each.request in self.engine.lost]:
                old = each.request
                told = stream.again or old.output or old.samples or not old.leads
                if (old.reused or old.prefix) and not told:
                    stream.again = True
                    try:
                        each.request = self._again(old)
                    except Exception:
                        log.exception("a request could not start again")

    def _again(self, old: Request) -> Request:
        """A request that asks for the same, queued."""
        lora = None if old.adapter is None else old.adapter.name
        new = self.engine.make(
            old.prompt,
            old.params,
            policy=old.policy,
            protect=old.protect,
            lora=lora,
            prefix=old.prefix,
        )
        new.times.arrived = old.times.arrived
        self.engine.submit(new)
        return new

    def _expire(self) -> None:
        now = time.monotonic()
        for stream in self._live:
            if now - stream.arrived > stream.timeout:
                self._end(stream, "timeout")
            elif now - stream.arrived > self.queue_timeout and all(
                request.times.started is None for request in stream.requests
            ):
                self._end(stream, "queue_timeout")

    def _publish(self) -> None:
        """Send every stream the new output of its requests, and refresh ``stats``."""
        self.stats = self._now()
        told: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Update]]] = {}
        for stream in self._live:
            for index, each in enumerate(stream.followed):
                update = self._news(stream, index, each)
                if update is not None:
                    told.setdefault(stream.loop, []).append((stream, update))
        over = [s for s in self._live if all(each.ended for each in s.followed)]
        self._live = [each for each in self._live if each not in over]
        _tell(told)
        for stream in over:
            _say_over(stream)

    def _news(self, stream: Stream, index: int, each: Followed) -> Update | None:
        request = each.request
        tokens = request.output[each.given :]
        ended = request.ended
        if each.ended or not (tokens or ended):
            return None
        if tokens:
            now = time.monotonic()
            since = None if each.last is None else now - each.last
            self.observer.tokens(request, len(tokens), since)
            each.last = now
        logprobs = request.logprobs[each.given :]
        text, detokenizer = "", request.detokenizer
        if detokenizer is not None and not ended and not detokenizer.stopped:
            detokenizer.update(request.output)
            if detokenizer.error:
                self.engine.fail(request, error=detokenizer.error)
                self.observer.ended(request, "error")
                ended = True
        each.given, each.ended = len(request.output), ended
        if detokenizer is not None:
            whole = detokenizer.text if ended else detokenizer.stable
            text, each.written = whole[each.written :], max(each.written, len(whole))
        kv = self.engine.usage(request) if stream.watch or ended else None
        return Update(index, text, tokens, logprobs, request.finish_reason, request.error, kv)


def _say_over(stream: Stream) -> None:
    if stream.over is not None:
        stream.over(stream.requests)


def _tell(told: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Update]]]) -> None:
    for loop, items in told.items():
        with suppress(RuntimeError):  # the loop is closed: there is no receiver
            loop.call_soon_threadsafe(_deliver, items)


def _deliver(items: list[tuple[Stream, Update]]) -> None:
    for stream, update in items:
        stream.updates.put_nowait(update)
