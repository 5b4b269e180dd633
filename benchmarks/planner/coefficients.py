"""What is fitted of a machine: physical numbers of a cluster, each within its bounds, and where a fit begins.

An efficiency is above 0 and at most 1, a time at least 0. A coefficient is moved in the logarithm, so that bounds hold
by themselves but for the upper one of a share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.plan.compute import FloatArray

__all__ = ["COEFFICIENTS", "Coefficient", "apply", "read"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coefficient:
    """One number of a cluster. where: "efficiency", "inside", "between" or "overheads"; `most`: its upper bound;
    least: below which it is as good as nothing; `spread`: of the logarithm, how far it is from a pooled value."""

    where: str
    name: str
    least: float
    most: float
    spread: float
    start: float | None = None  # where the catalogue says nothing

    def __str__(self) -> str:
        return f"{self.where}.{self.name}"


COEFFICIENTS = (
    Coefficient(where="efficiency", name="matmul", least=0.05, most=1.0, spread=0.15),
    Coefficient(where="efficiency", name="memory", least=0.05, most=1.0, spread=0.25),
    Coefficient(where="overheads", name="kernel_s", least=1e-7, most=1e-3, spread=1.0, start=6e-5),
    Coefficient(where="inside", name="latency_s", least=1e-7, most=1e-3, spread=0.7),
    Coefficient(where="between", name="latency_s", least=1e-7, most=1e-2, spread=0.7),
)


def read(cluster: Cluster, coefficients: Sequence[Coefficient]) -> FloatArray:
    """Logarithms of the coefficients, as they are in the cluster, or where they start if it has 0."""
    found = []
    for each in coefficients:
        value = getattr(_part(cluster, each.where), each.name) or each.start or each.least
        found.append(np.log(min(max(value, each.least), each.most)))
    return np.array(found)


def apply(cluster: Cluster, coefficients: Sequence[Coefficient], logs: FloatArray) -> Cluster:
    """The cluster with these values."""
    values: dict[str, dict[str, Any]] = {}
    for each, log in zip(coefficients, logs, strict=True):
        value = float(min(max(np.exp(log), each.least), each.most))
        values.setdefault(each.where, {})[each.name] = value
    hosts = cluster.hosts[0]
    device = dataclasses.replace(
        hosts.device, efficiency=dataclasses.replace(hosts.device.efficiency, **values.get("efficiency", {}))
    )
    inside, between = cluster.links
    return dataclasses.replace(
        cluster,
        hosts=(dataclasses.replace(hosts, device=device),),
        links=(
            dataclasses.replace(inside, **values.get("inside", {})),
            dataclasses.replace(between, **values.get("between", {})),
        ),
        overheads=dataclasses.replace(cluster.overheads, **values.get("overheads", {})),
    )


def _part(cluster: Cluster, where: str) -> object:
    match where:
        case "efficiency":
            return cluster.hosts[0].device.efficiency
        case "inside":
            return cluster.links[0]
        case "between":
            return cluster.links[1]
        case _:
            return cluster.overheads
