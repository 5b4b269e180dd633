"""Coefficients of machines from measured rows: of every source's GPU, pooled by GPU, pooled by all.

    catalogue ──► all GPUs ──► all rows of a GPU ──► rows of one source on it
       prior        where no other source has the GPU     prior

Robust least squares on the logarithm of predicted over measured: soft L1 to come near, then a Cauchy loss, to which a
run that hung for minutes says nothing. Each coefficient is held near the level above by its spread. A source or a GPU
that no fit saw is priced by the level above.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.optimize import least_squares

from benchmarks.planner.batch import Batch, cluster_of
from benchmarks.planner.cases import Case
from benchmarks.planner.coefficients import COEFFICIENTS, apply, read
from benchmarks.planner.fabrics import fabric_of
from shardwise.describe.cluster import Cluster
from shardwise.plan.compute import FloatArray

__all__ = ["Fitted", "Prepared", "fit", "prepare"]

BEND = 0.05  # of the logarithm: an error as large weighs as much as a coefficient that is one spread off
ENOUGH = 5  # rows of a source that say something to others
Key = tuple[str, str]  # file, GPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """Cases of one source and GPU; measured: seconds of their steps."""

    key: Key
    cluster: Cluster
    batch: Batch
    measured: FloatArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fitted:
    """Logarithms of `COEFFICIENTS` by source and GPU, and by GPU; of_all: how far they
    are from what the catalogue says, or, where it says nothing, from where fits start."""

    of_sources: Mapping[Key, FloatArray]
    of_gpus: Mapping[str, FloatArray]
    of_all: FloatArray

    def cluster(self, key: Key, plain: Cluster) -> Cluster:
        """The nearest that is known: this source on this GPU, the GPU, what other GPUs are beside the catalogue."""
        logs = self.of_sources.get(key)
        if logs is None:
            logs = self.of_gpus.get(plain.hosts[0].device.name)
        if logs is None:
            logs = _shifted(plain, self.of_all)
        return apply(plain, COEFFICIENTS, logs)


def prepare(cases: Sequence[Case]) -> tuple[Prepared, ...]:
    """Cases by source and GPU, their tables made."""
    found: dict[tuple[str, str, int], list[Case]] = {}
    for case in cases:
        found.setdefault((case.row.file, case.row.gpu, case.row.gpus_per_node or 0), []).append(case)
    made = []
    for (file, gpu, of_host), own in found.items():
        cluster = cluster_of(gpu, of_host or None, fabric=fabric_of(file))
        made.append(
            Prepared(
                key=(file, gpu),
                cluster=cluster,
                batch=Batch.of(own, cluster),
                measured=np.array([case.row.step_time_s or np.nan for case in own]),
            )
        )
    return tuple(made)


def fit(prepared: Sequence[Prepared], chosen: Sequence[FloatArray]) -> Fitted:
    """The coefficients from the chosen rows: one boolean array a prepared source.

    Of a GPU, the median of its sources, of what the catalogue says, and of that beside which other GPUs are: a sick
    source moves it little, and one of a few rows not at all.
    """
    by_key: dict[Key, list[tuple[Prepared, FloatArray]]] = {}
    for one, rows in zip(prepared, chosen, strict=True):
        if rows.any():
            by_key.setdefault(one.key, []).append((one, rows))
    first = {key: _solve(parts, read(parts[0][0].cluster, COEFFICIENTS)) for key, parts in by_key.items()}
    telling = [key for key, parts in by_key.items() if sum(int(rows.sum()) for _, rows in parts) >= ENOUGH]
    plains = {_device(parts): parts[0][0].cluster for parts in by_key.values()}
    beyond = [first[key] - read(by_key[key][0][0].cluster, COEFFICIENTS) for key in telling]
    of_all = np.median([*beyond, np.zeros(len(COEFFICIENTS))], axis=0) if beyond else np.zeros(len(COEFFICIENTS))
    pools: dict[str, FloatArray] = {}
    for device, plain in plains.items():
        found = [first[key] for key in telling if _device(by_key[key]) == device]
        shifted = _shifted(plain, of_all)
        pools[device] = np.median([*found, read(plain, COEFFICIENTS), shifted], axis=0) if found else shifted
    of_sources = {key: _solve(parts, pools[_device(parts)], first[key]) for key, parts in by_key.items()}
    return Fitted(of_sources=of_sources, of_gpus=pools, of_all=of_all)


def _device(parts: list[tuple[Prepared, FloatArray]]) -> str:
    return parts[0][0].cluster.hosts[0].device.name


def _shifted(plain: Cluster, of_all: FloatArray) -> FloatArray:
    return read(plain, COEFFICIENTS) + of_all


def _solve(parts: list[tuple[Prepared, FloatArray]], prior: FloatArray, near: FloatArray | None = None) -> FloatArray:
    """The coefficients near the prior. near: where to look for them, from an earlier fit."""
    spreads = np.array([each.spread for each in COEFFICIENTS])
    least, most = (np.log([getattr(each, side) for each in COEFFICIENTS]) for side in ("least", "most"))
    logs = [np.log(one.measured[rows]) for one, rows in parts]

    def residuals(values: FloatArray, bent: Callable[[FloatArray], FloatArray]) -> FloatArray:
        errors = [
            np.log(one.batch.step_s(apply(one.cluster, COEFFICIENTS, values))[rows]) - measured
            for (one, rows), measured in zip(parts, logs, strict=True)
        ]
        return np.concatenate([bent(np.concatenate(errors) / BEND), (values - prior) / spreads])

    found = prior if near is None else near
    for bent in (_soft, _cauchy) if near is None else (_cauchy,):
        found = np.clip(found, least + 1e-6, most - 1e-6)
        solved = least_squares(residuals, found, bounds=(least, most), diff_step=1e-3, max_nfev=30, args=(bent,))
        found = np.asarray(solved.x)
    return found


def _soft(errors: FloatArray) -> FloatArray:
    """Whose square is quadratic below 1 and linear above; the priors stay quadratic."""
    return np.asarray(np.sign(errors) * np.sqrt(2 * (np.sqrt(1 + errors**2) - 1)))


def _cauchy(errors: FloatArray) -> FloatArray:
    """Whose square is quadratic below 1 and logarithmic above."""
    return np.asarray(np.sign(errors) * np.sqrt(np.log1p(errors**2)))
