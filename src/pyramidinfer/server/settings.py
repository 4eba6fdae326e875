"""The server's settings: addresses, keys, limits."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pyramidinfer.options import (
    Option,
    at_least,
    check_options,
    check_share,
    check_whole,
    json_object,
    one_of,
    parse_size,
    positive,
    show_bytes,
)
from pyramidinfer.server.logs import FORMATS, LEVELS

__all__ = ["KEYS_VARIABLE", "ServerSettings", "read_key_file", "read_keys"]

#: Environment variable that holds API keys, separated by commas or white space.
KEYS_VARIABLE = "PYRAMIDINFER_API_KEYS"
#: Panel titles in ``--help``.
SERVER, MEMORY, LIMITS, SAFETY = "Server", "Memory and scheduling", "Limits", "Safety"

#: Shared with the commands that run no server.
GenerationConfig = Annotated[
    str,
    Option(
        "Defaults of sampling parameters that a request does not set: auto takes them from the "
        "model's generation_config.json, none ignores that file.",
        check=one_of(("auto", "none")),
        see="#sampling-defaults",
    ),
]
ModelName = Annotated[
    str,
    Option(
        "Name of the model in requests and in /v1/models.",
        unset="the folder's name",
        flags=("--served-model-name", "--model-name"),
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The server's settings; frozen.  ``ValueError`` for an invalid value.

    api_keys : keys that clients need; if empty, any client may send requests.
    metrics_keys : keys that open ``/metrics`` and nothing else; if there are any, ``/metrics``
        needs one of these or one of the API keys.
    body_timeout : seconds a client may take to send its request.
    prompt_logprob_bytes : bytes of the logits computed in one step for ``prompt_logprobs``, or for
        ``echo`` with ``logprobs``.
    """

    host: Annotated[
        str,
        Option(
            "Address to listen on. 0.0.0.0 listens on all addresses of the machine, for example in "
            "a "
            "container; set API keys then.",
            panel=SERVER,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int, Option("Port to listen on; 0 picks a free one and prints it.", panel=SERVER)
    ] = 8000
    model_name: ModelName = ""
    generation_config: GenerationConfig = "auto"
    chat_template_kwargs: Annotated[
        Mapping[str, Any],
        Option(
            "Keyword arguments of the chat template for all requests, a JSON object such as "
            '{"enable_thinking": false}. A request may override them.',
            unset="none",
            panel=SERVER,
            flags=("--default-chat-template-kwargs",),
            parse=json_object,
        ),
    ] = field(default_factory=dict)
    page: Annotated[bool, Option("Serve the web page at /.", panel=SERVER)] = True
    drain_timeout: Annotated[
        float,
        Option(
            "Seconds that running requests have to finish after SIGTERM. The stop timeout of your "
            "supervisor must be longer.",
            panel=SERVER,
            check=positive,
            see="#overload-and-shutdown",
        ),
    ] = 60.0
    keep_alive_on_engine_death: Annotated[
        bool,
        Option(
            "If the engine's thread dies, keep running and answer 503. Without this option the "
            "process ends with exit code 1, so that a supervisor restarts it.",
            panel=SERVER,
        ),
    ] = False
    access_log: Annotated[
        bool,
        Option(
            "Log one line for every request: method, path, status and seconds, never bodies.",
            panel=SERVER,
        ),
    ] = False
    log_level: Annotated[
        str,
        Option(
            "Lowest level that is logged: info, warning or error.",
            panel=SERVER,
            check=one_of(LEVELS),
            see="#logs",
        ),
    ] = "info"
    log_format: Annotated[
        str,
        Option(
            "Format of log lines: text, or json (one object per line).",
            panel=SERVER,
            check=one_of(FORMATS),
            see="#logs",
        ),
    ] = "text"
    otel_traces: Annotated[
        bool,
        Option(
            "Send an OpenTelemetry trace of every request by OTLP to OTEL_EXPORTER_OTLP_ENDPOINT. "
            "Needs the package extra otel.",
            panel=SERVER,
            see="#traces",
        ),
    ] = False
    compress_idle: Annotated[
        bool,
        Option(
            "While no request runs, select the entries of held caches again, so that they do not "
            "depend on the last question of the conversation. For chats.",
            panel=MEMORY,
            see="#conversations",
        ),
    ] = False
    max_waiting: Annotated[
        int,
        Option(
            "Maximum number of requests in the queue; further ones get 429.",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = 128
    queue_timeout: Annotated[
        float,
        Option(
            "Seconds a request may wait in the queue before it gets 429.",
            panel=LIMITS,
            check=positive,
        ),
    ] = 30.0
    request_timeout: Annotated[
        float,
        Option(
            "Seconds a request may take in total before it ends with 504.",
            panel=LIMITS,
            check=positive,
        ),
    ] = 600.0
    body_timeout: float = 30.0
    stall_timeout: Annotated[
        float,
        Option(
            "If no step ends for this many seconds while there is work, /health answers 503. Must "
            "be "
            "longer than any step takes.",
            panel=LIMITS,
            check=positive,
        ),
    ] = 600.0
    max_connections: Annotated[
        int | None,
        Option(
            "Maximum number of open connections.",
            unset="as many as the limit of open files allows, `ulimit -n`",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = None
    default_max_tokens: Annotated[
        int | None,
        Option(
            "max_tokens of requests that do not set it. --admission reserve reserves memory for "
            "that many tokens.",
            unset="the model's max_new_tokens, or 256",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = None
    max_tokens_limit: Annotated[
        int | None,
        Option(
            "Largest max_tokens that a request may set.",
            unset="the rest of the model's context length",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = None
    max_prompt_tokens: Annotated[
        int | None,
        Option(
            "Longest prompt, in tokens.",
            unset="the model's context length",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = None
    max_n: Annotated[
        int,
        Option(
            "Maximum number of choices of a request: prompts times n.",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = 8
    max_stop: Annotated[
        int,
        Option(
            "Maximum number of stop strings, and of stop token ids, in a request.",
            panel=LIMITS,
            check=at_least(1),
        ),
    ] = 8
    max_logprobs: int = 20
    max_body_bytes: Annotated[
        int,
        Option(
            "Largest request body. Set the proxy's limit to match.",
            panel=LIMITS,
            flags=("--max-body",),
            check=at_least(1),
            parse=parse_size,
            show=show_bytes,
        ),
    ] = 4 * 2**20
    max_schema_bytes: Annotated[
        int,
        Option(
            "Largest JSON schema or grammar in a request; large ones take long to compile.",
            panel=LIMITS,
            flags=("--max-schema",),
            check=at_least(1),
            parse=parse_size,
            show=show_bytes,
        ),
    ] = 64 * 1024
    prompt_logprob_bytes: int = 512 * 2**20
    policies: Annotated[
        tuple[str, ...] | None,
        Option(
            "Policies that a request may select in addition to the server's policy: NAME,NAME.",
            unset="all policies that work with the server's options",
            panel=LIMITS,
        ),
    ] = None
    min_keep: Annotated[
        float,
        Option("Smallest keep that a request may set.", panel=LIMITS, check=check_share),
    ] = 0.02
    max_keep: Annotated[
        float,
        Option(
            "Largest keep that a request may set. If it is below 1, requests for the policy full "
            "are "
            "refused too.",
            panel=LIMITS,
            check=check_share,
        ),
    ] = 1.0
    log_prompts: Annotated[
        bool, Option("Write prompts and answers to the log, for debugging.", panel=SAFETY)
    ] = False
    allowed_hosts: Annotated[
        tuple[str, ...],
        Option(
            "An additional value of the Host header that a server on 127.0.0.1 without API keys "
            "accepts, for example behind a proxy. May be repeated.",
            panel=SAFETY,
            flags=("--allowed-host",),
            repeat=True,
            see="#secure",
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        Option(
            "An origin (https://HOST) whose web pages may call the API. May be repeated.",
            panel=SAFETY,
            flags=("--cors-origin",),
            repeat=True,
        ),
    ] = ()
    api_keys: tuple[str, ...] = ()
    metrics_keys: tuple[str, ...] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __post_init__(self) -> None:
        check_options(self)
        check_whole("prompt_logprob_bytes", self.prompt_logprob_bytes, 1)
        check_whole("max_logprobs", self.max_logprobs, 0)
        positive("body_timeout", self.body_timeout)
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(
                f"port={self.port!r} must lie between 0 and 65535 (0 picks a free port)"
            )
        if not 0 < self.min_keep <= self.max_keep:
            raise ValueError(
                f"min_keep={self.min_keep} must be above 0 and at most max_keep={self.max_keep}"
            )
        for name in ("access_log", "log_prompts"):
            if getattr(self, name) and self.log_level != "info":
                raise ValueError(
                    f"{name} logs at level info, which log_level={self.log_level!r} hides; leave "
                    f"one "
                    f"of them out"
                )
        if set(self.metrics_keys) & set(self.api_keys):
            raise ValueError(
                "the same key is a metrics key and an API key; give Prometheus its own key"
            )
        default, limit = self.default_max_tokens, self.max_tokens_limit
        if default is not None and limit is not None and default > limit:
            raise ValueError(
                f"default_max_tokens={self.default_max_tokens} is above "
                f"max_tokens_limit={self.max_tokens_limit}"
            )


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys from a file (one per line, ``#`` begins a comment) and from the environment.

    ``ValueError`` if the file cannot be read or contains no key.
    """
    given = os.environ.get(KEYS_VARIABLE)
    keys = (given or "").replace(",", " ").split()
    if given is not None and not keys:
        raise ValueError(f"{KEYS_VARIABLE} is set and contains no key; unset it to serve everybody")
    return _checked([*keys, *read_key_file(file)])


def read_key_file(file: Path | None) -> tuple[str, ...]:
    """Keys from a file, one per line, ``#`` begins a comment (None: no keys).

    ``ValueError`` if the file cannot be read or contains no key.
    """
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise ValueError(f"cannot read the keys in {str(file)!r}: {reason}") from error
    found = [line.partition("#")[0].strip() for line in lines]
    found = [key for key in found if key]
    if not found:
        raise ValueError(f"{str(file)!r} contains no key; write one per line")
    return _checked(found)


def _checked(keys: list[str]) -> tuple[str, ...]:
    """Each key once; ``ValueError`` for a key that no header can contain."""
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError("an API key must be printable ASCII without spaces")
    return tuple(dict.fromkeys(keys))
