"""Coefficients of memory from measured rows, and what they predict.

Predicted, for every source and GPU, with four coefficients:

    framework + states + (activations + fragments) (kept + gathered inputs) + what one unit or the loss needs

framework: GiB that the runtime holds; activations: what the formulas of `activations` are off by; fragments: a
twentieth, where forwards take memory that backwards have freed; gathered: the share of gathered inputs that is kept as
such: a switch of the software (nanotron's tp_recompute_allgather) that a table does not name, so one share without a
pipeline and one with it, 0 where shards of a pipeline are on several hosts. A row fits where the fullest place of its
pipeline takes no more than `usable` of the device, gathered inputs not kept.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.planner.devices import device_of
from benchmarks.planner.memory_cases import LINES, Held
from benchmarks.planner.rows import Row

__all__ = [
    "COEFFICIENTS",
    "GIB",
    "MemoryFit",
    "capacity_of",
    "fit_memory",
    "fits",
    "groups_of",
    "measured_place",
    "predicted",
    "states_bytes",
    "states_verdict",
]

GIB = float(2**30)
Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCoefficient:
    """Where a fit starts, how far a source may be from the pool, and the bounds of what is physical."""

    name: str
    start: float
    spread: float
    least: float
    most: float


COEFFICIENTS = (
    MemoryCoefficient(name="framework", start=1.0, spread=2.0, least=0.0, most=16.0),  # GiB
    MemoryCoefficient(name="activations", start=1.0, spread=0.1, least=0.6, most=1.6),
    MemoryCoefficient(name="gathered", start=0.3, spread=0.5, least=0.0, most=1.0),
    MemoryCoefficient(name="gathered_staged", start=0.3, spread=0.5, least=0.0, most=1.0),
)
_FRAGMENTS = 0.05  # of activations, where forwards take memory that backwards have freed
_USABLE = 0.95
_REPORTED = 0.99  # of a device's nominal GiB, what its driver has
_ENOUGH = 5  # rows of a source that say something to others
_BLUR = 0.04  # of the logarithm: within it, a row's verdict is half and half
_SCALE = 0.05  # errors beyond which a row counts less


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Coefficients by name, and the share of a device that can be used."""

    values: Mapping[str, float]
    usable: float = _USABLE

    @classmethod
    def default(cls) -> MemoryFit:
        """Where every fit starts."""
        return cls(values={each.name: each.start for each in COEFFICIENTS})


def predicted(held: Held, fit: MemoryFit) -> Array:
    """Bytes of every place of the pipeline at its worst moment."""
    return np.asarray(_totals(held.bytes, held.again[:, None], _theta(fit), _build(held.row)).max(axis=1))


def measured_place(held: Held, fit: MemoryFit) -> float:
    """Bytes of the rank that the row speaks of: the first, or the fullest."""
    of_places = predicted(held, fit)
    return float(of_places[0] if "rank-0" in held.row.memory_kind else of_places.max())


def fits(held: Held, fit: MemoryFit) -> bool:
    """Whether the row runs: by its stack's rules, and in the device's memory with the switch set that saves most."""
    return not held.runs and _least(held, fit) <= fit.usable * capacity_of(held.row)


def fit_memory(rows: Sequence[Held]) -> Callable[[Row], MemoryFit]:
    """A fit for every source and GPU of the rows; one that they do not have gets the pooled one."""
    groups = groups_of(rows)
    alone = [_fit(group, MemoryFit.default()) for group in groups.values() if len(group) >= _ENOUGH]
    pooled = _median(alone) if alone else MemoryFit.default()
    own = {key: _fit(group, pooled) for key, group in groups.items()}
    return lambda row: own.get((row.file, row.gpu), pooled)


def states_verdict(row: Row) -> bool:
    """Whether the row says if it ran in memory: one that is out of it, or one whose source reports memory."""
    return "oom" in row.status.lower() or states_bytes(row)


def states_bytes(row: Row) -> bool:
    """Whether the row says what it took."""
    return row.status == "ok" and row.memory_gib is not None


def groups_of(rows: Iterable[Held]) -> dict[tuple[str, str], list[Held]]:
    """By file and GPU."""
    found: dict[tuple[str, str], list[Held]] = {}
    for each in rows:
        found.setdefault((each.row.file, each.row.gpu), []).append(each)
    return found


def _median(fits_of: Sequence[MemoryFit]) -> MemoryFit:
    """Of each coefficient: one source among several that has a bucket of its own does not move it."""
    values = {each.name: float(np.median([fit.values[each.name] for fit in fits_of])) for each in COEFFICIENTS}
    return MemoryFit(values=values, usable=float(np.median([fit.usable for fit in fits_of])))


def _fit(rows: Sequence[Held], around: MemoryFit) -> MemoryFit:
    """The values that explain the rows, drawn towards `around`: a robust fit of the error of logarithms."""
    measured = [each for each in rows if states_bytes(each.row)]
    if not measured:
        return around
    goal = np.log([each.row.memory_gib or 1.0 for each in measured])
    of_rows = _Stacked.of(measured)
    prior = _theta(around)
    spread = np.array([each.spread for each in COEFFICIENTS])

    def residuals(theta: Array) -> Array:
        own = np.log(of_rows.predicted(theta) / GIB) - goal
        return np.concatenate([own, _SCALE * (theta - prior) / spread])

    found = least_squares(
        residuals,
        prior,
        bounds=([each.least for each in COEFFICIENTS], [each.most for each in COEFFICIENTS]),
        loss="soft_l1",
        f_scale=_SCALE,
        x_scale=spread,
    ).x
    names = [each.name for each in COEFFICIENTS]
    fit = MemoryFit(values=dict(zip(names, map(float, found), strict=True)), usable=around.usable)
    return dataclasses.replace(fit, usable=_usable(rows, fit))


def _usable(rows: Sequence[Held], fit: MemoryFit) -> float:
    """The share of a device at which the fewest rows are decided wrong; one near it is half decided."""
    told = [
        (_least(each, fit) / capacity_of(each.row), each.row.status == "ok")
        for each in rows
        if states_verdict(each.row) and not each.runs
    ]
    if not told or all(ran for _, ran in told):
        return fit.usable
    shares, ran = np.array([share for share, _ in told]), np.array([ran for _, ran in told])
    tried = np.arange(0.70, 1.0001, 0.005)
    margins = np.log(tried[:, None] / shares[None, :]) / _BLUR * np.where(ran, 1.0, -1.0)
    return float(tried[np.argmin((1.0 / (1.0 + np.exp(np.clip(margins, -50, 50)))).sum(axis=1))])


def _least(held: Held, fit: MemoryFit) -> float:
    """Bytes of the fullest place where no gathered input is kept."""
    shards = dict.fromkeys(("gathered", "gathered_staged"), 0.0)
    return float(predicted(held, dataclasses.replace(fit, values={**fit.values, **shards})).max())


def capacity_of(row: Row) -> float:
    """Bytes of the row's device: the catalogue's, unless its name says that it has more or less."""
    named = re.search(r"(\d+)\s*GB", row.gpu)
    stated = float(named.group(1)) * GIB * _REPORTED if named else np.inf
    device = device_of(row.gpu)
    if device is None:
        return stated
    known = float(device.memory_bytes)
    return known if not named or abs(known / stated - 1.0) < 0.1 else stated


def _theta(fit: MemoryFit) -> Array:
    return np.array([fit.values[each.name] for each in COEFFICIENTS])


def _build(row: Row) -> int:
    """Which of the shares of gathered inputs is the row's."""
    return 0 if row.pp == 1 else 1 if row.tp <= (row.gpus_per_node or 8) else 2


def _totals(lines: Array, again: NDArray[np.bool_], theta: Array, build: int | NDArray[np.int64]) -> Array:
    """(..., lines) -> (...): bytes."""
    framework, activations = theta[:2]
    states, kept, more, working = (lines[..., LINES.index(name)] for name in LINES)
    share = np.append(theta[2:], 0.0)[build]
    factor = activations + _FRAGMENTS * again
    return np.asarray(framework * GIB + states + factor * (kept + share * more) + working)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stacked:
    """The lines of many rows under each other, and where each row begins."""

    lines: Array
    again: NDArray[np.bool_]
    build: NDArray[np.int64]
    begins: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[Held]) -> _Stacked:
        places = [1 if "rank-0" in each.row.memory_kind else len(each.bytes) for each in rows]
        flat = [each.bytes[:count].reshape(-1, len(LINES)) for each, count in zip(rows, places, strict=True)]
        moments = [each.bytes.shape[1] for each in rows]
        sizes = np.array([len(each) for each in flat])
        return cls(
            lines=np.concatenate(flat),
            again=np.concatenate(
                [np.repeat(row.again[:count], many) for row, count, many in zip(rows, places, moments, strict=True)]
            ),
            build=np.repeat([_build(each.row) for each in rows], sizes),
            begins=np.concatenate([[0], np.cumsum(sizes)[:-1]]),
        )

    def predicted(self, theta: Array) -> Array:
        """(rows,): bytes of each row's rank at its worst moment."""
        totals = _totals(self.lines, self.again, theta, self.build)
        return np.asarray(np.maximum.reduceat(totals, self.begins))
