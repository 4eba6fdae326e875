"""Published methods and the project's own written out by hand, to judge the engine's.

Written from the papers and from what each policy's docstring says of its deviations; no code of the
package is used.  ``judge_model.py`` runs the model.

Where papers are silent: shares of a text are rounded, H2O's odd entry goes to the recent half, and
of equal scores the earlier token stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.policies.judge_model import Kept, Reader, Seen


class Judge(Reader):
    """The methods: each returns the entries that stay in a layer, or (``METHOD_going``) the tokens
    that go deeper."""

    def streaming_llm(self, seen: Seen, sinks: int = 4, window: int = 1020) -> Kept | None:
        """Sinks and the newest entries (https://arxiv.org/abs/2309.17453)."""
        held, budget = seen.held, self._budget(sinks + window)
        if len(held[0]) <= budget:
            return None
        always = [{each for each in positions if each < sinks} for positions in held]
        newest = [{each: float(each) for each in positions} for positions in held]
        return self._best(held, newest, budget, always)

    def h2o(self, seen: Seen, heavy_ratio: float = 0.1, recent_ratio: float = 0.1) -> Kept | None:
        """Recent tokens and those with the largest sums of attention
        (https://arxiv.org/abs/2306.14048)."""
        sums = []
        for head, positions in enumerate(seen.held):
            total: dict[int, float] = self.memory.setdefault((seen.layer, head), {})
            given = seen.weights[head].sum((0, 1)).tolist()
            for position, amount in zip(positions, given, strict=True):
                total[position] = total.get(position, 0.0) + amount
            sums.append(total)
        recent, heavy = int(self.text * recent_ratio), int(self.text * heavy_ratio)
        budget = self._budget(recent + heavy)
        if self.keep is not None:
            recent = budget - budget // 2
        if len(seen.held[0]) <= budget:
            return None
        always = [set(positions[len(positions) - recent :]) for positions in seen.held]
        return self._best(seen.held, sums, budget, always)

    def scissorhands(
        self,
        seen: Seen,
        budget_ratio: float = 0.2,
        window: int = 400,
        recent: int = 10,
        drop: float = 0.5,
        rise: float = 0.2,
    ) -> Kept | None:
        """Entries that got less than 1/t of a step's attention in the fewest of the last steps
        (https://arxiv.org/abs/2305.17118)."""
        lows = []
        for head, positions in enumerate(seen.held):
            history: list[tuple[int, dict[int, float]]] = self.memory.setdefault(
                (seen.layer, head), []
            )
            shares = seen.weights[head].mean(0).tolist()
            for row, amounts in zip(seen.rows, shares, strict=True):
                given = zip(positions, amounts, strict=True)
                history.append((row + 1, {p: share for p, share in given if p <= row}))
            del history[:-window]
            lows.append(
                {
                    each: -float(sum(1 for t, row in history if each in row and row[each] < 1 / t))
                    for each in positions
                }
            )
        mean = budget_ratio * self.text if self.keep is None else self.keep * self.text
        ends = (round(mean) * (1 - rise), round(mean) * (1 + rise))
        budget, entries = self._rising(seen.layer, *ends, most=self.text), len(seen.held[0])
        if entries <= budget:
            return None
        count = entries - max(1, int(drop * budget)) if seen.is_decode else budget
        always = [set(positions[-recent:]) for positions in seen.held]
        return self._best(seen.held, lows, count, always)

    def snapkv(self, seen: Seen, capacity: int = 1024, **options: Any) -> Kept | None:
        """What the prompt's last queries look at (https://arxiv.org/abs/2404.14469)."""
        return self._window_best(seen, self._budget(capacity), **{"window": 32, **options})

    def pyramidkv(
        self, seen: Seen, capacity: int = 2048, window: int = 8, beta: float = 20, **options: Any
    ) -> Kept | None:
        """SnapKV's scores; budgets fall evenly to 1/beta of the mean
        (https://arxiv.org/abs/2406.02069)."""
        mean = self._budget(capacity) - window
        ends = (2 * mean - mean / beta, mean / beta)
        budget = window + self._rising(seen.layer, *ends, most=self.text - window)
        return self._window_best(seen, budget, window=window, **options)

    def tova(self, seen: Seen, capacity: int = 512) -> Kept | None:
        """What the last query looks at, mean over heads (https://arxiv.org/abs/2401.06104)."""
        positions, budget = seen.held[0], self._budget(capacity)
        if len(positions) <= budget:
            return None
        last = torch.stack([weights[:, -1] for weights in seen.weights]).mean((0, 1)).tolist()
        scores = dict(zip(positions, last, strict=True))
        return self._best(seen.held, [scores] * self.kv_heads, budget, [set()] * self.kv_heads)

    def chunkkv(
        self, seen: Seen, retain_ratio: float = 0.1, chunk_length: int = 10, window: int = 32
    ) -> Kept | None:
        """The chunks that the last queries of all heads look at most
        (https://arxiv.org/abs/2502.00299)."""
        positions = seen.held[0]
        budget = max(self._budget(round(retain_ratio * self.text)), window + chunk_length)
        if seen.is_decode or len(positions) <= budget:
            return None
        given = torch.stack([weights[:, -window:] for weights in seen.weights]).mean((0, 1)).sum(0)
        amounts = dict(zip(positions, given.tolist(), strict=True))
        recent = {each for each in positions if each >= self.seen - window}
        members: dict[int, list[float]] = {}
        for position in positions:
            if position not in recent:
                members.setdefault(position // chunk_length, []).append(amounts[position])
        means = {number: sum(given) / len(given) for number, given in members.items()}
        scores = {each: means.get(each // chunk_length, 0.0) for each in positions}
        count = window + (budget - window) // chunk_length * chunk_length
        return self._best(seen.held, [scores] * self.kv_heads, count, [recent] * self.kv_heads)

    def keydiff(self, seen: Seen, capacity: int = 2048) -> Kept | None:
        """The keys least like the mean of all (https://arxiv.org/abs/2504.15364)."""
        budget = self._budget(capacity)
        if len(seen.held[0]) <= budget:
            return None
        scores = []
        for head, positions in enumerate(seen.held):
            entries = self.cache[seen.layer][head]
            keys = self._turn(torch.stack([entries[each].key for each in positions]), positions)
            ones = [key / key.norm() if key.any() else key for key in keys]  # of length 1, or 0
            mean = torch.stack(ones).mean(0)
            alike = [float(one @ mean / mean.norm()) for one in ones]
            scores.append({each: -one for each, one in zip(positions, alike, strict=True)})
        return self._best(seen.held, scores, budget, [set()] * self.kv_heads)

    def expected_attention(
        self,
        seen: Seen,
        retain_ratio: float = 0.5,
        ahead: int = 512,
        sinks: int = 4,
        epsilon: float = 0.02,
        adaptive: bool = True,
        safeguard: float = 0.2,
    ) -> Kept | None:
        """The attention that normally distributed queries to come would give, times the value's
        length (https://arxiv.org/abs/2510.00636)."""
        budget = max(self._budget(round(retain_ratio * self.text)), sinks + 1)
        held = [len(head) for head in seen.held]
        if seen.is_decode or (
            sum(held) <= budget * self.kv_heads if adaptive else max(held) <= budget
        ):
            return None
        dim = self.queries.shape[-1]
        places = list(range(self.seen, self.seen + ahead))
        turns = [  # of the unit vectors, to every place
            self._turn(unit.expand(ahead, dim), places).mean(0)
            for unit in torch.eye(dim, dtype=torch.float64)
        ]
        turn = torch.stack(turns, dim=1)
        counted = self.queries[[at for at, row in enumerate(seen.rows) if row >= sinks]]
        scores, always = [], []
        for kv_head, positions in enumerate(seen.held):
            entries = self.cache[seen.layer][kv_head]
            late = [each for each in positions if each >= sinks]
            keys = self._turn(torch.stack([entries[each].key for each in late]), late)
            expected = torch.zeros(len(late), dtype=torch.float64)
            for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                mean = counted[:, head].mean(0)
                spread = counted[:, head] - mean
                covariance = turn @ (spread.T @ spread / len(counted)) @ turn.T
                logits = [
                    key @ turn @ mean / dim**0.5 + key @ covariance @ key / (2 * dim)
                    for key in keys
                ]
                expected += torch.softmax(torch.stack(logits), 0) / self.group
            found = {
                each: float((weight + epsilon) * entries[each].value.norm())
                for each, weight in zip(late, expected, strict=True)
            }
            scores.append({each: found.get(each, 0.0) for each in positions})
            always.append({each for each in positions if each < sinks})
        if not adaptive:
            return self._best(seen.held, scores, budget, always)
        return self._adaptive(seen.held, scores, budget, always, safeguard)

    def rkv(
        self,
        seen: Seen,
        capacity: int = 1024,
        buffer: int = 128,
        window: int = 8,
        kernel: int = 7,
        mix: float = 0.1,
        threshold: float = 0.5,
    ) -> Kept | None:
        """What the last queries look at, less what is like other keys
        (https://arxiv.org/abs/2505.24133)."""
        budget = max(self._budget(capacity), window + 1)
        for head, positions in enumerate(seen.held):
            if not seen.is_decode:  # a text's own queries alone
                self.memory[seen.layer, head] = []
            for row in seen.weights[head].amax(0).tolist():
                self.memory[seen.layer, head].append(dict(zip(positions, row, strict=True)))
            del self.memory[seen.layer, head][:-window]
        if not self._is_due(seen, budget, buffer):
            return None
        scores, recent = [], []
        for head, positions in enumerate(seen.held):
            history: list[dict[int, float]] = self.memory[seen.layer, head]
            newest = {each for each in positions if each >= self.seen - window}
            older = [each for each in positions if each not in newest]
            given = {p: sum(row.get(p, 0.0) for row in history) / len(history) for p in older}
            looked = self._smoothed(older, given, kernel, "max")
            entries = self.cache[seen.layer][head]
            keys = self._turn(torch.stack([entries[each].key for each in positions]), positions)
            keys = keys / keys.norm(dim=1, keepdim=True).clamp(min=1e-12)  # padding's is 0
            total = [0.0] * len(positions)
            for at, row in enumerate((keys @ keys.T).tolist()):
                row[at] = 0.0
                twins = [other for other, cosine in enumerate(row) if cosine > threshold]
                for other, cosine in enumerate(row):
                    total[other] += 0.0 if twins and other == twins[-1] else cosine
            means = torch.tensor(total, dtype=torch.float64) / len(positions)
            again = dict(zip(positions, means.softmax(0).tolist(), strict=True))
            scores.append({p: mix * looked[p] - (1 - mix) * again[p] for p in older})
            recent.append(newest)
        return self._best(seen.held, scores, budget, recent)

    def triattention(
        self,
        seen: Seen,
        profile: Any,
        capacity: int = 2048,
        buffer: int = 128,
        offset_max: int = 65536,
        pin_prompt: bool = True,
    ) -> Kept | None:
        """What queries at the model's centres will look at from places to come
        (https://arxiv.org/abs/2604.04921); what was read stays beside the budget, or competes."""
        budget, first = self._budget(capacity), 0
        if pin_prompt:
            if not seen.is_decode:
                self.pinned[seen.layer] = len(seen.held[0])
                return None
            budget, first = budget + self.pinned[seen.layer], self.text
        if not self._is_due(seen, budget, buffer):
            return None
        offsets, best = [1], []
        while offsets[-1] * 2 <= offset_max:
            offsets.append(offsets[-1] * 2)
        for kv_head, positions in enumerate(seen.held):
            entries = self.cache[seen.layer][kv_head]
            rivals = [each for each in positions if each >= first]
            keys = _pairs(torch.stack([entries[each].key for each in rivals]))  # not rotated
            places = torch.tensor(rivals)
            found: dict[int, float] = dict.fromkeys(rivals, float("-inf"))
            for head in range(kv_head * self.group, (kv_head + 1) * self.group):
                numbers = profile.queries.mean[seen.layer][head]
                centre = _pairs(torch.tensor(numbers, dtype=torch.float64))
                size = torch.tensor(profile.queries.sizes[seen.layer][head], dtype=torch.float64)
                score = ((size - centre.abs()) * keys.abs()).sum(1)
                for offset in offsets:
                    away = (self.seen - 1 + offset - places)[:, None] * self.frequencies
                    rotated = torch.cos(away + centre.angle() - keys.angle())
                    score += (centre.abs() * keys.abs() * rotated).sum(1) / len(offsets)
                score = (score - score.mean()) / score.std(correction=0)
                for position, value in zip(rivals, score.tolist(), strict=True):
                    found[position] = max(found[position], value)
            best.append(found)
        stay = [{each for each in positions if each < first} for positions in seen.held]
        return self._best(seen.held, best, budget, stay)

    def _is_due(self, seen: Seen, budget: int, buffer: int) -> bool:
        """Whether a method that cuts every ``buffer`` generated tokens does so now."""
        return len(seen.held[0]) >= budget + (buffer if seen.is_decode else 1)

    def kvzip(self, seen: Seen, **options: Any) -> None:
        """Nothing is dropped until the text was read again: see ``_zip``."""
        for head, positions in enumerate(seen.held):
            most = seen.weights[head].amax((0, 1)).tolist()
            for position, weight in zip(positions, most, strict=True):
                entry = seen.layer, head, position
                self.memory[entry] = max(self.memory.get(entry, 0.0), weight)

    def _zip(
        self,
        tokens: list[int],
        sinks: int = 4,
        min_text: int = 128,
        question: Iterable[int] = (),
        question_from: Iterable[int] = (),
        chunk_length: int = 2048,
    ) -> None:
        """The text again, chunk by chunk behind itself; then the entries of all heads and layers
        that were looked at most (https://arxiv.org/abs/2505.23416)."""
        if len(tokens) < min_text:
            return
        self.memory.clear()
        end = self.seen
        for begin in range(0, len(tokens), chunk_length):
            asked = [*question_from, *tokens[max(0, begin - 8) : begin]] if begin else [*question]
            self._forward([*asked, *tokens[begin : begin + chunk_length]], is_decode=False)
            self.truncate(end)
        mine = {entry: most for entry, most in self.memory.items() if self._is_new(entry[2])}
        stays = {each for each in mine if each[2] < sinks or each[2] in self.protect}
        ranked = sorted(mine.keys() - stays, key=lambda each: (-mine[each], each))
        stays |= set(ranked[: round((self.keep or 0.3) * len(mine)) - len(stays)])
        for layer, head, position in mine.keys() - stays:
            del self.cache[layer][head][position]

    def _is_new(self, position: int) -> bool:
        return self.text - self.new <= position < self.text

    def fastkv(
        self,
        seen: Seen,
        retain_ratio: float = 0.1,
        layer: int | None = None,
        propagate_ratio: float = 0.2,
        **options: Any,
    ) -> Kept | None:
        """SnapKV's retention in every layer (https://arxiv.org/abs/2502.01068)."""
        budget = self._budget(round(retain_ratio * self.text))
        return self._window_best(seen, budget, **{"window": 8, **options})

    def fastkv_going(
        self,
        seen: Seen,
        layer: int | None = None,
        propagate_ratio: float = 0.2,
        window: int = 8,
        kernel: int = 7,
        pooling: str = "mean",
        retain_ratio: float = 0.1,
    ) -> list[int]:
        """FastKV's one propagation: tokens that enter the layers after it."""
        rows = seen.rows
        if seen.is_decode or seen.layer != (self.depth // 2 - 1 if layer is None else layer):
            return rows
        count = int(len(rows) * max(propagate_ratio, self.keep or 0.0))
        recent = set(rows[-window:])
        scores = {}
        for position in rows:
            columns = [
                weights[:, -window:, held.index(position)]
                for weights, held in zip(seen.weights, seen.held, strict=True)
            ]
            total = float(torch.stack(columns).mean((0, 1)).sum())
            scores[position] = 0.0 if position in recent else total
        smoothed = self._smoothed(rows, scores, kernel, pooling)
        return sorted(self._best([rows], [smoothed], count, [recent])[0])

    def _window_best(
        self,
        seen: Seen,
        budget: int,
        window: int,
        kernel: int = 7,
        pooling: str = "mean",
        adaptive: bool = False,
        safeguard: float = 0.2,
    ) -> Kept | None:
        lengths = [len(head) for head in seen.held]
        if seen.is_decode or (
            sum(lengths) <= self.kv_heads * budget if adaptive else max(lengths) <= budget
        ):
            return None
        scores, recent = [], []
        for weights, positions in zip(seen.weights, seen.held, strict=True):
            sums = weights[:, -window:].mean(0).sum(0).tolist()
            newest = {each for each in positions if each >= self.seen - window}
            context = {
                position: 0.0 if position in newest else amount
                for position, amount in zip(positions, sums, strict=True)
            }
            scores.append(self._smoothed(positions, context, kernel, pooling))
            recent.append(newest)
        if not adaptive:
            return self._best(seen.held, scores, budget, recent)
        return self._adaptive(seen.held, scores, budget, recent, safeguard)

    def _adaptive(
        self,
        held: list[list[int]],
        scores: list[dict[int, float]],
        budget: int,
        always: list[set[int]],
        safeguard: float,
    ) -> Kept:
        """Ada-KV (https://arxiv.org/abs/2407.11550): one ranking for all heads of the layer."""
        even = budget - len(always[0])
        pairs = [
            (-score[position], head, position)
            for head, score in enumerate(scores)
            for position in score
            if position not in always[head]
        ]
        won = [head for _, head, _ in sorted(pairs)[: self.kv_heads * even]]
        kept: Kept = []
        for head in range(self.kv_heads):
            own = round((1 - safeguard) * won.count(head) + safeguard * even)
            one = slice(head, head + 1)
            kept += self._best(held[one], scores[one], len(always[head]) + own, always[one])
        return kept

    def _duo_limits(
        self, profile: Any, sinks: int, recent: int, spare: float, min_context: int, text: float
    ) -> dict[tuple[int, int], float | None]:
        """What every (layer, head) is held to: None keeps everything, in a text of this length."""
        assert self.keep is not None
        text, window = max(text, min_context), sinks + recent
        share = {(i, h): one for i, row in enumerate(profile.share) for h, one in enumerate(row)}
        layer_sums = [sum(row) for row in profile.share]
        deep = max(
            at
            for at in range(self.depth + 1)
            if sum(layer_sums[self.depth - at :]) <= spare * sum(layer_sums)
        )
        order = sorted(share, key=lambda at: (at[0] >= self.depth - deep, -share[at], at))
        entries = max(0.0, self.keep * text - window) * len(order)
        limits: dict[tuple[int, int], float | None] = {}
        for place in order:
            limits[place] = None if entries >= text - window else window + int(max(entries, 0))
            entries = entries - (text - window) if limits[place] is None else 0.0
        return limits

    def duo(
        self,
        seen: Seen,
        profile: Any,
        sinks: int = 4,
        recent: int = 64,
        spare: float = 0.0,
        min_context: int = 1024,
        stride: int = 16,
    ) -> Kept | None:
        """Some heads keep everything, others the first and the newest tokens
        (https://arxiv.org/abs/2410.10819)."""
        dealt = self._duo_limits(profile, sinks, recent, spare, min_context, self.text)
        limits = [dealt[seen.layer, head] for head in range(self.kv_heads)]
        slack = stride - 1 if seen.is_decode else 0
        kept = []
        for limit, positions in zip(limits, seen.held, strict=True):
            always = {each for each in positions if each < sinks} | (self.protect & set(positions))
            newest = sorted(set(positions) - always, reverse=True)
            if limit is not None and len(positions) > limit + slack:
                newest = newest[: max(0, int(limit) - len(always))]
            kept.append(always | set(newest))
        return kept

    def duo_going(
        self,
        seen: Seen,
        profile: Any,
        sinks: int = 4,
        recent: int = 64,
        spare: float = 0.0,
        min_context: int = 1024,
        **options: Any,
    ) -> list[int]:
        """Tokens that go deeper than the last layer that keeps old ones however long the text."""
        endless = self._duo_limits(profile, sinks, recent, spare, min_context, 2.0**30)
        wide = [layer for (layer, _), n in endless.items() if n is None or n > sinks + recent]
        if seen.is_decode or seen.layer < max(wide, default=0) or len(seen.rows) <= recent:
            return seen.rows
        return [
            each
            for each in seen.rows
            if each < sinks or each >= self.seen - recent or each in self.protect
        ]

    # --- the project's own ------------------------------------------------------------------------

    def pyramid_going(self, seen: Seen, **options: Any) -> list[int]:
        """Tokens that go deeper: past the last layer with much need, what one head can hold."""
        rule = Rule(**options)
        self.looked = self._look(seen, rule)
        rows, (start, going) = seen.rows, self._start(rule)
        if seen.is_decode or seen.layer == self.depth - 1 or seen.layer < start:
            return rows
        budgets = self._need_budgets(self.new, rule)
        count = max(
            float("inf") if budget is None else budget
            for (layer, _), budget in budgets.items()
            if layer > seen.layer
        )
        if going is not None:
            count = min(count, self._deepest(max(self.new, rule.min_context), rule))
        count = max(count, rule.least, rule.sinks + rule.window + 1)  # the window looks everywhere
        if count >= len(rows):
            return rows
        scores = {position: max(head[position] for head in self.looked) for position in rows}
        scores = self._smoothed(rows, scores, rule.kernel, "max")
        window = set(rows[-rule.window :])
        return sorted(
            self._best([rows], [scores], int(count), [self._stays(rows, rule) | window])[0]
        )

    def pyramid(self, seen: Seen, **options: Any) -> Kept | None:
        """A budget per head, held to while generating."""
        rule, kept = Rule(**options), []
        budgets = self._need_budgets(self.text, rule)
        for head, (positions, scores) in enumerate(zip(seen.held, self.looked, strict=True)):
            budget, one = budgets[seen.layer, head], slice(head, head + 1)
            if budget is None or len(positions) <= budget:
                kept.append(set(positions))
                continue
            count = budget
            if seen.is_decode:
                count += 1 - min(rule.stride, max(1, budget // 4))
            pooled = self._smoothed(positions, scores, rule.kernel, "max")
            always = [self._stays(positions, rule)]
            kept += self._best(seen.held[one], [pooled], count, always)
        return kept

    def _look(self, seen: Seen, rule: Rule) -> list[dict[int, float]]:
        """Per KV head: the most that any of the text's last ``window`` queries gave each entry.

        A weight counts as it was given, whatever has been dropped since.
        """
        looked = []
        for head, positions in enumerate(seen.held):
            if not seen.is_decode:  # a text's own queries alone
                self.memory[seen.layer, head] = []
            history: list[dict[int, float]] = self.memory[seen.layer, head]
            for row in seen.weights[head][:, -rule.window :].amax(0).tolist():
                history.append(dict(zip(positions, row, strict=True)))
            del history[: -rule.window]
            looked.append({p: max(row.get(p, 0.0) for row in history) for p in positions})
        return looked

    def _stays(self, positions: list[int], rule: Rule) -> set[int]:
        """Sinks and the newest tokens."""
        return {p for p in positions if p < rule.sinks or p >= self.seen - rule.recent}

    def _start(self, rule: Rule) -> tuple[int, float | None]:
        """The last layer that has, with all deeper ones, more than a tenth of all need, and the
        share of the text that goes deeper, unless they are given or calibrated."""
        start, going, found = rule.start_layer, rule.propagate_ratio, rule.profile.calibrated
        if start is None and found is not None:
            start, going = found.start_layer, found.propagate_ratio if going is None else going
        if start is None:
            sums = [sum(row) for row in rule.profile.share]
            start = max(i for i in range(self.depth) if sum(sums[i:]) > 0.1 * sum(sums))
        return start, going

    def _deepest(self, text: float, rule: Rule) -> float:
        """Tokens that may go deeper: as many as said, or as the mean needs with all before full."""
        start, going = self._start(rule)
        keep = 0.5 if self.keep is None else self.keep
        before, deep = (start + 1) * self.kv_heads, (self.depth - 1 - start) * self.kv_heads
        going = going or 0.0
        if deep and keep < 1:
            going = max(going, (keep * (before + deep) - before) / deep)
        return max(int(going * text + 1e-6), rule.least, rule.sinks + rule.window + 1)

    def _need_budgets(self, text: float, rule: Rule) -> dict[tuple[int, int], int | None]:
        """What every (layer, head) may hold of a text: None is everything, for ever.

        As the level rises, heads leave the floor and reach their caps one after another; between
        two such levels the sum is a straight line.
        """
        text, keep = max(text, rule.min_context), 0.5 if self.keep is None else self.keep
        share = {(i, h): n for i, row in enumerate(rule.profile.share) for h, n in enumerate(row)}
        if keep == 1:
            return dict.fromkeys(share)
        need = {place: n**rule.sharpness for place, n in share.items()}
        floor, caps = max(rule.least, rule.safeguard * keep * text), dict.fromkeys(share, text)
        start, going = self._start(rule)
        if going is not None:
            most = min(text, self._deepest(text, rule))
            caps.update({place: most for place in share if place[0] > start})
        wanted, lows = keep * text * len(share), {each: min(floor, caps[each]) for each in share}
        most = {each: caps[each] if need[each] else lows[each] for each in share}
        if sum(most.values()) < wanted:  # the rest is for those without need
            lows, need = most, {each: float(not need[each]) for each in share}

        def at(level: float) -> dict[tuple[int, int], float]:
            return {each: max(lows[each], min(caps[each], level * need[each])) for each in share}

        turns = [
            bound / need[each] for each in share for bound in (lows[each], caps[each]) if need[each]
        ]
        low = max([0.0, *(turn for turn in turns if sum(at(turn).values()) <= wanted)])
        high = min((turn for turn in turns if turn > low), default=low)
        below, above = sum(at(low).values()), sum(at(high).values())
        level = low
        if above > below and wanted > below:
            level += (high - low) * (wanted - below) / (above - below)
        whole = {each: int(n + 1e-6) for each, n in at(level).items()}  # not 31.999999
        return {each: None if n >= text else n for each, n in whole.items()}


def _pairs(vectors: Tensor) -> Tensor:
    """Numbers that rotate together as one complex number, ``[..., head_dim / 2]``."""
    real, imaginary = vectors.chunk(2, dim=-1)
    return torch.complex(real, imaginary)


class Rule(NamedTuple):
    """Pyramid's options."""

    profile: Any
    sinks: int = 4
    recent: int = 32
    min_context: int = 1024
    stride: int = 16
    safeguard: float = 0.2
    sharpness: float = 2.0
    start_layer: int | None = None
    propagate_ratio: float | None = None
    window: int = 16
    kernel: int = 31

    @property
    def least(self) -> int:
        always = self.sinks + self.recent
        return always + max(1, min(self.stride, always // 3))
