"""Prices rows of a space, the most promising first, until none that is left can be among the best.

An estimate orders the rows; the ratio of price to estimate that was seen in a mesh says how far the others of that mesh
can be trusted. The search ends when the best guess that is left, times the least ratio seen and a tolerance, is worse
than what was asked for; a space that is small enough is priced whole. Every row keeps what became of it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Sequence

import numpy as np

from shardwise.errors import ShardwiseError
from shardwise.layout import Offload
from shardwise.plan.alike_rows import alike_rows
from shardwise.plan.coarse import Coarse
from shardwise.plan.pricer import Pricer
from shardwise.plan.ranked import Ranked, Rule
from shardwise.plan.space import Place, Space

__all__ = ["Explorer"]

_TOLERANCE = 0.98  # what an unpriced row of a mesh may be below the least ratio seen there
_UNSEEN = 0.95  # the same, of a mesh of which no row is priced
_WHOLE = 200  # rows of a space that is priced whole
_SURELY, _LATER = 1.4, 4.0  # rows that need so much of the memory by the estimate are priced when all others are


class Explorer:
    """Prices of rows, each made once. A resource: it keeps them while a search goes on."""

    def __init__(self, space: Space, pricer: Pricer, coarse: Coarse) -> None:
        self.space, self.pricer, self.coarse = space, pricer, coarse
        self.roomy = True  # only what leaves room is chosen
        self.priced: dict[int, Ranked] = {}
        self.failed: dict[int, str] = {}
        self.dominated: dict[int, int] = {}  # row -> one that does less and fits
        self._fitting: dict[tuple[int, ...], list[int]] = {}  # of rows that differ in what they do to save memory
        self._less = _less_of(space.axes.offload)
        names = ("devices", "tp", "cp", "ep", "pp", "samples")
        self.group = alike_rows([*(space.of_places(name) for name in names), space.context, space.way])[1]

    def rank(self, row: int) -> Ranked | None:
        """The price of a row; None where it cannot be priced."""
        if row not in self.priced and row not in self.failed:
            try:
                self.priced[row] = self.pricer(self.space.layout(row), self._samples(row), outline=True)
            except ShardwiseError as error:
                self.failed[row] = str(error)
        return self.priced.get(row)

    def explore(
        self,
        value: Callable[[Ranked], float],
        estimate: np.ndarray,
        *,
        top: int,
        most: int,
        cap: float = 1.0,
        dominated: bool = True,
    ) -> bool:
        """Prices rows until the `top` best by `value` that leave 1 - `cap` of their memory are known, or `most` were
        priced; whether the former. `estimate[row]`: of `value`. dominated: whether a row that computes more again than
        one that fits is left out."""
        limit = self._limits() * cap
        guess = np.where(self.coarse.about_bytes > _SURELY * limit, _LATER, 1.0) * estimate
        waiting = _Waiting(guess, self.group, self.coarse.at_least_bytes <= limit)
        count, best = 0, _Best(top)
        everything = len(self.space) <= min(most, _WHOLE)
        while (found := waiting.next()) is not None:
            row, bound = found
            if not everything and (bound > best.worst or count >= most):
                return bound > best.worst
            if dominated and self._is_dominated(row):
                continue
            count += row not in self.priced
            ranked = self.rank(row)
            if ranked is None:
                continue
            waiting.learn(row, value(ranked))
            if self.may_be_chosen(ranked) and ranked.room_bytes >= (1 - cap) * limit[row] / cap:
                best.add(value(ranked))
                if dominated:
                    self._fits(row)
        return True

    def refine(self, row: int) -> Ranked:
        """The price of a row whose schedule is simulated, from now on its only one."""
        known = self.priced[row]
        if not known.exact:
            known = self.priced[row] = self.pricer(known.layout, exact=True)
            if not self.may_be_chosen(known) and row in (fitting := self._fitting.get(self._family(row), [])):
                fitting.remove(row)  # what was put aside for it is looked at again
                self.dominated = {r: other for r, other in self.dominated.items() if other != row}
        return known

    def may_be_chosen(self, ranked: Ranked) -> bool:
        """Whether a layout has the memory that it needs, and the room that it has to leave."""
        return ranked.has_room or (ranked.fits and not self.roomy)

    def take_what_fits(self) -> None:
        """From now on a layout need not leave room: none does."""
        self.roomy = False
        self._fitting.clear()
        self.dominated.clear()

    @property
    def moves(self) -> bool:
        """Whether anything was tried that waits in the host's memory."""
        return len(self.space.axes.offload) > 1

    def expected_s(self) -> np.ndarray:
        """[row]: seconds of a step by the estimate, times what prices of rows like it were of theirs at least."""
        least = np.full(int(self.group.max()) + 1, np.inf)
        rows = np.array(list(self.priced), dtype=np.int64)
        seen = np.array([ranked.price.step_s for ranked in self.priced.values()]) / self.coarse.seconds[rows]
        np.minimum.at(least, self.group[rows], seen)
        least[np.isinf(least)] = min(1.0, float(seen.min(initial=1.0)))
        return np.asarray(self.coarse.seconds * least[self.group])

    def usd_rates(self) -> np.ndarray:
        """[row]: dollars a second of its devices."""
        devices = self.space.of_places("devices")
        first, kind = alike_rows([devices])
        return np.array([self.pricer.usd_rate(int(n)) or 0.0 for n in devices[first]])[kind]

    def bounded(self) -> np.ndarray:
        """[row]: whether it cannot fit, by the lower bound."""
        return np.asarray(self.coarse.at_least_bytes > self._limits())

    def rule_of(self, row: int) -> Rule:
        """What became of a row that may fit and is not among the best."""
        if row in self.failed:
            return Rule.FAILED
        if row in self.priced:
            ranked = self.priced[row]
            return Rule.MEMORY if not ranked.fits else Rule.SLOWER if self.may_be_chosen(ranked) else Rule.ROOM
        if row in self.dominated:
            return Rule.DOMINATED
        return Rule.BEHIND

    def _limits(self) -> np.ndarray:
        devices = self.space.of_places("devices")
        first, kind = alike_rows([devices])
        return np.array([self.pricer.memory_of(int(n)) for n in devices[first]], dtype=float)[kind]

    def _samples(self, row: int) -> int:
        place: Place = self.space.places[int(self.space.place[row])]
        return place.samples

    def _family(self, row: int) -> tuple[int, ...]:
        space = self.space
        return tuple(int(column[row]) for column in (space.place, space.way, space.sequence, space.context))

    def _is_dominated(self, row: int) -> bool:
        for other in self._fitting.get(self._family(row), ()):
            if other != row and self._does_less(other, row):
                self.dominated[row] = other
                return True
        return False

    def _does_less(self, one: int, other: int) -> bool:
        """Whether it computes no more again, and moves no more to the host."""
        space = self.space
        less = self._less[int(space.offload[one]), int(space.offload[other])]
        return bool(less) and int(space.recompute[one]) <= int(space.recompute[other])

    def _fits(self, row: int) -> None:
        self._fitting.setdefault(self._family(row), []).append(row)


def _less_of(words: Sequence[Offload]) -> np.ndarray:
    """[i, j]: whether offload i moves nothing that j does not."""
    moved = {
        Offload.NONE: frozenset[str](),
        Offload.ACTIVATIONS: frozenset({"activations"}),
        Offload.OPTIMIZER: frozenset({"optimizer"}),
        Offload.BOTH: frozenset({"activations", "optimizer"}),
    }
    return np.array([[moved[one] <= moved[other] for other in words] for one in words])


class _Waiting:
    """Rows that are not priced, by mesh, in the order of their guesses; and how far guesses of a mesh were off."""

    def __init__(self, guess: np.ndarray, group: np.ndarray, chosen: np.ndarray) -> None:
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort((guess[rows], group[rows]))]
        groups, starts = np.unique(group[rows], return_index=True)
        self.guess, self.rows, self.place = guess, rows, starts
        self.ends = np.append(starts[1:], len(rows)) if len(rows) else starts
        self.number = {int(g): index for index, g in enumerate(groups)}
        self.group = group
        self.ratio = np.full(len(groups), np.nan)  # the least price over guess that was seen in a mesh

    def next(self) -> tuple[int, float] | None:
        """The row whose price may be the least, and that price; None at the end."""
        if not len(self.rows) or not (left := self.place < self.ends).any():
            return None
        seen = ~np.isnan(self.ratio)
        least = min(1.0, float(self.ratio[seen].min())) if seen.any() else 1.0
        known = np.where(seen, self.ratio * _TOLERANCE, least * _UNSEEN)
        heads = self.rows[np.minimum(self.place, len(self.rows) - 1)]
        bounds = np.where(left, self.guess[heads] * known, np.inf)
        chosen = int(bounds.argmin())
        self.place[chosen] += 1
        return int(heads[chosen]), float(bounds[chosen])

    def learn(self, row: int, value: float) -> None:
        """What a row turned out to be."""
        index, ratio = self.number[int(self.group[row])], value / float(self.guess[row])
        self.ratio[index] = ratio if np.isnan(self.ratio[index]) else min(self.ratio[index], ratio)


@dataclasses.dataclass
class _Best:
    """The `top` least numbers so far."""

    top: int
    values: list[float] = dataclasses.field(default_factory=list)  # negated: a heap of the greatest

    def add(self, value: float) -> None:
        heapq.heappush(self.values, -value)
        if len(self.values) > self.top:
            heapq.heappop(self.values)

    @property
    def worst(self) -> float:
        return -self.values[0] if len(self.values) == self.top else np.inf
