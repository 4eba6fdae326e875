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
from pyramidinfer.engine.gauge import By, Gauge, Kind, Load, memory_bound
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
#: Number of steps after which the time of a plain step is measured again.
PROBE = 64
#: Weight of the newest draft in the moving averages of acceptance rates: of a request, and of all
#: requests.  A new request starts with the latter.
WEIGHT, OVERALL = 0.15, 0.02
#: Assumed acceptance rate before anything is measured, by drafter.
HOPE: dict[By, float] = {"view": 0.8, "lookup": 0.5}
#: Share of the cache that drafts are assumed to read before their cost is measured.
READ = 0.1
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
        self.shared, self.steps, self.gauge = shared, steps, Gauge(self._assumed)
        self.drafted = self.accepted = self.verifications = 0
        self._until_plain = PROBE
        self._load: Load | None = None
        self._rates = dict(HOPE)  # of all requests
        self._foreseen: dict[Request, tuple[int, int]] = {}  # looked-up tokens by position, not fed
        self._weights = shared.runner.weight_bytes

    # --- guessing -----------------------------------------------------------------------------

    def propose(self, requests: list[Request], alone: bool = True) -> dict[Request, Drafts]:
        """Draft tokens for the requests that are about to decode; requests without drafts are left
        out.  Only steps that decode ``alone``, without prompts, are measured: in others, no drafter
        is tried and none may lose more time."""
        self._load = None
        able = {each: self._room(each) for each in requests if each.policy.guesses}
        if not able or self.steps == 0:
            return {}
        entries = sum(int(each.table.entries.max(1).sum()) for each in requests)
        load = self._load = Load(len(requests), round(2 * math.log2(entries)))
        able = {each: room for each, room in able.items() if room > 0}
        if not able or self._stays_plain(load):
            return {}
        for each in able:
            each.drafting = each.drafting or Drafting()
        if alone:
            self.gauge.begin()
        self._compare(able)
        count, is_trial = self._steps(list(able), load)
        if is_trial and not alone:
            count = 0
        looks = self.steps is not None or self.gauge.covers("lookup")
        drafts, wanted = {}, {}
        for each, room in able.items():
            most: dict[By, int] = {
                "view": min(room, count, count if is_trial else self._worth(each, "view", load)),
                "lookup": min(room, self._worth(each, "lookup", load)) if looks else 0,
            }
            better = self._gain(each, "lookup", most, load) >= self._gain(each, "view", most, load)
            tokens = self._look_up(each, max(1, most["lookup"]))
            if tokens and most["lookup"] and better:
                drafts[each] = Drafts(tokens, "lookup")
                continue
            if tokens:
                self._foreseen[each] = len(each.output), tokens[0]
            wanted[each] = most["view"]
        guessed = self._guess({each: count for each, count in wanted.items() if count}, is_trial)
        drafts |= {each: Drafts(tokens, "view") for each, tokens in guessed.items() if tokens}
        return drafts

    def _compare(self, able: dict[Request, int]) -> None:
        """Update acceptance rates with looked-up tokens that were not verified, at no cost."""
        foreseen, self._foreseen = self._foreseen, {}
        for each, (at, token) in foreseen.items():
            if each in able and at < len(each.output):
                self._note(each, "lookup", each.output[at] == token)

    def _stays_plain(self, load: Load) -> bool:
        """Whether this step drafts nothing, so that the time of a plain step is measured."""
        if self.steps is not None:
            return False
        self._until_plain -= 1
        if self._until_plain < 0 or not self.gauge.is_known(load):
            self._until_plain = PROBE
            return True
        return False

    def _assumed(self, load: Load) -> dict[Kind, float]:
        """The expected costs of drafts, used until they are measured."""
        runner, sizes = self.shared.runner, self.shared.pool.layout.layer_page_bytes
        shape, page = runner.shapes[0], self.shared.pool.page_size
        entry = float(sizes.mean()) / page * shape.kv_heads
        cache = 2 ** (load.size / 2) * entry / self._weights
        group = shape.heads // shape.kv_heads
        return memory_bound(cache, READ, group, runner.device.type == "cuda")

    def _rate(self, request: Request, by: By) -> float:
        """The probability that a draft is accepted, given that those before it in the step were."""
        assert request.drafting is not None
        return request.drafting.rates.get(by, self._rates[by])

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

    def _guess(self, rooms: dict[Request, int], is_trial: bool = False) -> dict[Request, TokenIds]:
        """Draft up to the given number of tokens for each request with the model, over its draft
        view.  A trial renews the view less often."""
        shared, pool = self.shared, self.shared.pool
        for each in rooms:
            view, table = each.draft_view, each.table
            if table.away is not None:  # drafts read the pages that are in the pool
                continue
            if view is None or table.seen_len - view.seen_len >= (4 if is_trial else 1) * RENEW:
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
        least, rate = self.gauge.verifying(load), self._rate(request, by)
        count, chance = 0, rate
        while count < MOST_DRAFTS and chance > 1.1 * least:
            count, chance = count + 1, chance * rate
        return count

    def _steps(self, requests: list[Request], load: Load) -> tuple[int, bool]:
        """The number of tokens that the model drafts in this step, chosen for the most tokens per
        second; and whether the draft only measures its cost again."""
        if self.steps is not None:
            return self.steps, False
        cost, rates = self.gauge.cost("view", load), [self._rate(each, "view") for each in requests]

        def tokens(count: int) -> float:
            return sum(_expected(rate, count) for rate in rates) / len(rates)

        best = max(range(MOST_DRAFTS + 1), key=lambda count: tokens(count) / (1 + count * cost))
        if tokens(best) > 1.03 * (1 + best * cost):
            return (best if self.gauge.covers("view") else 0), False
        loss = max(0.0, 1 + cost - tokens(1))
        return int(self.gauge.covers("view", loss)), True

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
        for number in range(min(len(drafts.tokens), accepted + 1)):
            self._note(request, drafts.by, number < accepted)
        for each in (drafting, self):
            each.drafted += len(drafts.tokens)
            each.accepted += accepted
            each.verifications += 1

    def _note(self, request: Request, by: By, is_right: bool) -> None:
        """Count a draft token in the acceptance rates."""
        assert request.drafting is not None
        rates, rate = request.drafting.rates, self._rate(request, by)
        rates[by] = rate + WEIGHT * (is_right - rate)
        self._rates[by] += OVERALL * (is_right - self._rates[by])


def _expected(rate: float, count: int) -> float:
    """Expected tokens of a step that verifies ``count`` drafted tokens."""
    return sum(rate**number for number in range(count + 1))
