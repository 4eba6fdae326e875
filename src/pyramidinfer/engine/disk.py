"""Caches of conversations in files that remain after the process ends.

A file is safetensors, ``ID.safetensors``: a cache's entries and state, its text's tokens, and in
the header the fields of ``Conversation``, the model's mark and a checksum.  One thread reads and
writes, with reads first; other threads do not wait for it.  Only one process at a time uses the
folder, and its ``owner.key`` is the key of owners' digests.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from queue import Empty, PriorityQueue, SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pyramidinfer.cache import Exported, Ring
from pyramidinfer.engine.conversation import Conversation
from pyramidinfer.types import TokenIds

__all__ = ["DiskStore", "Done", "FileError"]

log = logging.getLogger(__name__)

FORMAT = "pyramidinfer-kv-1"
KEY = "owner.key"
OURS = re.compile(r"[0-9a-f]{32}\.safetensors")
UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp")
#: Maximum bytes of a header: a part for every tensor, and one for the rest.
HEADER_EACH, HEADER_REST = 256, 8192


class FileError(Exception):
    """An invalid file; ``is_ours``: the engine wrote it, and it is damaged."""

    def __init__(self, message: str, is_ours: bool = False) -> None:
        super().__init__(message)
        self.is_ours = is_ours


class Done(NamedTuple):
    """A file of ``size`` bytes was written, or (``exported`` and ``tokens``) read; ``error``: why
    not."""

    one: Conversation
    was_read: bool
    exported: Exported | None = None
    tokens: TokenIds | None = None
    error: str | None = None
    size: int = 0


class DiskStore:
    """Files of one folder with at most ``limit`` bytes in total; the least recently used are
    evicted first.

    model : the model of these caches; files of other models are not touched;  pinned : read into
    pinned memory.  ``found``: files at the start;  ``lost`` is called for files that are evicted
    for room;  ``errors`` counts files that could not be read or written.  ``ValueError`` for a
    folder that cannot be used.
    """

    def __init__(self, folder: str | Path, limit: int, model: str, pinned: bool = False) -> None:
        self.folder, self.limit, self.model, self.pinned = Path(folder), limit, model, pinned
        self.bytes = self.errors = 0
        self.lost: Callable[[Conversation], None] = lambda one: None
        self._held: dict[Conversation, None] = {}
        self._lock = self._open()
        self.secret = self._read_key()
        self._jobs: PriorityQueue[tuple[int, int, Callable[[], Done | None] | None]]
        self._jobs = PriorityQueue()
        self._numbers = itertools.count()
        self._done: SimpleQueue[Done] = SimpleQueue()
        self._known: list[Done] = []
        self.found = self._scan()
        for one in sorted(self.found, key=lambda one: one.used):
            self._held[one] = None
            self.bytes += one.file_bytes
        self._thread = threading.Thread(target=self._work, name="kv-files", daemon=True)
        self._thread.start()
        self._make_room(0, None)
        self.found = [one for one in self.found if one in self._held]

    def __len__(self) -> int:
        return len(self._held)

    # --- from the engine's thread ---------------------------------------------------------------

    def write(self, one: Conversation) -> bool:
        """Start to write a cache that is in host memory; False if it must not be written, or
        evicting older files gives no room for it."""
        exported, tokens = one.exported, one.tokens
        assert exported is not None and tokens is not None
        if not one.mark:
            return False
        tensors = _pack(exported, tokens)
        size = sum(each.nbytes for each in tensors.values())
        size += HEADER_EACH * len(tensors) + HEADER_REST
        if not self._make_room(size, one):
            return False
        one.writing, one.file_bytes = True, size
        self._held[one] = None
        self.bytes += size
        about = _about(one, exported)
        self._put(1, lambda: self._write(one, exported, tensors, about))
        return True

    def read(self, one: Conversation) -> None:
        """Start to read a cache's file."""
        one.reading = True
        self._put(0, lambda: self._read(one))

    def forget(self, one: Conversation) -> None:
        """Delete a cache's file, now or as soon as it is written."""
        if one in self._held:
            del self._held[one]
            self.bytes -= one.file_bytes
            path = self._path(one)
            self._put(1, lambda: path.unlink(missing_ok=True))
        one.has_file = False

    def note_done(self) -> None:
        """Process the results of finished operations."""
        with suppress(Empty):
            while True:
                self._take_down(self._done.get_nowait())

    def poll(self) -> list[Done]:
        """Operations finished since the last call."""
        self.note_done()
        found, self._known = self._known, []
        return found

    def wait(self, seconds: float) -> None:
        """Wait until an operation finishes, or for this many seconds."""
        if not self._known:
            with suppress(Empty):
                self._take_down(self._done.get(timeout=seconds))

    def _take_down(self, done: Done) -> None:
        one = done.one
        if done.was_read:
            one.reading = False
        else:
            one.writing = False
            one.has_file = done.error is None and one in self._held
            if one.has_file:
                self.bytes += done.size - one.file_bytes
                one.file_bytes = done.size
        if done.error is not None:
            self.errors += 1
            log.warning("%s", done.error)
            if one in self._held:
                del self._held[one]
                self.bytes -= one.file_bytes
            one.has_file = False
        self._known.append(done)

    def drain(self) -> None:
        """Wait until all requested operations have finished."""
        self._jobs.join()

    def close(self) -> None:
        """Finish all requested operations, and release the folder for another process."""
        if self._lock >= 0:
            self._put(2, None)
            self._thread.join()
            os.close(self._lock)
            self._lock = -1

    def _put(self, urgency: int, job: Callable[[], Done | None] | None) -> None:
        self._jobs.put((urgency, next(self._numbers), job))

    def _make_room(self, size: int, newcomer: Conversation | None) -> bool:
        """Evict files that were used before ``newcomer``, until this many more bytes fit."""
        if size > self.limit:
            return False
        able = [
            one
            for one in self._held
            if not (one.is_pinned or one.reading or one.writing)
            and (newcomer is None or one.used <= newcomer.used)
        ]
        able.sort(key=lambda one: one.used)
        if self.bytes + size - sum(one.file_bytes for one in able) > self.limit:
            return False
        for one in able:
            if self.bytes + size <= self.limit:
                break
            self.forget(one)
            self.lost(one)
        return True

    # --- the folder -----------------------------------------------------------------------------

    def _open(self) -> int:
        """The folder's key file, opened exclusively."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self.folder / KEY, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ValueError(f"disk_kv_cache={str(self.folder)!r}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ValueError(
                f"disk_kv_cache={str(self.folder)!r} is used by another process; give each a "
                f"folder of its own"
            ) from None
        return lock

    def _read_key(self) -> bytes:
        key = os.pread(self._lock, 64, 0)
        if len(key) != 32:
            key = secrets.token_bytes(32)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, key, 0)
        return key

    def _path(self, one: Conversation) -> Path:
        return self.folder / f"{one.id}.safetensors"

    def _scan(self) -> list[Conversation]:
        """The conversations in the headers of our files."""
        found = []
        for path in sorted(self.folder.iterdir()):
            if path.name == KEY:
                continue
            if UNFINISHED.fullmatch(path.name):
                path.unlink(missing_ok=True)
                continue
            try:
                if not OURS.fullmatch(path.name) or path.is_symlink() or not path.is_file():
                    raise FileError("it is no file of ours")
                about, _ = self._header(path)
                one = _conversation(about)
                if f"{one.id}.safetensors" != path.name:
                    raise FileError("it has another file's name")
            except FileError as error:
                self._complain(path, error)
                continue
            one.file_bytes = path.stat().st_size
            found.append(one)
        return found

    def _complain(self, path: Path, error: FileError) -> None:
        """Log one line; delete a damaged file that the engine wrote."""
        self.errors += 1
        if error.is_ours:
            path.unlink(missing_ok=True)
        log.warning("%s is %s: %s", path, "deleted" if error.is_ours else "left alone", error)

    def _header(self, path: Path) -> tuple[dict[str, Any], str]:
        """A file's header fields, and its checksum."""
        try:
            with safe_open(path, "pt") as file:
                words = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise FileError(f"it is torn ({error})", True) from None
        if words.get("format") != FORMAT:
            raise FileError(f"its format is {words.get('format')!r}, not {FORMAT!r}")
        if words.get("model") != self.model:
            raise FileError("it is of another model or dtype")
        try:
            about: dict[str, Any] = json.loads(words["about"])
        except (KeyError, ValueError):
            raise FileError("its header is damaged", True) from None
        return about, words.get("checksum", "")

    # --- in the thread --------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            _, _, job = self._jobs.get()
            try:
                if job is None:
                    return
                done = job()
                if done is not None:
                    self._done.put(done)
            except OSError as error:  # while deleting: the file is found at the next start
                log.warning("a file of a cache could not be deleted: %s", error)
            finally:
                self._jobs.task_done()

    def _write(
        self,
        one: Conversation,
        exported: Exported,
        tensors: dict[str, Tensor],
        about: dict[str, Any],
    ) -> Done:
        path, draft = self._path(one), self.folder / f".{one.id}.tmp"
        try:
            exported.wait()
            words = json.dumps(about)
            header = {"format": FORMAT, "model": self.model, "about": words}
            header["checksum"] = _checksum(tensors, words)
            os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            save_file({name: _alone(each) for name, each in tensors.items()}, draft, header)
            os.chmod(draft, 0o600)
            size = draft.stat().st_size
            os.replace(draft, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            return Done(one, False, error=f"{path} could not be written: {error}")
        return Done(one, False, size=size)

    def _read(self, one: Conversation) -> Done:
        path = self._path(one)
        try:
            about, checksum = self._header(path)
            try:
                with safe_open(path, "pt") as file:
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise FileError(f"it is torn ({error})", True) from None
            if _checksum(tensors, json.dumps(about)) != checksum:
                raise FileError("its checksum is wrong", True)
            exported, tokens = _unpack(tensors, about, self.pinned)
        except FileError as error:
            if error.is_ours:
                path.unlink(missing_ok=True)
            return Done(one, True, error=f"{path} is of no use: {error}")
        return Done(one, True, exported, tokens)


# --- what is in a file ----------------------------------------------------------------------------


def _about(one: Conversation, exported: Exported) -> dict[str, Any]:
    ring = exported.ring
    return {
        "id": one.id,
        "owner": one.owner,
        "digest": one.digest.hex(),
        "length": one.length,
        "mark": one.mark,
        "words": one.words,
        "protect": one.protect,
        "prefix": one.prefix,
        "is_long": one.is_long,
        "size": one.size,
        "used": one.used,
        "seen_len": exported.seen_len,
        "peak_bytes": exported.peak_bytes,
        "on_device": sorted(exported.on_device),
        "ring": None if ring is None else [ring.written, ring.oldest],
    }


def _conversation(about: dict[str, Any]) -> Conversation:
    """``FileError`` if a field is missing."""
    try:
        name, keep = about["words"]
        return Conversation(
            id=about["id"],
            owner=about["owner"],
            digest=bytes.fromhex(about["digest"]),
            length=about["length"],
            mark=about["mark"],
            words=(name, keep),
            policy=None,
            protect=tuple((start, stop) for start, stop in about["protect"]),
            is_long=about["is_long"],
            size=about["size"],
            used=about["used"],
            prefix=about.get("prefix", 0),  # absent in older files
            has_file=True,
        )
    except (KeyError, TypeError, ValueError):
        raise FileError("its header is damaged", True) from None


def _pack(exported: Exported, tokens: TokenIds) -> dict[str, Tensor]:
    """Every tensor of a cache by its name in a file."""
    found = {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "kept": torch.from_numpy(exported.kept),
    }
    for layer, entries in enumerate(exported.entries):
        found |= {f"layer.{layer}.{at}": each for at, each in enumerate(entries)}
    found |= {f"state.{name}": value for name, value in exported.state.items()}
    if (ring := exported.ring) is not None:
        found |= {"ring.queries": ring.queries, "ring.lse": ring.lse}
        found["ring.positions"] = ring.positions
    return found


def _unpack(
    tensors: dict[str, Tensor], about: dict[str, Any], pinned: bool
) -> tuple[Exported, TokenIds]:
    """The inverse of ``_pack``, in new memory."""
    own = {name: _copied(each, pinned) for name, each in tensors.items()}
    entries: list[list[Tensor]] = []
    while f"layer.{len(entries)}.0" in own:
        layer: list[Tensor] = []
        while (name := f"layer.{len(entries)}.{len(layer)}") in own:
            layer.append(own[name])
        entries.append(layer)
    ring = None
    if about["ring"] is not None:
        queries, lse, places = (own[f"ring.{name}"] for name in ("queries", "lse", "positions"))
        ring = Ring(queries, lse, places, *about["ring"])
    exported = Exported(
        own["kept"].numpy(),
        entries,
        about["seen_len"],
        {name[6:]: value for name, value in own.items() if name.startswith("state.")},
        ring,
        about["peak_bytes"],
        frozenset(about["on_device"]),
    )
    return exported, own["tokens"].tolist()


def _raw(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes."""
    found: np.ndarray = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return found


def _copied(tensor: Tensor, pinned: bool) -> Tensor:
    """The same, copied with numpy, which uses no torch threads."""
    own = torch.from_numpy(_raw(tensor).copy()).view(tensor.dtype).reshape(tensor.shape)
    return own.pin_memory() if pinned else own


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied if it shares its storage."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return _copied(tensor, False)


def _checksum(tensors: dict[str, Tensor], words: str) -> str:
    hasher = blake2b(words.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(_raw(tensor).data)
    return hasher.hexdigest()
