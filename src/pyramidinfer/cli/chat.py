"""``pyramidinfer chat``: a conversation in the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pyramidinfer.cli.choices import SamplingOptions
from pyramidinfer.cli.common import check_asked, defaults_of, drafts_told, human_bytes
from pyramidinfer.cli.serve import ModelChoice, load
from pyramidinfer.cli.terminal import Wrapped, history
from pyramidinfer.engine import LLM
from pyramidinfer.engine.chat_template import ChatTemplate
from pyramidinfer.engine.request import Request
from pyramidinfer.policies import Policy, choose_policy
from pyramidinfer.server.prompts import Prompts
from pyramidinfer.server.protocol import Message
from pyramidinfer.types import SamplingParams

__all__ = ["run_chat"]

MAX_TOKENS = 256  # default length of an answer
HELP = """/reset        begin a new conversation
/system TEXT  begin one with this system prompt
/keep SHARE   change the budget of the policy
/policy NAME  change the policy
/lora NAME    answer with this adapter of --lora-modules; without a name, with the model alone
/exit         leave (also Ctrl-D); Ctrl-C stops an answer, arrow keys recall your input"""


def run_chat(
    choice: ModelChoice,
    system: str | None,
    sampling: SamplingOptions,
    lora: str | None = None,
) -> None:
    """Read a line, answer it, until the input ends.

    lora : the name of the adapter to begin with.
    """
    asked, source = sampling.asked, sampling.generation_config
    check_asked(asked, source)
    llm = load(choice)
    if not ChatTemplate(llm.tokenizer).exists:
        raise ValueError(f"model {llm.name!r} has no chat template; use `pyramidinfer generate`")
    chosen = {"max_tokens": MAX_TOKENS, **defaults_of(llm, source), **asked}
    chat = _Chat(llm, SamplingParams(**chosen), system, sampling.chat_template_kwargs or {})
    if lora is not None:
        chat.use_adapter(lora)
    chat.note(f"{Path(llm.name).name}: /help lists the commands, Ctrl-D leaves")
    with history():
        while _turn(chat):
            pass


def _turn(chat: _Chat) -> bool:
    """Read a line and carry it out; False if it was the last one."""
    is_terminal = sys.stdin.isatty()
    try:
        line = input("> " if is_terminal else "").strip()
    except EOFError:
        if is_terminal:
            print()
        return False
    except KeyboardInterrupt:  # nothing was running
        print()
        chat.note("Ctrl-D leaves")
        return True
    if line in ("/exit", "/quit"):
        return False
    try:
        if line.startswith("/"):
            chat.command(line)
        elif line:
            chat.say(line)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # before the answer began
        chat.note("stopped")
    return True


class _Chat:
    """A conversation, its policy, and its last result."""

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None,
        template_kwargs: Mapping[str, Any],
    ) -> None:
        self.llm, self.params, self.policy = llm, params, llm.policy
        self.prompts = Prompts(llm.tokenizer, llm.engine.runner.vocab_size, template_kwargs)
        self.console = Console(stderr=True, highlight=False)
        self.lossless = llm.policy.guesses
        self.keep: float | None = getattr(self._chosen, "keep", None)  # of the last answer
        self.lora: str | None = None
        self.turns: list[Message] = []
        self.reset(system)

    def note(self, text: str) -> None:
        self.console.print(text, style="dim", markup=False, soft_wrap=True)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.turns = [Message(role="system", content=system)] if system else []
        self.llm.engine.conversations.clear()

    def command(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/help":
            self.note(HELP)
        elif word == "/reset":
            self.reset(self.system)
            self.note("a new conversation")
        elif word == "/system":
            self.reset(rest or None)
            self.note("a new conversation")
        elif word == "/keep":
            self._use(choose_policy(self._chosen, _share(rest), self.lossless))
        elif word == "/policy":
            keep = None if rest == "full" and not self.lossless else self.keep
            self._use(choose_policy(rest, keep, self.lossless))
        elif word == "/lora":
            self.use_adapter(rest or None)
            self.note(f"adapter {rest}" if rest else "the model alone")
        else:
            raise ValueError(f"unknown command {word!r}; /help lists them")

    def use_adapter(self, name: str | None) -> None:
        """Answer with this adapter from now on; ``ValueError`` if there is none of this name."""
        self.llm.engine.adapter(name)
        self.lora = name

    @property
    def _chosen(self) -> Policy:
        """The policy that chooses the kept entries, or those that drafts read."""
        return self.policy.chooser

    def _use(self, policy: Policy) -> None:
        engine = self.llm.engine
        engine.check_policy(policy)
        self.policy = policy
        keep = getattr(self._chosen, "keep", None)
        self.keep = self.keep if keep is None else keep
        budget = "" if keep is None else f", keep {keep:g}"
        self.note(f"policy {self._chosen.name}{budget}" + ", lossless" * self.lossless)

    def say(self, line: str) -> None:
        """One turn; Ctrl-C stops the answer and keeps its text so far."""
        engine = self.llm.engine
        turns = [*self.turns, Message(role="user", content=line)]
        tokens = self.prompts.chat(turns)
        request = engine.make(tokens, self.params, policy=self.policy, owner="chat", lora=self.lora)
        begun = time.monotonic()
        text = self._follow(request)
        self.turns = [*turns, Message(role="assistant", content=text.strip())]
        self._tell(request, time.monotonic() - begun)

    def _follow(self, request: Request) -> str:
        engine, text = self.llm.engine, request.detokenizer
        assert text is not None  # a chat template has a tokenizer
        written, shown, wrapped = 0, "", Wrapped(sys.stdout)
        try:
            for _ in engine.steps([request]):
                if not request.ended and not text.stopped:
                    text.update(request.output)
                shown = text.text if request.ended else text.stable
                wrapped.write(shown[written:])
                written = max(written, len(shown))
        except KeyboardInterrupt:
            engine.abort(request)  # also if it came between two steps
        finally:
            wrapped.end()
        if request.finish_reason == "abort":
            self.note("stopped")
            return shown
        if request.finish_reason == "error":
            raise ValueError(f"the answer failed: {request.error}")
        return text.text

    def _tell(self, request: Request, seconds: float) -> None:
        kv, metrics = request.kv, self.llm.engine.metrics(request)
        if kv is None or not kv.seen_len:
            return
        first = metrics.first_token_seconds or 0.0
        rate = (len(request.output) - 1) / max(1e-9, seconds - first)
        guessed = f"; {drafts_told(metrics.drafts)}" if metrics.drafts else ""
        self.note(
            f"{kv.seen_len} tokens, {request.reused} of them reused; kept {kv.kept_share:.0%}, "
            f"KV {human_bytes(kv.bytes)} of {human_bytes(kv.full_bytes)}{guessed}; first token "
            f"{first:.2f} s, {rate:.0f} tokens/s"
        )


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"/keep {text}: give a share above 0 and at most 1") from None
