"""A cluster whose coefficients say what a run measured: fitted by the run's own estimate, made again and again.

    RunEstimate ─ Predictor(cluster) ─► rows ─ log(predicted / measured) ─► least squares ─► Cluster
                     ▲                                                          │
                     └──── shares of rates, seconds of a launch, a hop ─────────┘     near those that were given

Physical numbers: shares stay at most 1, seconds at least 0. What no measurement depends on stays as it was. Knows
numbers; refuses to know where they were measured.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from shardwise.describe.cluster import Cluster, Hosts
from shardwise.errors import ConfigError
from shardwise.plan.compare_run import ACTIONS, MEMORY, STEP, TRANSFERS, WAITING, Row, compare
from shardwise.plan.compute import FloatArray
from shardwise.plan.run_estimate import Predicted, Predictor, RunEstimate
from shardwise.plan.run_measured import RunMeasured

__all__ = ["Calibrated", "Fitted", "calibrate"]

_CLOSE = 0.05  # of a measurement: an error so large counts as much as a coefficient that is e times the given one
_STRAYS = 0.2  # errors from here on count less and less (soft L1)
_WEIGHTS: Mapping[str, float] = {STEP: 1.0, ACTIONS: 1.0, MEMORY: 1.0, WAITING: 0.3, TRANSFERS: 0.3}
_OF_A_STEP = 3.0  # the seconds of the whole step count as so many
_SEEN = 1e-3  # of a prediction, by which it changes where half as much more of a coefficient is seen
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
    """The cluster, what was fitted of it, and the rows of a report for the given and for the fitted cluster."""

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


def calibrate(estimate: RunEstimate, measured: RunMeasured, cluster: Cluster | None = None) -> Calibrated:
    """Fit `cluster`, by default the one that the run was estimated for.

    Raises `ConfigError` where nothing was measured, devices are of several kinds, or the cluster has another number of
    devices than the run had ranks.
    """
    start = estimate.cluster if cluster is None else cluster
    layout = estimate.laid_out
    if not measured.steps:
        raise ConfigError("a cluster is fitted to measured steps, but the run has none behind its first two; train on")
    if not start.is_uniform:
        raise ConfigError("a run is fitted on devices of one kind, but the cluster has several; give it as one")
    if start.num_devices < layout.world_size:
        raise ConfigError(
            f"a run is fitted on a cluster that has room for it, but {start.num_devices} devices are too few for "
            f"{layout.world_size} ranks; give another"
        )
    predictor = Predictor(
        estimate.works, layout, estimate.job, estimate.num_micro_batches, start
    )

    def rows_of(one: Cluster) -> tuple[Row, ...]:
        return compare(predictor(one), measured, layout, estimate.traffic)

    before = rows_of(start)
    fields = _fields(start)
    seen = [field for field in fields if _is_seen(field, start, predictor)]
    values = _fit(seen, start, before, rows_of)
    made = start
    for field in seen:
        made = field.put(made, values[field])
    return Calibrated(
        cluster=dataclasses.replace(made, name=start.name),
        coefficients=tuple(_told(field, start, made, field in values) for field in fields),
        before=before,
        after=rows_of(made),
    )


def _fields(cluster: Cluster) -> list[_Field]:
    found = [
        _Field(owner="efficiency", name="matmul", least=0.005, most=1.0, begin=0.5),
        _Field(owner="efficiency", name="attention", least=0.005, most=1.0, begin=0.5),
        _Field(owner="efficiency", name="memory", least=0.005, most=1.0, begin=0.5),
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
    more = value * 1.5 if value * 1.5 <= field.most else value / 1.5
    one, other = (_numbers(predictor(field.put(cluster, each))) for each in (value, more))
    return bool(np.any(np.abs(one - other) > _SEEN * np.maximum(np.abs(one), np.abs(other))))


def _numbers(predicted: Predicted) -> FloatArray:
    sent = [seconds for edge in predicted.edges for seconds in (edge.forward_s, edge.backward_s)]
    each = [seconds for own in predicted.actions.values() for seconds in own]
    held = [lines.total for lines in predicted.memory]
    return np.array([predicted.step_s, *sent, *each, *held])


def _fit(fields: Sequence[_Field], start: Cluster, before: Sequence[Row], rows_of: Any) -> dict[_Field, float]:
    """Errors of all rows and strays of all coefficients, squared and added up, on a logarithmic scale."""
    chosen = [index for index, row in enumerate(before) if row.section in _WEIGHTS and _counts(row)]
    if not chosen or not fields:
        return {}
    weights = np.array([_weight(before[index]) for index in chosen])
    low, high = (np.log([getattr(field, side) for field in fields]) for side in ("least", "most"))
    given = np.log([field.of(start) or field.begin for field in fields])
    begin = np.clip(given, low + 1e-6, high - 1e-6)

    def errors(logarithms: FloatArray) -> FloatArray:
        made = start
        for field, value in zip(fields, np.exp(logarithms), strict=True):
            made = field.put(made, float(value))
        rows = rows_of(made)
        of_rows = [math.log(max(rows[index].predicted, 1e-12) / rows[index].measured) for index in chosen]
        far = _STRAYS / _CLOSE
        scaled = np.array(of_rows) / _STRAYS
        robust = np.sign(scaled) * np.sqrt(2 * (np.sqrt(1 + scaled**2) - 1)) * far  # soft L1, of rows alone
        return np.concatenate([weights * robust, logarithms - given])

    found = least_squares(errors, begin, bounds=(low, high), diff_step=1e-3, max_nfev=40)
    return dict(zip(fields, np.exp(found.x).tolist(), strict=True))


def _counts(row: Row) -> bool:
    return bool(row.predicted and row.measured)


def _weight(row: Row) -> float:
    return _WEIGHTS[row.section] * (_OF_A_STEP if row.section == STEP and row.what == "a step" else 1.0)


def _told(field: _Field, start: Cluster, made: Cluster, seen: bool) -> Fitted:
    after = field.of(made)
    at_bound = seen and (after <= field.least * 1.01 or after >= field.most * 0.99)
    return Fitted(name=field.label, before=field.of(start), after=after, seen=seen, at_bound=at_bound)
