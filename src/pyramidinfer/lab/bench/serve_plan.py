"""What the benches that load a server are told, and the soak.  Plain values."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from typing import Any

from pyramidinfer.config import parse_bytes
from pyramidinfer.lab.bench.setting import check_counts
from pyramidinfer.policies.registry import make_policy, parse_spec

__all__ = ["AS_IT_IS", "ServePlan", "ServerSetting", "SoakPlan", "TurnsPlan", "rate_name"]

AS_IT_IS = "the server's"  # how rows of a server that runs already are called


def split_options(text: str) -> list[str]:
    """Words of a command line; ``ValueError`` that shows it where a quotation is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--serve-options {text!r}: {str(error).lower()}") from None


@dataclass(frozen=True)
class ServerSetting:
    """Which servers are asked.  Plain values.

    url : of one that runs; else one is started for every policy.
    policies : ``NAME`` or ``NAME:option=value,…``; with ``url`` each request asks for its own, and
    none leaves the choice to the server.
    options : further words for ``pyramidinfer serve``.
    token_ids : ``LOW-HIGH``, what prompts are drawn from; None takes ids that the server's own
    tokenizer makes of a text.
    """

    model: str | None = None
    url: str | None = None
    policies: tuple[str, ...] = ("full", "pyramid")
    keep: float = 0.45
    kv_memory: str = "64MiB"
    options: str = ""
    threads: int = 0
    token_ids: str | None = None
    timeout: float = 300.0
    seed: int = 0

    def check(self) -> None:
        """``ValueError`` for what cannot be run."""
        if self.url is None and not self.policies:
            raise ValueError("--policies is empty: name at least one")
        if len(set(self.policies)) != len(self.policies):
            raise ValueError(f"--policies names one twice: {', '.join(self.policies)}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"--url {self.url!r}: write http://HOST:PORT")
        if self.threads < 0:
            raise ValueError(f"--threads {self.threads} must be at least 0 (0: the server's own)")
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout:g} must be above 0 seconds")
        parse_bytes(self.kv_memory)
        split_options(self.options)
        for spec in self.policies:
            name, keep, options = self.policy(spec)
            make_policy(name, keep, **options)

    def policy(self, spec: str) -> tuple[str, float | None, dict[str, Any]]:
        """Name, keep and other options."""
        name, options = parse_spec(spec)
        keep = options.pop("keep", None if name == "full" else self.keep)
        return name, keep, options

    def words(self, spec: str) -> list[str]:
        """What stands after ``pyramidinfer serve`` for one policy."""
        name, keep, options = self.policy(spec)
        words = [self.model] if self.model else []
        words += ["--port", "0", "--policy", name, "--kv-memory", self.kv_memory]
        words += [] if keep is None else ["--keep", str(keep)]
        for option, value in options.items():
            words += ["--option", f"{option}={value}"]
        return [*words, *split_options(self.options)]

    def compression(self, spec: str) -> dict[str, Any]:
        """What a request says to a server that runs already."""
        if self.url is None or spec == AS_IT_IS:
            return {}
        name, keep, options = self.policy(spec)
        if options:
            raise ValueError(f"--policies {spec!r}: a request may choose a policy's keep only")
        return {"policy": name, **({} if keep is None else {"keep": keep})}


@dataclass(frozen=True)
class ServePlan:
    """Rates are requests a second; ``inf`` sends all at once.

    slo_ttft, slo_itl : seconds to the first token, and between tokens (mean of a request), within
    which a request counts as good.
    """

    setting: ServerSetting
    rates: tuple[float, ...] = (1, 2, 4, 8, float("inf"))
    requests: int = 32
    prompt_len: int = 1000
    output_len: int = 64
    slo_ttft: float = 1.0
    slo_itl: float = 0.1
    repeats: int = 1
    warmup: int = 2

    def check(self) -> None:
        self.setting.check()
        check_counts(requests=self.requests, prompt_len=self.prompt_len, repeats=self.repeats)
        if self.output_len < 2:
            raise ValueError(
                f"--output-len {self.output_len} must be at least 2: time between tokens"
            )
        if self.warmup < 0:
            raise ValueError(f"--warmup {self.warmup} must be at least 0")
        for name, value in (("slo-ttft", self.slo_ttft), ("slo-itl", self.slo_itl)):
            if not value > 0:
                raise ValueError(f"--{name} {value:g} must be above 0 seconds")
        for rate in self.rates:
            if not rate > 0:
                raise ValueError(f"--rates: {rate:g} must be above 0 (requests a second, or inf)")

    @property
    def configuration(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "setting"}
        return {**asdict(self.setting), **own, "rates": [rate_name(each) for each in self.rates]}


def rate_name(rate: float) -> float | str:
    """A rate as JSON holds it: infinity is no number there."""
    return "inf" if rate == float("inf") else rate


@dataclass(frozen=True)
class TurnsPlan:
    """``turn_len``: new tokens in each prompt after the first.  ``warmup``: conversations that do
    not count."""

    setting: ServerSetting
    turns: int = 5
    prompt_len: int = 1000
    turn_len: int = 50
    output_len: int = 32
    conversations: int = 5
    warmup: int = 1

    def check(self) -> None:
        self.setting.check()
        check_counts(
            turns=self.turns,
            prompt_len=self.prompt_len,
            turn_len=self.turn_len,
            output_len=self.output_len,
            conversations=self.conversations,
        )
        if self.warmup < 0:
            raise ValueError(f"--warmup {self.warmup} must be at least 0")

    @property
    def longest(self) -> int:
        """Tokens of the last turn's prompt."""
        return self.prompt_len + (self.turns - 1) * (self.turn_len + self.output_len)

    @property
    def configuration(self) -> dict[str, Any]:
        own = {key: value for key, value in asdict(self).items() if key != "setting"}
        return {**asdict(self.setting), **own}


@dataclass(frozen=True)
class SoakPlan:
    """Plain values.  ``judge_memory``: a short run has no steady state to judge."""

    clients: int = 200
    seconds: float = 300.0
    model: str | None = None
    kv_memory: str = "24MiB"
    max_waiting: int = 64
    reuse_share: float = 0.5
    options: str = ""
    threads: int = 0
    seed: int = 0
    judge_memory: bool = True

    def check(self) -> None:
        check_counts(clients=self.clients, max_waiting=self.max_waiting)
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds:g} must be above 0")
        if not 0 <= self.reuse_share <= 1:
            raise ValueError(f"--reuse-share {self.reuse_share:g} must lie between 0 and 1")

    @property
    def words(self) -> list[str]:
        """What stands after ``pyramidinfer serve``."""
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
