"""What the operator decides: addresses, keys, limits."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyramidinfer.config import check_choice, check_share, check_whole, is_number

__all__ = ["KEYS_VARIABLE", "ServerSettings", "read_keys"]

#: Environment variable that holds API keys, separated by commas or white space.
KEYS_VARIABLE = "PYRAMIDINFER_API_KEYS"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Frozen; ``ValueError`` for a value that cannot be.

    model_name : the name clients ask for; empty is the folder's.
    api_keys : who may ask; none means everybody.
    max_waiting : requests that may wait to begin; one more is answered 429.
    queue_timeout : seconds until a request that has not begun is answered 429.
    request_timeout : seconds until a request is ended.
    drain_timeout : seconds that running requests get after SIGTERM.
    body_timeout : seconds a client may take to send its request.
    max_connections : open at once; None is what the limit of file descriptors leaves.
    keep_alive_on_engine_death : answer 503 when the engine's thread has died, instead of ending, so
        that a supervisor starts the server anew.
    stall_timeout : seconds without the end of a step, with work to do, after which ``/health``
        says that the engine hangs.
    default_max_tokens : for requests that say nothing; None is what the model's generation config
        says, else 256.
    generation_config : ``"auto"`` fills what a request leaves out from the model's
        ``generation_config.json``, ``"none"`` does not.
    max_tokens_limit, max_prompt_tokens : the most a request may ask for; None is what the model
        has positions for.
    max_n : choices of one request (prompts times ``n``).
    max_stop : stop strings, and stop token ids, of one request.
    max_schema_bytes : of a ``response_format`` or ``structured_outputs``.
    prompt_logprob_bytes : of the logits that are worked out for ``prompt_logprobs``, or ``echo``
        with ``logprobs``, in one step.
    chat_template_kwargs : names and values for the chat template, for requests that do not give
        those names.
    compress_idle : while nobody asks for anything, recompress caches of finished conversations, for
        questions to come.
    policies : names a request may ask for besides the server's own; None is every one that the
        pool can hold.
    min_keep, max_keep : bounds of a request's ``compression.keep``.
    log_prompts : write prompts and answers to the log.
    access_log : write a line for every request: method, path, status, seconds.
    allowed_hosts : names by which a server on loopback without keys may be called, besides
        localhost: another site's name for this machine must not let its pages in.
    cors_origins : origins of other sites that may ask from a browser.
    page : serve the page at ``/``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str = ""
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 128
    queue_timeout: float = 30.0
    request_timeout: float = 600.0
    drain_timeout: float = 60.0
    body_timeout: float = 30.0
    max_connections: int | None = None
    keep_alive_on_engine_death: bool = False
    stall_timeout: float = 600.0
    default_max_tokens: int | None = None
    generation_config: str = "auto"
    max_tokens_limit: int | None = None
    max_prompt_tokens: int | None = None
    max_n: int = 8
    max_stop: int = 8
    max_logprobs: int = 20
    max_body_bytes: int = 4 * 2**20
    max_schema_bytes: int = 64 * 1024
    prompt_logprob_bytes: int = 512 * 2**20
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    compress_idle: bool = False
    policies: tuple[str, ...] | None = None
    min_keep: float = 0.02
    max_keep: float = 1.0
    log_prompts: bool = False
    access_log: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    page: bool = True

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __post_init__(self) -> None:
        for name in (
            "max_waiting",
            "max_n",
            "max_stop",
            "max_body_bytes",
            "max_schema_bytes",
            "prompt_logprob_bytes",
        ):
            check_whole(name, getattr(self, name), 1)
        check_whole("max_logprobs", self.max_logprobs, 0)
        check_choice("generation_config", self.generation_config, ("auto", "none"))
        for name in (
            "default_max_tokens",
            "max_tokens_limit",
            "max_prompt_tokens",
            "max_connections",
        ):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name), 1)
        for name in (
            "queue_timeout",
            "request_timeout",
            "drain_timeout",
            "body_timeout",
            "stall_timeout",
        ):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name}={value!r} must be above 0 seconds")
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(f"port={self.port!r} must lie between 0 and 65535 (0 picks one)")
        check_share("min_keep", self.min_keep)
        check_share("max_keep", self.max_keep)
        if not 0 < self.min_keep <= self.max_keep:
            raise ValueError(
                f"min_keep={self.min_keep} must be above 0 and at most max_keep={self.max_keep}"
            )
        default, limit = self.default_max_tokens, self.max_tokens_limit
        if default is not None and limit is not None and default > limit:
            raise ValueError(
                f"default_max_tokens={self.default_max_tokens} is above "
                f"max_tokens_limit={self.max_tokens_limit}"
            )


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys from a file (one a line, ``#`` begins a comment) and from the environment.

    ``ValueError`` for a file that cannot be read or holds no key.
    """
    given = os.environ.get(KEYS_VARIABLE)
    keys = (given or "").replace(",", " ").split()
    if given is not None and not keys:
        raise ValueError(f"{KEYS_VARIABLE} is set and holds no key; unset it to serve everybody")
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise ValueError(f"cannot read the keys in {str(file)!r}: {reason}") from error
        found = [line.partition("#")[0].strip() for line in lines]
        found = [key for key in found if key]
        if not found:
            raise ValueError(f"{str(file)!r} holds no key; write one a line")
        keys += found
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("an API key must be printable ASCII without spaces")
    return tuple(dict.fromkeys(keys))
