"""A cluster whose coefficients say what runs measured: fitted by the runs' own estimates, made again and again.

    RunEstimate ─ Predictor(cluster) ─► rows ─ log(predicted / measured) ─► least squares ─► Cluster
                     ▲                                                          │
                     └──── shares of rates, seconds of a launch, a hop ─────────┘     near those that were given

Physical numbers: shares stay at most 1, seconds at least 0. What no measurement depends on stays as it was. Knows
numbers; refuses to know where they were measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from shardwise.describe.cluster import Cluster, Hosts
from shardwise.errors import ConfigError
from shardwise.plan.compare_run import ACTIONS, MEMORY, STEP, TRANSFERS, WAITING, Row, compare
from shardwise.plan.compute import FloatArray
from shardwise.plan.run_estimate import Predicted, Predictor, RunEstimate
from shardwise.plan.run_measured import RunMeasured

__all__ = ["Calibrated", "Fitted", "Run", "calibrate"]

_CLOSE = 0.1  # of a measurement: an error so large counts as much as a coefficient that is e times the given one
_STRAYS = 0.2  # errors from here on count less and less (soft L1)
_WEIGHTS: Mapping[str, float] = {STEP: 1.0, ACTIONS: 1.0, MEMORY: 1.0, WAITING: 0.3, TRANSFERS: 0.3}
_UNKNOWN = 0.1  # the pull of a coefficient that was given as 0, to where the search began
_OF_A_STEP = 3.0  # the seconds of the whole step count as so many
_SEEN = 1e-6  # of a prediction: it depends on a coefficient if it changes by more
_FAR = 100.0  # times as many seconds, for that: a launch may be hidden behind what it launches
_LEAST = 1e-6  # of a measurement: a prediction of 0 is so much
_DIGITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fitted:
    """A coefficient as it was given and as it was fitted. seen: whether the run depends on it; else it was left."""

    name: str
    before: float
    after: float
    seen: bool
    at_bound: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The cluster, what was fitted of it, and the rows of all runs for the given and for the fitted cluster."""

    cluster: Cluster
    coefficients: tuple[Fitted, ...]
    before: tuple[Row, ...]
    after: tuple[Row, ...]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Field:
    """A number of a cluster: whose it is, its range, and where a search begins if it is 0."""

    owner: str  # "efficiency", "overheads", "link"
    name: str
    least: float
    most: float
    begin: float
    level: int = 0

    @property
    def label(self) -> str:
        return f"{self.owner}.{self.name}" if self.owner != "link" else f"link {self.level}.{self.name}"

    def of(self, cluster: Cluster) -> float:
        return float(getattr(self._part(cluster), self.name))

    def put(self, cluster: Cluster, value: float) -> Cluster:
        """The cluster with another number; a whole one of bytes."""
        number = round(value) if self.name.endswith("_bytes") else value
        given: dict[str, Any] = {self.name: number}
        part = dataclasses.replace(self._part(cluster), **given)
        if self.owner == "overheads":
            return dataclasses.replace(cluster, overheads=part)
        if self.owner == "link":
            links = (*cluster.links[: self.level], part, *cluster.links[self.level + 1 :])
            return dataclasses.replace(cluster, links=links)
        hosts = tuple(
            Hosts(device=dataclasses.replace(each.device, efficiency=part), devices=each.devices, count=each.count)
            for each in cluster.hosts
        )
        return dataclasses.replace(cluster, hosts=hosts)

    def _part(self, cluster: Cluster) -> Any:
        if self.owner == "overheads":
            return cluster.overheads
        return cluster.links[self.level] if self.owner == "link" else cluster.hosts[0].device.efficiency


Run = tuple[RunEstimate, RunMeasured]


def calibrate(runs: Sequence[Run], cluster: Cluster | None = None) -> Calibrated:
    """Fit `cluster`, by default the one that the first run was estimated for, to all runs at once: what one of them
    does not tell apart, others may.

    Raises `ConfigError` where nothing was measured, devices are of several kinds, or the cluster has fewer of them than
    a run had ranks.
    """
    start = runs[0][0].cluster if cluster is None else cluster
    _check(runs, start)
    predictors = [Predictor.of(estimate, start) for estimate, _ in runs]

    def rows_of(one: Cluster) -> tuple[Row, ...]:
        return tuple(
            row
            for predictor, (estimate, measured) in zip(predictors, runs, strict=True)
            for row in compare(predictor(one), measured, estimate.laid_out, estimate.traffic)
        )

    before = rows_of(start)
    fields = _fields(start)
    seen = [field for field in fields if any(_is_seen(field, start, predictor) for predictor in predictors)]
    values = _fit(seen, start, before, rows_of)
    made = start
    for field, value in values.items():
        made = field.put(made, float(f"{value:.{_DIGITS}g}"))
    return Calibrated(
        cluster=made,
        coefficients=tuple(_told(field, start, made, field in values) for field in fields),
        before=before,
        after=rows_of(made),
    )


def _check(runs: Sequence[Run], start: Cluster) -> None:
    if not start.is_uniform:
        raise ConfigError("a run is fitted on devices of one kind, but the cluster has several; give it as one")
    for estimate, measured in runs:
        ranks = estimate.laid_out.world_size
        if not measured.steps:
            raise ConfigError(
                "a cluster is fitted to measured steps, but a run has none behind its first two; train on"
            )
        if start.num_devices < ranks:
            raise ConfigError(
                f"a run is fitted on a cluster that has room for it, but {start.num_devices} devices are too few for "
                f"{ranks} ranks; give another"
            )


def _fields(cluster: Cluster) -> list[_Field]:
    reached = cluster.hosts[0].device.efficiency
    found = [
        _Field(owner="efficiency", name="matmul", least=0.005, most=1.0, begin=0.5),
        _Field(owner="efficiency", name="attention", least=0.005, most=1.0, begin=0.5),
        _Field(owner="efficiency", name="memory", least=0.005, most=1.0, begin=0.5),
        _Field(owner="efficiency", name="update", least=0.005, most=1.0, begin=reached.memory),
        _Field(owner="efficiency", name="launch_s", least=1e-8, most=1e-2, begin=1e-6),
        _Field(owner="overheads", name="action_s", least=1e-8, most=1.0, begin=1e-5),
        _Field(owner="overheads", name="step_s", least=1e-8, most=100.0, begin=1e-4),
        _Field(owner="overheads", name="framework_bytes", least=1 << 20, most=1 << 40, begin=256 << 20),
    ]
    for level in range(len(cluster.links)):
        found += [
            _Field(owner="link", name="efficiency", least=0.005, most=1.0, begin=0.5, level=level),
            _Field(owner="link", name="latency_s", least=1e-8, most=1.0, begin=1e-6, level=level),
        ]
    return found


def _is_seen(field: _Field, cluster: Cluster, predictor: Predictor) -> bool:
    """Whether anything that is predicted depends on the field."""
    value = field.of(cluster) or field.begin
    factor = _FAR if field.name.endswith("_s") else 1.5
    more = value * factor if value * factor <= field.most else value / factor
    one, other = (_numbers(predictor(field.put(cluster, each))) for each in (value, more))
    return bool(np.any(np.abs(one - other) > _SEEN * np.maximum(np.abs(one), np.abs(other))))


def _numbers(predicted: Predicted) -> FloatArray:
    sent = [seconds for edge in predicted.edges for seconds in (edge.forward_s, edge.backward_s)]
    each = [seconds for own in predicted.actions.values() for seconds in own]
    held = [lines.total for lines in predicted.memory]
    return np.array([predicted.step_s, *sent, *each, *held])


def _fit(
    fields: Sequence[_Field], start: Cluster, before: Sequence[Row], rows_of: Callable[[Cluster], tuple[Row, ...]]
) -> dict[_Field, float]:
    """Errors of all rows and strays of all coefficients, squared and added up, on a logarithmic scale."""
    chosen = [index for index, row in enumerate(before) if row.section in _WEIGHTS and _counts(row)]
    measured = np.array([before[index].measured for index in chosen])
    if not chosen or not fields:
        return {}
    weights = np.array([_weight(before[index]) for index in chosen])
    low, high = (np.log([getattr(field, side) for field in fields]) for side in ("least", "most"))
    given = np.log([field.of(start) or field.begin for field in fields])
    pull = np.array([1.0 if field.of(start) else _UNKNOWN for field in fields])
    begin = np.clip(given, low + 1e-6, high - 1e-6)

    def errors(logarithms: FloatArray) -> FloatArray:
        made = start
        for field, value in zip(fields, np.exp(logarithms), strict=True):
            made = field.put(made, float(value))
        rows = rows_of(made)
        predicted = np.array([rows[index].predicted for index in chosen])
        scaled = np.log(np.maximum(predicted / measured, _LEAST)) / _STRAYS
        robust = np.sign(scaled) * np.sqrt(2 * (np.sqrt(1 + scaled**2) - 1))  # soft L1, of rows alone
        return np.concatenate([weights * robust * _STRAYS / _CLOSE, pull * (logarithms - given)])

    found = least_squares(errors, begin, bounds=(low, high), diff_step=1e-3, max_nfev=40)
    return {field: float(value) for field, value in zip(fields, np.exp(found.x), strict=True)}


def _counts(row: Row) -> bool:
    return row.predicted is not None and bool(row.measured)


def _weight(row: Row) -> float:
    return _WEIGHTS[row.section] * (_OF_A_STEP if row.is_step else 1.0)


def _told(field: _Field, start: Cluster, made: Cluster, seen: bool) -> Fitted:
    after = field.of(made)
    at_bound = seen and (after <= field.least * 1.01 or after >= field.most * 0.99)
    return Fitted(name=field.label, before=field.of(start), after=after, seen=seen, at_bound=at_bound)
