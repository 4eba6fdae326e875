"""The requests that the soak's clients send."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyramidinfer.lab.bench.load import RESPONSES, Leave, Record
from pyramidinfer.lab.documents import document, filler_sentence

__all__ = ["Visitor", "Wish"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONGEST = 1500  # words of a prompt
MANUALS, SHARED = 3, 0.3  # shared system prompts; share of chats that use one
LASTING = ("compression", "tools", "model", "cache_salt")  # fields that all turns have
#: A function for tool calls; ``/v1/responses`` takes it without the object around it.
FUNCTION = {
    "name": "find_room",
    "description": "Finds the room of an archive",
    "parameters": {"type": "object", "properties": {"archive": {"type": "string"}}},
}


@dataclass(frozen=True)
class Wish:
    """One request: sent after ``pause`` seconds; ``patience``: seconds to wait after a refusal."""

    path: str
    body: dict[str, Any]
    leave: Leave
    choices: int
    pause: float
    patience: float


class Visitor:
    """One client.  The same seed and number give the same requests, as long as the answers are
    equal.

    model : the server's entry in /v1/models, which lists the policies that a request may choose.
    adapters : names of its adapters.
    """

    def __init__(
        self,
        model: dict[str, Any],
        seed: int = 0,
        number: int = 0,
        adapters: Sequence[str] = (),
    ) -> None:
        self.adapters = list(adapters)
        about = model.get("compression") or {}
        self.policies = list(about.get("policies") or ())
        self.keeps = (max(0.1, about.get("min_keep", 0.1)), about.get("max_keep", 1.0))
        self.longest = min(LONGEST, (model.get("max_model_len") or 4096) // 2)
        self.draw = random.Random(f"{seed} {number}")
        self.talk: list[dict[str, str]] = []
        #: Fields of every turn of the current conversation: compression, tools, adapter, salt.
        self.terms: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # fields that continue a stored response

    def wish(self) -> Wish:
        """The client's next request."""
        draw = self.draw
        kind = draw.choices((COMPLETIONS, CHAT, RESPONSES), (0.4, 0.35, 0.25))[0]
        body = self._response() if kind == RESPONSES else self._body()
        if kind == CHAT:
            going_on = bool(self.talk) and self.talk[-1]["role"] == "assistant"
            text = " ".join(filler_sentence(draw)) if going_on else self._text()
            before = self.talk
            if not going_on:
                tools = {"tools": [{"type": "function", "function": FUNCTION}]}
                self.terms, before = self._terms(tools), []
                if draw.random() < SHARED:
                    before = [{"role": "system", "content": self._manual()}]
            self.talk = [*before, {"role": "user", "content": text}]
            body["messages"] = self.talk
            body.pop("compression", None)  # the cache can only be reused with the same compression
            body |= self.terms
            if "logprobs" in body:
                body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
        elif kind == COMPLETIONS:
            body["prompt"] = self._text()
            body |= self._whose()
        return Wish(
            kind,
            body,
            self._leave(),
            body.get("n", 1),
            pause=draw.expovariate(4.0),
            patience=draw.uniform(1.0, 5.0),
        )

    def heard(self, wish: Wish, record: Record) -> None:
        """Process an answer; some conversations continue, so that caches are reused."""
        if wish.path == RESPONSES:
            kept = record.outcome == "completed" and wish.body["store"]
            goes_on = kept and self.draw.random() < 0.7
            terms = {name: it for name, it in wish.body.items() if name in LASTING}
            self.last = {"previous_response_id": record.id, **terms} if goes_on else {}
        if wish.path != CHAT:
            return
        if record.outcome == "refused":  # the next request uses other words
            self.talk = self.talk[:-1]
            return
        whole = record.outcome == "completed" and wish.choices == 1 and record.text
        if whole and len(self.talk) < 8 and self.draw.random() < 0.7:
            self.talk = [*self.talk, {"role": "assistant", "content": record.text}]
        else:
            self.talk = []

    def long_wish(self) -> Wish:
        """A long request whose client does not disconnect."""
        body = {"max_tokens": 512, "temperature": 0.0, "ignore_eos": True}
        return Wish(COMPLETIONS, {**body, "prompt": self._text()}, Leave(), 1, 0.0, 0.0)

    def _response(self) -> dict[str, Any]:
        """A response, often the next turn of a stored conversation."""
        draw = self.draw
        text = " ".join(filler_sentence(draw)) if self.last else self._text()
        body: dict[str, Any] = {"input": text, "max_output_tokens": draw.choice((1, 4, 16, 48, 96))}
        body |= {"temperature": draw.choice((0.0, 1.0)), "store": draw.random() < 0.8}
        if draw.random() < 0.3:
            body |= {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        return body | (self.last or self._terms({"tools": [{"type": "function", **FUNCTION}]}))

    def _terms(self, tools: dict[str, Any]) -> dict[str, Any]:
        """Fields that are the same for a whole conversation."""
        draw = self.draw
        found = {"compression": self._compression()} if self.policies else {}
        found = found if draw.random() < 0.7 else {}
        found |= self._whose()
        return found | tools if draw.random() < 0.3 else found

    def _whose(self) -> dict[str, Any]:
        """The adapter and the salt of a request, which separate its cache from others."""
        draw = self.draw
        found: dict[str, Any] = {}
        if self.adapters and draw.random() < 0.3:
            found["model"] = draw.choice(self.adapters)
        if draw.random() < 0.2:
            found["cache_salt"] = draw.choice(("a", "b"))
        return found

    def _manual(self) -> str:
        """A system prompt that clients share.  Its number selects the compression, because
        only requests with the same compression share entries."""
        number = self.draw.randrange(MANUALS)
        if self.policies:
            policy = self.policies[number % len(self.policies)]
            terms: dict[str, Any] = {"policy": policy, "prefix": 1}
            if policy != "full":
                low, high = self.keeps
                terms["keep"] = min(max(0.5, low), high)
            self.terms["compression"] = terms
        return document(random.Random(f"manual {number}"), 200, 2).text

    def _body(self) -> dict[str, Any]:
        draw = self.draw
        body: dict[str, Any] = {"max_tokens": draw.choice((1, 4, 16, 48, 96))}
        if draw.random() < 0.5:
            body |= {"temperature": draw.uniform(0.2, 1.5), "seed": draw.randrange(1000)}
        else:
            body["temperature"] = 0.0
        if draw.random() < 0.2:
            body["n"] = draw.choice((2, 3))
        if draw.random() < 0.3:
            body["stop"] = draw.sample([" .", " the", " room", " market"], draw.choice((1, 2)))
        if draw.random() < 0.2:
            body["logprobs"] = draw.choice((1, 3, 5))
        if draw.random() < 0.3:
            body["ignore_eos"] = True
        if draw.random() < 0.2:
            body["stream_options"] = {"include_usage": True, "include_kv": True}
        if self.policies and draw.random() < 0.7:
            body["compression"] = self._compression()
        return body

    def _compression(self) -> dict[str, Any]:
        draw = self.draw
        policy = draw.choice(self.policies)
        found: dict[str, Any] = {"policy": policy}
        if policy != "full":
            found["keep"] = round(draw.uniform(*self.keeps), 2)
        if draw.random() < 0.3:
            found["reuse"] = False
        return found

    def _text(self) -> str:
        draw = self.draw
        length = int(min(self.longest, 10 + draw.expovariate(1 / 300)))
        if length >= 100:
            return document(draw, length, 2).text
        return " ".join(word for _ in range(1 + length // 10) for word in filler_sentence(draw))

    def _leave(self) -> Leave:
        """Two of three clients stay; the others disconnect early, while waiting or during the
        answer."""
        draw = self.draw
        if draw.random() < 2 / 3:
            return Leave()
        if draw.random() < 0.5:
            return Leave(chunks=draw.randint(1, 20))
        return Leave(seconds=draw.expovariate(2.0))
