"""Predicted beside measured on this machine: errors of memory and of steps, what was chosen, order. Pure numbers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from scipy.stats import spearmanr

__all__ = ["Chosen", "Figures", "Outcome", "chosen_of", "figures_of", "levelled"]

_POLISHED = 20  # turns of medians; a handful is enough


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One layout: seconds of a step and bytes of every rank, as predicted and as measured. runs_s: the median step of
    every run, empty where none was timed; spread: half of the middle half of a run's steps, as a share (its median)."""

    model: str
    ranks: int
    layout: str
    predicted_s: float
    predicted_bytes: tuple[float, ...]
    measured_bytes: tuple[int, ...]
    runs_s: tuple[float, ...] = ()
    spread: float = 0.0

    @property
    def measured_s(self) -> float:
        """Of the runs the median."""
        return statistics.median(self.runs_s)

    @property
    def noise(self) -> float:
        """By what share two measurements of this layout differ: of one or two runs by their steps or by each other; of
        more the standard error of their median, from half of their middle half (1.25 and 1.48: of normal numbers)."""
        if len(self.runs_s) > 2:
            low, _, high = statistics.quantiles(self.runs_s, n=4)
            return float(1.25 * 1.48 * (high - low) / 2 / len(self.runs_s) ** 0.5 / self.measured_s)
        between = (max(self.runs_s) - min(self.runs_s)) / 2 / self.measured_s
        return max(between, self.spread)

    @property
    def time_error(self) -> float:
        """By what share the prediction is above the measurement."""
        return self.predicted_s / self.measured_s - 1

    @property
    def memory_errors(self) -> tuple[float, ...]:
        """Of every rank."""
        return tuple(p / m - 1 for p, m in zip(self.predicted_bytes, self.measured_bytes, strict=True))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The layout predicted to be fastest; behind: the best measured, as a share; noise: of both, the larger."""

    layout: str
    best: str
    behind: float
    noise: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """Of one number of ranks. Errors as fractions; spearman: by model, of predicted and measured steps."""

    layouts: int
    memory_median: float
    memory_largest: float
    time_median: float
    time_largest: float
    noise_median: float
    chosen: dict[str, Chosen]
    spearman: dict[str, float]
    time_median_by_model: dict[str, float]
    memory_median_by_model: dict[str, float]


def levelled(visits: Mapping[Hashable, Sequence[tuple[int, float]]]) -> dict[Hashable, tuple[float, ...]]:
    """What every visit's seconds would have been at the machine's usual pace: without what its turn has in common.

    Layouts that are visited in one turn share its minute, and every layout is in turns of several companies: seconds
    are a layout's times a turn's, found by medians in turns (median polish: Tukey 1977, chapter 11)."""
    rows = [(which, turn, math.log(seconds)) for which, own in visits.items() for turn, seconds in own]
    pace: dict[int, float] = {}
    for _ in range(_POLISHED):
        usual = _medians((which, value - pace.get(turn, 0.0)) for which, turn, value in rows)
        pace = _medians((turn, value - usual[which]) for which, turn, value in rows)
        middle = _median(list(pace.values()))
        pace = {turn: value - middle for turn, value in pace.items()}
    return {which: tuple(s / math.exp(pace[turn]) for turn, s in own) for which, own in visits.items()}


def _medians(pairs: Iterable[tuple[Any, float]]) -> dict[Any, float]:
    found: dict[Any, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: statistics.median(values) for key, values in found.items()}


def chosen_of(outcomes: Sequence[Outcome]) -> Chosen:
    """Of one model on one number of ranks, all timed."""
    chosen = min(outcomes, key=lambda each: each.predicted_s)
    best = min(outcomes, key=lambda each: each.measured_s)
    return Chosen(
        layout=chosen.layout,
        best=best.layout,
        behind=chosen.measured_s / best.measured_s - 1,
        noise=max(chosen.noise, best.noise),
    )


def figures_of(outcomes: Sequence[Outcome], ranks: int) -> Figures:
    """Of the outcomes with so many ranks. What was not timed counts for memory alone."""
    own = [each for each in outcomes if each.ranks == ranks]
    timed = [each for each in own if each.runs_s]
    models = list(dict.fromkeys(each.model for each in own))
    of_model = {name: [each for each in timed if each.model == name] for name in models}
    memory = [abs(error) for each in own for error in each.memory_errors]
    times = [abs(each.time_error) for each in timed]
    return Figures(
        layouts=len(own),
        memory_median=_median(memory),
        memory_largest=max(memory, default=float("nan")),
        time_median=_median(times),
        time_largest=max(times, default=float("nan")),
        noise_median=_median([each.noise for each in timed]),
        chosen={name: chosen_of(each) for name, each in of_model.items() if each},
        spearman={name: _order(each) for name, each in of_model.items() if len(each) > 2},
        time_median_by_model={name: _median([abs(one.time_error) for one in each]) for name, each in of_model.items()},
        memory_median_by_model={
            name: _median([abs(error) for one in own if one.model == name for error in one.memory_errors])
            for name in models
        },
    )


def _order(outcomes: Sequence[Outcome]) -> float:
    found = spearmanr([each.predicted_s for each in outcomes], [each.measured_s for each in outcomes])
    return float(found.statistic)


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")
