"""A model traced for a search, once for each way to divide a unit: works of any layout, and what can be divided.

Which sizes of tp, cp and ep divide the model is tried on the model itself. Knows traces; prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch.nn as nn

from shardwise.describe.cluster import Cluster
from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import ShardwiseError
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import Context, Layout, Precision
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.plan.estimate import OPTIMIZER_STATES
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.scaled_works import ScaledWorks, part_names
from shardwise.plan.space import Limits, divisors
from shardwise.trace.objective import LossFunction

__all__ = ["Traced", "job_of", "traced_model"]

_MOST_SHARDS = 16  # and no more than a host has devices; larger ones are tried where a layout names them
_SAMPLE = 2  # samples of what is traced, where the batch has as many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """Works of any layout, what can be divided, and notes for whoever reads the plan."""

    works: ScaledWorks
    limits: Limits
    profiles: TracedProfiles


def traced_model(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    samples: int,
    cluster: Cluster,
    loss: LossFunction | None = None,
    tp_plan: GivenPlan | None = None,
    proof_batch: Mapping[str, Any] | None = None,
) -> Traced:
    """The model with a batch of `samples`, for layouts of up to the cluster's devices. Raises ModelError.

    proof_batch: that divisions are proven with, on real numbers: a small one, where the batch is large.
    """
    profiles = TracedProfiles(model, batch, loss=loss, tp_plan=tp_plan, proof_batch=proof_batch)
    whole = profiles.whole(min(samples, _SAMPLE))
    names = part_names(whole)
    count = sum(bool(node.parameters) for node in whole.flow.calls)
    sizes = [size for size in divisors(cluster.num_devices) if 1 < size <= _MOST_SHARDS]

    def divided_by(tp: int) -> bool:
        return bool(profiles.tensor_plan(tp, SequenceParallel.OFF).units)

    most = max(2, *(hosts.devices for hosts in cluster.hosts))  # shards meet in every layer
    tp = _sizes([size for size in sizes if size <= most], divided_by)
    found = {
        "tp": tp,
        "cp": _sizes(sizes, lambda cp: bool(profiles.context_plan(Layout(cp=cp)).units)),  # as a ring
        "ep": _sizes(sizes, lambda ep: bool(profiles.expert_plan(ep).units)),
    }
    both = found["cp"] and _divides(lambda: profiles.context_plan(Layout(cp=2, context=Context.ULYSSES)).units)
    limits = Limits(
        stages=max(1, count),
        sizes=found,
        contexts=tuple(Context) if both else (Context.RING,),
        budgets=True,
        names=names if len(names) == count else (),
        sequence_parallel=bool(tp) and _deals_tokens(profiles, tp[0]),
    )
    return Traced(works=ScaledWorks(profiles, traced=min(samples, _SAMPLE)), limits=limits, profiles=profiles)


def job_of(global_batch: int, *, precision: Precision, optimizer: str) -> Job:
    """Bytes of the states of training by precision and optimizer; 16-bit ones have float32 masters and sums."""
    states = 4 * OPTIMIZER_STATES[optimizer]
    if precision.is_narrow:
        # 16-bit products cannot write into the buckets of float32 sums: what is summed up stands beside them
        per = PerParameter(parameter=2, gradient=4, master=4, optimizer=states, wire=4)
    else:
        per = PerParameter(optimizer=states)
    sent = 2 if precision.reduce != "float32" else 4
    return Job(global_batch=global_batch, per_parameter=per, reduce_bytes=sent)


def _sizes(sizes: list[int], divides: Callable[[int], bool]) -> tuple[int, ...]:
    """Those that divide the model: where one does not, its multiples do not either."""
    found: list[int] = []
    broken: list[int] = []
    for size in sizes:
        if any(size % other == 0 for other in broken):
            continue
        try:
            (found if divides(size) else broken).append(size)
        except ShardwiseError:
            broken.append(size)
    return tuple(found)


def _divides(found: Callable[[], Collection[str]]) -> bool:
    """Whether a plan divides any unit."""
    try:
        return bool(found())
    except ShardwiseError:
        return False


def _deals_tokens(profiles: TracedProfiles, tp: int) -> bool:
    try:
        plan = profiles.tensor_plan(tp, SequenceParallel.ON)
    except ShardwiseError:
        return False
    return any(unit not in plan.all_tokens for unit in plan.units)
