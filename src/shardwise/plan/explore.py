"""Prices rows of a space, the most promising first, until none that is left can be among the best.

An estimate orders the rows; the ratio of price to estimate that was seen in a mesh says how far the others of that mesh
can be trusted. The search ends when the best guess that is left, times the least ratio seen and a tolerance, is worse
than what was asked for; a space that is small enough is priced whole. Every row keeps what became of it.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable

import numpy as np

from shardwise.errors import ShardwiseError
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
        self.priced: dict[int, Ranked] = {}
        self.failed: dict[int, str] = {}
        self.dominated: dict[int, int] = {}  # row -> the recompute that fits
        self._least: dict[tuple[int, ...], int] = {}
        self.group = np.unique(
            np.stack([space.of_places(name) for name in ("devices", "tp", "cp", "ep", "pp", "samples")], axis=1),
            axis=0,
            return_inverse=True,
        )[1].reshape(-1)

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
            if ranked.room_bytes >= (1 - cap) * limit[row] / cap:
                best.add(value(ranked))
                if dominated:
                    self._fits(row)
        return True

    def refine(self, row: int) -> Ranked:
        """The price of a row whose schedule is simulated, from now on its only one."""
        known = self.priced[row]
        if not known.exact:
            known = self.priced[row] = self.pricer(known.layout, exact=True)
            if known.room_bytes < 0 and self._least.get(self._family(row)) == int(self.space.recompute[row]):
                del self._least[self._family(row)]  # what was put aside for it is looked at again
                self.dominated = {r: how for r, how in self.dominated.items() if self._family(r) != self._family(row)}
        return known

    def usd_rates(self) -> np.ndarray:
        """[row]: dollars a second of its devices."""
        devices, inverse = np.unique(self.space.of_places("devices"), return_inverse=True)
        return np.array([self.pricer.usd_rate(int(n)) or 0.0 for n in devices])[inverse.reshape(-1)]

    def bounded(self) -> np.ndarray:
        """[row]: whether it cannot fit, by the lower bound."""
        return np.asarray(self.coarse.at_least_bytes > self._limits())

    def rule_of(self, row: int) -> Rule:
        """What became of a row that may fit and is not among the best."""
        if row in self.failed:
            return Rule.FAILED
        if row in self.priced:
            return Rule.SLOWER if self.priced[row].room_bytes >= 0 else Rule.MEMORY
        if row in self.dominated:
            return Rule.DOMINATED
        return Rule.BEHIND

    def _limits(self) -> np.ndarray:
        devices = self.space.of_places("devices")
        return np.array([self.pricer.memory_of(int(n)) for n in np.unique(devices)], dtype=float)[
            np.unique(devices, return_inverse=True)[1].reshape(-1)
        ]

    def _samples(self, row: int) -> int:
        place: Place = self.space.places[int(self.space.place[row])]
        return place.samples

    def _family(self, row: int) -> tuple[int, ...]:
        space = self.space
        return tuple(int(column[row]) for column in (space.place, space.way, space.sequence, space.offload))

    def _is_dominated(self, row: int) -> bool:
        fits = self._least.get(self._family(row))
        if fits is None or fits >= self.space.recompute[row]:
            return False
        self.dominated[row] = fits
        return True

    def _fits(self, row: int) -> None:
        family = self._family(row)
        own = int(self.space.recompute[row])
        self._least[family] = min(self._least.get(family, own), own)


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
