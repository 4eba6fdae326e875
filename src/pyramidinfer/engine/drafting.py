"""Drafts for requests that keep everything: guessed tokens that the next step verifies.

A step of such a request (policy ``lossless``) feeds its newest token and what was guessed to
follow, each as a row of its own over the whole cache, as if they were fed one after another.  So
every row's logits are those that decoding gives, and a token is chosen from them as always: the
answer is the full cache's, whatever was guessed.  A guess that equals the choice was right, and the
next row counts too.  Random numbers are the same for a guess and for the choice it foresees (Gumbel
coupling; drafter-invariant speculation, Daliri et al. 2408.07978), so sampled answers are the full
cache's for the same seed, too.

There are two drafters: the model itself over what its policy says is worth reading (``view``), and
the text so far, where it goes on from a run of tokens that is at its end now (``lookup``: prompt
lookup decoding).
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

#: Lengths of the runs that are looked up, the longest first.
RUNS = (4, 3)
#: Tokens after which what drafts read is chosen anew.
RENEW = 64
#: Steps after which what drafts cost and bring is measured again, and what a step takes without.
PROBE = 64
#: Guesses of a request while it is not known what they cost.
FIRST = 2
#: How much the newest draft counts in the rate of those accepted.
WEIGHT = 0.1
#: How likely a guess is taken to be right before anything is known, by who guesses.
HOPE: dict[By, float] = {"view": 0.8, "lookup": 1.0}
BY: tuple[By, ...] = ("view", "lookup")


class Drafts(NamedTuple):
    """What was guessed of a request, and by whom."""

    tokens: TokenIds
    by: By


class Drafter:
    """Says how many tokens are guessed in the next step, guesses them, and learns how that went.

    steps : guesses in every step, instead of as many as pay by what was measured (0: none).
    Which and how many guesses are made changes no answer, so timings may decide it.
    """

    def __init__(self, shared: Shared, steps: int | None = None) -> None:
        self.shared, self.steps, self.gauge = shared, steps, Gauge()
        self.drafted = self.accepted = self.verifications = 0
        self._until_plain = self._until_try = PROBE
        self._load: Load | None = None

    # --- guessing -----------------------------------------------------------------------------

    def propose(self, requests: list[Request]) -> dict[Request, Drafts]:
        """Guesses for those of the requests about to decode that may have any."""
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
        """Whether this step guesses nothing, so that it is measured what it takes then."""
        if self.steps is not None:
            return False
        self._until_plain -= 1
        if self._until_plain < 0 or not self.gauge.is_known(load):
            self._until_plain = PROBE
            return True
        return False

    @staticmethod
    def _rate(request: Request, by: By) -> float:
        """How likely a guess is right, given that those before it in the same step were."""
        assert request.drafting is not None
        return request.drafting.rates.get(by, HOPE[by])

    def _gain(self, request: Request, by: By, counts: dict[By, int], load: Load) -> float:
        """Tokens that so many guesses give on average, for each step's worth of time."""
        rate, count = self._rate(request, by), counts[by]
        return _expected(rate, count) / (1 + count * self.gauge.cost(by, load))

    def _room(self, request: Request) -> int:
        """Tokens that may be guessed: not beyond the answer's end, nor what is reserved for it, nor
        the point at which a sliding layer drops what it cannot see any longer (as it does without
        guesses)."""
        page, kept = self.shared.pool.page_size, request.table.kept
        room = min(MOST_DRAFTS, request.max_new - len(request.output) - 1)
        if self.shared.config.admission == "overcommit":  # no page but what one token may need
            room = min(room, page - 1 - int((kept % page).max()))
        for shape, governed, held in zip(
            self.shared.runner.shapes, request.layers.governed, kept.max(1).tolist(), strict=True
        ):
            if shape.window is not None and not governed:
                room = min(room, shape.window + page - 2 - held)
        return room

    def _guess(self, rooms: dict[Request, int]) -> dict[Request, TokenIds]:
        """Let the model guess so many tokens of each over what its drafts read."""
        shared, pool = self.shared, self.shared.pool
        for each in rooms:
            view, table = each.draft_view, each.table
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
        """Guess a token from logits ``[vocab]``; False where none can follow."""
        try:
            request.output.append(choose(logits, request, likeliest))
        except Exception:
            if request.constraint is None:
                raise
            request.constraint = None  # the real choice will tell what is wrong
            return False
        return True

    def _goes_on(self, request: Request) -> bool:
        """Whether anything can follow what is guessed."""
        is_done = request.constraint is not None and request.constraint.done
        return not is_done and request.output[-1] not in request.stop_ids

    def _look_up(self, request: Request, room: int) -> TokenIds:
        """What followed the last time that the text's newest tokens stood in it."""
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
        """Guesses of a request that are worth verifying where they cost nothing but that."""
        if self.steps is not None:
            return self.steps
        if (least := self.gauge.verifying(load)) is None:
            return FIRST
        rate = chance = self._rate(request, by)
        count = 0
        while count < MOST_DRAFTS and chance > 1.1 * least:
            count, chance = count + 1, chance * rate
        return count or int(len(request.output) % PROBE == 0)  # try again now and then

    def _steps(self, requests: list[Request], load: Load) -> int:
        """How many tokens the model guesses in this step: as many as give most tokens a second."""
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
        if self._until_try < 0:  # see again what it costs
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
        """A step of the requests last proposed for and nothing else, which verified ``drafts``,
        took so long, and ``guessing`` before it; it gave so many tokens."""
        if self._load is None:  # nobody could have had any
            return
        counts: dict[By, list[int]] = {
            by: [len(each.tokens) for each in drafts.values() if each.by == by] for by in BY
        }
        self.gauge.ran(self._load, counts, guessing, seconds, tokens)

    def learn(self, request: Request, drafts: Drafts, accepted: int) -> None:
        """So many of a request's guesses, the first ones, were right."""
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
    """Tokens that a step with so many guesses gives on average."""
    return sum(rate**number for number in range(count + 1))
