"""The options of the benches that load a server, and of the soak test.  Plain values."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pyramidinfer.lab.fields import (
    Keep,
    OutputLen,
    OwnModel,
    Plan,
    PromptLen,
    Seed,
    Threads,
    parse_specs,
    size_text,
)
from pyramidinfer.options import Option, at_least, check_share, positive

__all__ = [
    "AS_IT_IS",
    "FuzzPlan",
    "ServePlan",
    "ServerSetting",
    "SoakPlan",
    "TurnsPlan",
    "rate_name",
]

AS_IT_IS = "the server's"  # name in rows of a server that runs already


def split_options(text: str) -> list[str]:
    """Words of a command line; ``ValueError`` that shows it if a quotation mark is not closed."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--serve-options {text!r}: {str(error).lower()}") from None


@dataclass(frozen=True)
class ServerSetting(Plan):
    """The servers under load: one that runs already, or one that is started for every policy."""

    model: OwnModel = None
    url: Annotated[
        str | None,
        Option("Measure this running server.", unset="a server is started for every policy"),
    ] = None
    policies: Annotated[
        tuple[str, ...],
        Option(
            "Policies to compare: NAME,NAME or 'NAME NAME:keep=.3'. The first is the reference for "
            "the others. With --url, each request sets its policy.",
            unset="full,pyramid; with --url the server's own",
            parse=parse_specs,
        ),
    ] = None  # type: ignore[assignment]  # never None once it is made
    keep: Keep = 0.45
    kv_memory: Annotated[str, Option("Memory for the caches of each server.", check=size_text)] = (
        "64MiB"
    )
    options: Annotated[
        str, Option("Further options of `pyramidinfer serve`.", flags=("--serve-options",))
    ] = ""
    threads: Annotated[
        int,
        Option("CPU threads of each server; 0 lets torch choose the number.", check=at_least(0)),
    ] = 0
    token_ids: Annotated[
        str | None,
        Option(
            "Range of the random token ids in prompts, LOW-HIGH.",
            unset="the ids that /tokenize gives for a text",
        ),
    ] = None
    timeout: Annotated[
        float,
        Option(
            "Seconds without a new token after which a request counts as failed.", check=positive
        ),
    ] = 300.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        usual = () if self.url else ("full", "pyramid")
        given: tuple[str, ...] | None = self.policies
        object.__setattr__(self, "policies", usual if given is None else given)

    def check(self) -> None:
        super().check()
        from pyramidinfer.policies.registry import make_policy

        if self.url is None and not self.policies:
            raise ValueError("--policies is empty: name at least one")
        if len(set(self.policies)) != len(self.policies):
            raise ValueError(f"--policies names one twice: {', '.join(self.policies)}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url!r}: write http://HOST:PORT")
        split_options(self.options)
        for spec in self.policies:
            name, keep, options = self.policy(spec)
            make_policy(name, keep, **options)

    def policy(self, spec: str) -> tuple[str, float | None, dict[str, Any]]:
        """Name, keep and other options."""
        from pyramidinfer.policies.registry import parse_spec

        name, options = parse_spec(spec)
        keep = options.pop("keep", None if name == "full" else self.keep)
        return name, keep, options

    def words(self, spec: str) -> list[str]:
        """The arguments of ``pyramidinfer serve`` for one policy."""
        name, keep, options = self.policy(spec)
        words = [self.model] if self.model else []
        words += ["--port", "0", "--policy", name, "--kv-memory", self.kv_memory]
        words += [] if keep is None else ["--keep", str(keep)]
        for option, value in options.items():
            words += ["--option", f"{option}={value}"]
        return [*words, *split_options(self.options)]

    def compression(self, spec: str) -> dict[str, Any]:
        """The fields of a request to a server that runs already."""
        if self.url is None or spec == AS_IT_IS:
            return {}
        name, keep, options = self.policy(spec)
        if options:
            raise ValueError(f"--policies {spec!r}: a request may choose a policy's keep only")
        return {"policy": name, **({} if keep is None else {"keep": keep})}


@dataclass(frozen=True)
class ServePlan(Plan):
    """Rates are requests per second; ``inf`` sends all at once.

    slo_ttft, slo_itl : seconds to the first token, and between tokens (mean of a request), within
    which a request counts as good.
    """

    setting: ServerSetting
    rates: Annotated[
        tuple[float, ...], Option("Requests per second, a list; inf sends all at once.")
    ] = (1, 2, 4, 8, float("inf"))
    requests: Annotated[int, Option("Number of requests at each rate.", check=at_least(1))] = 32
    prompt_len: PromptLen = 1000
    output_len: Annotated[
        int, Option("Tokens that each request generates, 2 or more.", check=at_least(2))
    ] = 64
    slo_ttft: Annotated[
        float, Option("Goodput: maximum seconds to the first token of a request.", check=positive)
    ] = 1.0
    slo_itl: Annotated[
        float,
        Option("Goodput: maximum mean seconds between the tokens of a request.", check=positive),
    ] = 0.1
    repeats: Annotated[
        int, Option("Number of measurements at each rate; policies run in turn.", check=at_least(1))
    ] = 1
    warmup: Annotated[
        int,
        Option(
            "Number of unmeasured requests to each server before the measurement.",
            check=at_least(0),
        ),
    ] = 2

    def check(self) -> None:
        super().check()
        for rate in self.rates:
            if not rate > 0:
                raise ValueError(f"--rates: {rate:g} must be above 0 (requests a second, or inf)")

    @property
    def configuration(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "setting"}
        return {**asdict(self.setting), **own, "rates": [rate_name(each) for each in self.rates]}


def rate_name(rate: float) -> float | str:
    """A rate as JSON, which has no number for infinity."""
    return "inf" if rate == float("inf") else rate


@dataclass(frozen=True)
class TurnsPlan(Plan):
    """``turn_len``: new tokens in each prompt after the first.  ``warmup``: conversations that do
    not count."""

    setting: ServerSetting
    turns: Annotated[int, Option("Turns of each conversation.", check=at_least(1))] = 5
    prompt_len: Annotated[int, Option("Tokens of each first prompt.", check=at_least(1))] = 1000
    turn_len: Annotated[int, Option("New tokens of each later prompt.", check=at_least(1))] = 50
    output_len: OutputLen = 32
    conversations: Annotated[
        int, Option("Number of measured conversations.", check=at_least(1))
    ] = 5
    warmup: Annotated[
        int,
        Option("Number of unmeasured conversations before the measured ones.", check=at_least(0)),
    ] = 1

    @property
    def longest(self) -> int:
        """Tokens of the last turn's prompt."""
        return self.prompt_len + (self.turns - 1) * (self.turn_len + self.output_len)

    @property
    def configuration(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "setting"}
        return {**asdict(self.setting), **own}


Adapters = Annotated[
    int,
    Option("Number of random LoRA adapters that requests may select.", check=at_least(0)),
]


@dataclass(frozen=True)
class SoakPlan(Plan):
    """Plain values.  ``judge_memory``: whether to check memory; a short run has no steady state."""

    clients: Annotated[int, Option("Number of concurrent clients.", check=at_least(1))] = 200
    seconds: Annotated[float, Option("Duration in seconds.", check=positive)] = 300.0
    model: OwnModel = None
    kv_memory: Annotated[str, Option("Memory for KV caches; so little that requests wait.")] = (
        "24MiB"
    )
    max_waiting: Annotated[
        int, Option("Requests that may wait in the queue.", check=at_least(1))
    ] = 64
    reuse_share: Annotated[
        float,
        Option("Share of the memory for held conversations; 0 holds none.", check=check_share),
    ] = 0.5
    adapters: Adapters = 2
    options: Annotated[
        str, Option("Further options of `pyramidinfer serve`.", flags=("--serve-options",))
    ] = ""
    threads: Threads = 0
    seed: Seed = 0
    judge_memory: bool = True

    @property
    def words(self) -> list[str]:
        """The arguments of ``pyramidinfer serve``."""
        return [
            *([self.model] if self.model else []),
            "--port",
            "0",
            "--kv-memory",
            self.kv_memory,
            "--max-waiting",
            str(self.max_waiting),
            "--reuse-share",
            str(self.reuse_share),
            *split_options(self.options),
        ]


@dataclass(frozen=True)
class FuzzPlan(Plan):
    """Plain values."""

    cases: Annotated[int, Option("Number of requests.", check=at_least(1))] = 10_000
    adapters: Adapters = 1
    threads: Threads = 0
    seed: Seed = 0

    @property
    def words(self) -> list[str]:
        """The arguments of ``pyramidinfer serve``: limits so low that ten thousand answers take
        minutes."""
        limits = "--max-tokens-limit 4 --default-max-tokens 2 --max-prompt-tokens 200 --max-n 3"
        more = "--max-body 64KiB --request-timeout 20"
        return f"--port 0 --kv-memory 16MiB {limits} {more}".split()
