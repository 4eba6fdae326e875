"""Several replicas of one model: their options, and the routing of conversations.

Nothing here needs Ray; ``ray_serve`` and ``ray_data`` run it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pyramidinfer.config import EngineConfig, check_whole, is_number, nearest
from pyramidinfer.engine import LLM
from pyramidinfer.models.loading import quiet_transformers, shipped_model
from pyramidinfer.server.settings import ServerSettings, read_keys

__all__ = ["SESSION_HEADER", "ReplicaOptions", "conversation_of", "ranks_of"]

#: Header with a client's own name for its conversation.
SESSION_HEADER = "x-session-id"
#: Arguments of ``LLM`` in addition to the fields of ``EngineConfig``.
MODEL = ("model", "policy", "keep", "dtype", "device", "backend")
#: Settings that need a process with its own socket, or that are set in another way.
NOT_HERE = ("port", "max_connections", "keep_alive_on_engine_death", "api_keys")


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Options of ``serve run pyramidinfer.integrations.ray_serve:app NAME=VALUE …``.

    min_replicas, max_replicas : minimum and maximum number of engines; equal for a fixed number.
    target_ongoing_requests : the autoscaler's target for the running and waiting requests of one
        replica.
    spill : if the replica with a conversation's cache has at least this many requests more than
        the least busy one, the conversation goes to another replica.
    num_cpus, num_gpus : resources that Ray reserves for each replica; torch uses ``num_cpus``
        threads.
    ingresses : processes that receive requests and pass them to replicas.
    api_key_file : file with one key per line, read by every replica (also
        ``PYRAMIDINFER_API_KEYS``).
    llm : arguments of ``LLM`` (``model``, ``policy``, ``keep``, ``kv_memory``, …).
    server : fields of ``ServerSettings``.
    """

    min_replicas: int = 2
    max_replicas: int = 4
    target_ongoing_requests: float = 16.0
    spill: int = 16
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    ingresses: int = 1
    api_key_file: str | None = None
    llm: Mapping[str, Any] = field(default_factory=dict)
    server: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("min_replicas", "max_replicas", "ingresses", "spill"):
            check_whole(name, getattr(self, name), 1)
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}"
            )
        for name in ("target_ongoing_requests", "num_cpus", "num_gpus"):
            least = 0 if name == "num_gpus" else 1e-3
            if not is_number(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a number above 0")
        self.settings()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> ReplicaOptions:
        """Options from ``NAME=VALUE`` of a command line or a configuration, which may have names of
        all three kinds.  ``ValueError`` for an unknown one, with the nearest name."""
        own = {each.name for each in fields(cls)} - {"llm", "server"}
        engine = {each.name for each in fields(EngineConfig)} | set(MODEL)
        server = {each.name for each in fields(ServerSettings)} - set(NOT_HERE)
        found: dict[str, dict[str, Any]] = {"own": {}, "llm": {}, "server": {}}
        for name, value in given.items():
            kinds = {"own": own, "llm": engine, "server": server}
            kind = next((kind for kind, names in kinds.items() if name in names), None)
            if kind is None:
                raise ValueError(f"unknown option {name!r}; {nearest(name, own | engine | server)}")
            found[kind][name] = _value(value)
        return cls(**found["own"], llm=found["llm"], server=found["server"])

    def settings(self) -> ServerSettings:
        """Settings of a replica's server, without keys."""
        lists = {
            name: tuple(value.split(",")) if isinstance(value, str) else tuple(value)
            for name, value in self.server.items()
            if name in ("policies", "allowed_hosts", "cors_origins") and value is not None
        }
        return ServerSettings(**{**self.server, **lists})

    def with_keys(self) -> ServerSettings:
        """The settings with the keys that can be read here."""
        file = None if self.api_key_file is None else Path(self.api_key_file)
        return replace(self.settings(), api_keys=read_keys(file))

    def load(self) -> LLM:
        """The loaded model; the shipped one if none is named."""
        quiet_transformers()
        given = {"model": shipped_model(), **self.llm}
        return LLM(given.pop("model"), given.pop("policy", "pyramid"), **given)


def _value(given: Any) -> Any:
    """The JSON value of a command line's text, or the text."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given


def conversation_of(headers: Mapping[str, str], body: bytes) -> str:
    """A key that all requests of a conversation share; empty if there is none.

    headers : names in lower case.  The key is a hash of the session header, else of the body's
    ``prompt_cache_key``, else of a chat's messages (or a response's ``input``) up to the first user
    message.  It includes the API key, because caches are never shared between API keys.
    """
    asked: Any = None
    beginning: Any = headers.get(SESSION_HEADER)
    if beginning is None:
        try:
            asked = json.loads(body)
        except ValueError:
            return ""
        if not isinstance(asked, dict):
            return ""
        beginning = asked.get("prompt_cache_key") or _first_turn(
            asked.get("messages") or asked.get("input")
        )
    if not beginning:
        return ""
    text = json.dumps([headers.get("authorization", ""), beginning])
    return hashlib.sha256(text.encode()).hexdigest()


def _first_turn(messages: Any) -> list[Any] | None:
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        return None
    for place, each in enumerate(messages, start=1):
        if isinstance(each, dict) and each.get("role") == "user":
            return messages[:place]
    return None


def ranks_of(key: str, loads: Mapping[str, int], spill: int) -> list[list[str]]:
    """Replicas to try: those of the first list, then those of the second.

    loads : number of requests of every replica, by its name.  A conversation goes to the replica
    with the highest hash of both names (rendezvous hashing): all ingresses agree on it, and when a
    replica is added or removed, only its own conversations move.  If that replica has at least
    ``spill`` requests more than the least busy one, or without a key, all replicas are in one list.
    """
    if not key or not loads:
        return [list(loads)]
    home = max(loads, key=lambda name: hashlib.sha256(f"{key} {name}".encode()).digest())
    if loads[home] >= min(loads.values()) + spill:
        return [list(loads)]
    return [[home], [name for name in loads if name != home]]
