"""What replicas exchange and what waits in the host's memory, in seconds, about: for all rows of a search at once.

    of a micro-batch   parameters gathered, gradients scattered, activations copied: beside its forward, its backward
    of a step          sums of gradients behind the last backward, parameters gathered, an update by the host

Numbers that only order rows (`plan.coarse`); latencies are left out. Refuses to know kernels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from shardwise.describe.cluster import Cluster
from shardwise.layout import Offload, Unshard
from shardwise.plan.job import Job
from shardwise.plan.space import Space
from shardwise.plan.stage_seconds import visit_bytes

__all__ = ["Messages", "is_whole_for_a_step", "messages_of", "offloads_of", "visit_s"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

_BACKWARD = 0.6  # of a micro-batch's seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Messages:
    """By row, on one rank: seconds that a micro-batch takes longer, and that a step does."""

    micro_batch: FloatArray
    step: FloatArray


def messages_of(
    space: Space, *, trained: FloatArray, busy_s: FloatArray, saved_bytes: FloatArray, cluster: Cluster, job: Job
) -> Messages:
    """By row of one rank: trained elements before replicas divide anything, a micro-batch's seconds without messages,
    what it keeps."""
    dp, fsdp, zero = space.of_places("dp"), space.of_places("fsdp"), space.of_places("zero")
    inside = space.of_places("tp") * space.of_places("cp") * space.of_places("ep")
    scattered = _turn(trained * job.reduce_bytes, fsdp, inside, cluster)
    summed = 2 * _turn(trained * job.reduce_bytes / fsdp, dp, inside * fsdp, cluster)
    gathered = _turn(trained * job.per_parameter.parameter, fsdp, inside, cluster)
    streams = (fsdp > 1) & ~is_whole_for_a_step(space)
    each = np.where(streams & (zero == 3), gathered, 0.0)
    back = each + np.where(streams & (zero >= 2), scattered, 0.0)
    hides = cluster.overheads.overlap
    forward_s, backward_s = (1 - _BACKWARD) * busy_s, _BACKWARD * busy_s
    shown = _shown(each, forward_s, hides) + _shown(back, backward_s, hides)
    store = cluster.hosts[0].memory
    if store is not None:
        copied = np.where(offloads_of(space)[0], saved_bytes * store.copy_s(1.0), 0.0)
        shown += _shown(copied, forward_s, hides) + _shown(copied, backward_s, hides)
    reduced = summed + np.where(streams & (zero >= 2), 0.0, scattered)
    behind = _shown(reduced, backward_s, hides if job.overlap_replicas else 0.0)
    return Messages(micro_batch=shown, step=behind + np.where(streams & (zero == 3), 0.0, gathered))


def offloads_of(space: Space) -> tuple[BoolArray, BoolArray]:
    """By row: whether activations wait in the host's memory, and whether what the optimizer remembers does."""
    words = space.axes.offload
    away = np.array([word in (Offload.ACTIVATIONS, Offload.BOTH) for word in words])
    visits = np.array([word in (Offload.OPTIMIZER, Offload.BOTH) for word in words])
    return away[space.offload], visits[space.offload]


def is_whole_for_a_step(space: Space) -> BoolArray:
    """By row: whether what replicas divide is whole for a step, not for a unit's turn."""
    steps = [place.unshard is Unshard.STEP if place.unshard else place.mesh.pp > 1 for place in space.places]
    return np.asarray(np.array(steps, dtype=np.bool_)[space.place])


def visit_s(trained: FloatArray, cluster: Cluster, job: Job) -> FloatArray:
    """Seconds of an update by the host; 0 where nothing is known of it."""
    store = cluster.hosts[0].memory
    if store is None:
        return np.zeros_like(trained)
    copied, passed = visit_bytes(job)
    return np.asarray(trained * max(store.copy_s(copied), store.pass_s(passed)))


def _shown(messages_s: FloatArray, beside_s: FloatArray, hides: float) -> FloatArray:
    return np.asarray(messages_s - hides * np.minimum(messages_s, beside_s))


def _turn(nbytes: FloatArray, ranks: np.ndarray, stride: np.ndarray, cluster: Cluster) -> FloatArray:
    """Seconds of one turn of a ring of `ranks` that stand `stride` apart: over the slowest level that it reaches, on
    which all of its ranks under the level below send at once."""
    rate, below = np.full(len(nbytes), np.inf), 1
    for link in cluster.links:
        beside = np.clip(below // stride, 1, ranks)
        reaches = (ranks * stride > below) & (ranks > 1)
        rate = np.where(reaches, np.minimum(rate, beside * link.bytes_per_s * link.efficiency), rate)
        below = link.ranks or below
    return np.asarray((ranks - 1) / ranks * nbytes / rate)
