"""Speculative decoding for requests with an exact cache: drafted tokens, verified by the next step.

A step of such a request (policy ``lossless``) feeds its newest token and its drafted tokens, each
as its own row over the whole cache, as if they were fed one after another.  Each row therefore
gives the same logits as plain decoding, and a token is chosen from them as usual, so the answer
equals the full cache's answer whatever was drafted.  If a drafted token equals the chosen one, it
is accepted and the next row counts too.  A draft uses the same random numbers as the choice that it
predicts (Gumbel coupling; drafter-invariant speculation, Daliri et al. 2408.07978), so sampled
answers also equal those of the full cache for the same seed.

There are two drafters: the model itself, attending only to the entries that the policy selects
(``view``), and prompt lookup (``lookup``), which copies what followed an earlier occurrence of the
text's newest tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pyramidinfer.config import MOST_DRAFTS
from pyramidinfer.engine.gauge import By, Gauge, Load
from pyramidinfer.engine.request import Drafting, Request
from pyramidinfer.engine.sampler import choose, guessing
from pyramidinfer.engine.shared import Shared
from pyramidinfer.models.draft_view import DraftView
from pyramidinfer.types import TokenIds

__all__ = ["Drafter", "Drafts"]

#: Lengths of the token runs that are looked up, the longest first.
RUNS = (4, 3)
#: Number of tokens after which the entries that drafts attend to are selected again.
RENEW = 64
#: Number of steps after which the cost and benefit of drafts, and the time of a plain step, are
#: measured again.
PROBE = 64
#: Drafted tokens per request while their cost is unknown.
FIRST = 2
#: Weight of the newest draft in the moving average of the acceptance rate.
WEIGHT = 0.1
#: Assumed acceptance rate before anything is measured, by drafter.
HOPE: dict[By, float] = {"view": 0.8, "lookup": 1.0}
BY: tuple[By, ...] = ("view", "lookup")


class Drafts(NamedTuple):
    """The drafted tokens of a request and their drafter."""

    tokens: TokenIds
    by: By


class Drafter:
    """Decides how many tokens to draft in the next step, drafts them, and learns from the result.

    steps : drafted tokens in every step (0: none); None: as many as pay off by measured times.  The
    kind and number of drafts change no answer, so timings may decide them.
    """

    def __init__(self, shared: Shared, steps: int | None = None) -> None:
        self.shared, self.steps, self.gauge = shared, steps, Gauge()
        self.drafted = self.accepted = self.verifications = 0
        self._until_plain = self._until_try = PROBE
        self._load: Load | None = None

    # --- guessing -----------------------------------------------------------------------------

    def propose(self, requests: list[Request]) -> dict[Request, Drafts]:
        """Draft tokens for the requests that are about to decode; requests without drafts are left
        out."""
        self._load = None
        able = {each: self._room(each) for each in requests if each.policy.guesses}
        if not able or self.steps == 0:
            return {}
        entries = sum(int(each.table.longest.sum()) for each in requests)
        load = self._load = Load(len(requests), round(2 * math.log2(entries)))
        able = {each: room for each, room in able.items() if room > 0}
        if not able or self._stays_plain(load):
            return {}
        for each in able:
            each.drafting = each.drafting or Drafting()
        rests = {by: self.steps is None and self.gauge.rests(by) for by in BY}
        count = 0 if rests["view"] else self._steps(list(able), load)
        drafts, wanted = {}, {}
        for each, room in able.items():
            most = {by: 0 if rests[by] else min(room, self._worth(each, by, load)) for by in BY}
            most["view"] = min(most["view"], count)
            if self._gain(each, "lookup", most, load) >= self._gain(each, "view", most, load):
                tokens = self._look_up(each, most["lookup"]) if most["lookup"] else []
                if tokens:
                    drafts[each] = Drafts(tokens, "lookup")
                    continue
            wanted[each] = most["view"]
        guessed = self._guess({each: count for each, count in wanted.items() if count})
        drafts |= {each: Drafts(tokens, "view") for each, tokens in guessed.items() if tokens}
        return drafts

    def _stays_plain(self, load: Load) -> bool:
        """Whether this step drafts nothing, so that the time of a plain step is measured."""
        if self.steps is not None:
            return False
        self._until_plain -= 1
        if self._until_plain < 0 or not self.gauge.is_known(load):
            self._until_plain = PROBE
            return True
        return False

    @staticmethod
    def _rate(request: Request, by: By) -> float:
        """The probability that a draft is accepted, given that those before it in the step were."""
        assert request.drafting is not None
        return request.drafting.rates.get(by, HOPE[by])

    def _gain(self, request: Request, by: By, counts: dict[By, int], load: Load) -> float:
        """Expected tokens with the request's count in ``counts``, per plain step's worth of
        time."""
        rate, count = self._rate(request, by), counts[by]
        return _expected(rate, count) / (1 + count * self.gauge.cost(by, load))

    def _room(self, request: Request) -> int:
        """The number of tokens that may be drafted.  It ends before the end of the answer, the
        memory reserved for the request, and the point where a sliding layer drops entries outside
        its window (as it does without drafts)."""
        page, kept = self.shared.pool.page_size, request.table.kept
        room = min(MOST_DRAFTS, request.max_new - len(request.output) - 1)
        if self.shared.config.admission == "overcommit":  # at most the page that one token may need
            room = min(room, page - 1 - int((kept % page).max()))
        for shape, governed, held in zip(
            self.shared.runner.shapes, request.layers.governed, kept.max(1).tolist(), strict=True
        ):
            if shape.window is not None and not governed:
                room = min(room, shape.window + page - 2 - held)
        return room

    def _guess(self, rooms: dict[Request, int]) -> dict[Request, TokenIds]:
        """Draft up to the given number of tokens for each request with the model, over its draft
        view."""
        shared, pool = self.shared, self.shared.pool
        for each in rooms:
            view, table = each.draft_view, each.table
            if table.away is not None:  # drafts read the pages that are in the pool
                continue
            if view is None or table.seen_len - view.seen_len >= RENEW:
                each.draft_view = view or DraftView(*table.kept.shape)
                each.draft_view.seen_len = table.seen_len
                shared.runner.evict_now(pool, each)
        guessed: dict[Request, TokenIds] = {each: [] for each in rooms}
        before = [(each.table, each.table.kept.copy(), each.table.seen_len) for each in rooms]
        going = list(rooms)
        try:
            with guessing(going):
                while going:
                    tokens = torch.tensor([each.output[-1] for each in going])
                    logits = shared.runner.draft(pool, list(going), tokens.to(shared.runner.device))
                    likeliest = logits.argmax(-1).tolist()
                    for each, row, best in zip(list(going), logits, likeliest, strict=True):
                        took = self._take(each, row, best)
                        if took:
                            guessed[each].append(each.output[-1])
                        is_full = len(guessed[each]) == rooms[each]
                        if not took or is_full or not self._goes_on(each):
                            going.remove(each)
        finally:
            for table, kept, seen_len in before:
                pool.forget(table, kept, seen_len)
        return guessed

    def _take(self, request: Request, logits: torch.Tensor, likeliest: int) -> bool:
        """Draft a token from logits ``[vocab]``; False if no token is allowed."""
        try:
            request.output.append(choose(logits, request, likeliest))
        except Exception:
            if request.constraint is None:
                raise
            request.constraint = None  # the real choice will report the error
            return False
        return True

    def _goes_on(self, request: Request) -> bool:
        """Whether more tokens can follow those drafted."""
        is_done = request.constraint is not None and request.constraint.done
        return not is_done and request.output[-1] not in request.stop_ids

    def _look_up(self, request: Request, room: int) -> TokenIds:
        """The tokens that followed the last earlier occurrence of the text's newest tokens."""
        drafting, text = request.drafting, request.text
        assert drafting is not None
        for end in range(max(1, drafting.indexed), len(text)):
            for run in RUNS:
                if end >= run:
                    drafting.places[tuple(text[end - run : end])] = end
        drafting.indexed = len(text)
        for run in RUNS:
            if (at := drafting.places.get(tuple(text[-run:]))) is not None:
                return text[at : at + room]
        return []

    # --- how many -----------------------------------------------------------------------------

    def _worth(self, request: Request, by: By, load: Load) -> int:
        """Drafted tokens of a request that are worth verifying if drafting itself is free."""
        if self.steps is not None:
            return self.steps
        if (least := self.gauge.verifying(load)) is None:
            return FIRST
        rate = chance = self._rate(request, by)
        count = 0
        while count < MOST_DRAFTS and chance > 1.1 * least:
            count, chance = count + 1, chance * rate
        return count or int(len(request.output) % PROBE == 0)  # retry now and then

    def _steps(self, requests: list[Request], load: Load) -> int:
        """How many tokens the model drafts in this step: the number that gives the most tokens per
        second."""
        if self.steps is not None:
            return self.steps
        if not self.gauge.is_measured(load):
            return FIRST
        cost, rates = self.gauge.cost("view", load), [self._rate(each, "view") for each in requests]

        def speed(count: int) -> float:
            return sum(_expected(rate, count) for rate in rates) / (1 + count * cost)

        best = max(range(MOST_DRAFTS + 1), key=speed)
        if speed(best) > 1.03 * speed(0):
            return best
        self._until_try -= 1
        if self._until_try < 0:  # measure the cost again
            self._until_try = PROBE
            return 1
        return 0

    # --- learning -----------------------------------------------------------------------------

    def ran(
        self,
        drafts: dict[Request, Drafts],
        guessing: float,
        seconds: float,
        tokens: int,
    ) -> None:
        """Record a step that decoded exactly the requests last passed to ``propose``: it verified
        ``drafts`` in ``seconds``, after ``guessing`` seconds of drafting, and produced ``tokens``
        tokens."""
        if self._load is None:  # no request could have drafts
            return
        counts: dict[By, list[int]] = {
            by: [len(each.tokens) for each in drafts.values() if each.by == by] for by in BY
        }
        self.gauge.ran(self._load, counts, guessing, seconds, tokens)

    def learn(self, request: Request, drafts: Drafts, accepted: int) -> None:
        """Record that the first ``accepted`` drafted tokens of a request were accepted."""
        drafting = request.drafting
        assert drafting is not None
        verified = min(len(drafts.tokens), accepted + 1)
        rate = self._rate(request, drafts.by)
        for number in range(verified):
            rate += WEIGHT * ((number < accepted) - rate)
        drafting.rates[drafts.by] = rate
        for each in (drafting, self):
            each.drafted += len(drafts.tokens)
            each.accepted += accepted
            each.verifications += 1


def _expected(rate: float, count: int) -> float:
    """Expected tokens of a step that verifies ``count`` drafted tokens."""
    return sum(rate**number for number in range(count + 1))
