"""The plan of a run in words, before its first step: stages, memory, traffic and the drawn schedule.

Traces the model once more, on whatever device and rank it is called; seconds come from the clock where unit calls were
measured, else from how fast this machine multiplies matrices. Refuses to know how a run is started.
"""

from __future__ import annotations

import os
import time

import torch
import torch.nn as nn

from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.profile import ModelProfile
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import ConfigError, LayoutError
from shardwise.layout import SEARCHED, Layout
from shardwise.plan.cut import cut_stages
from shardwise.plan.divide import profile_of_shard
from shardwise.plan.divide_context import profile_of_context
from shardwise.plan.divide_experts import profile_of_expert_rank
from shardwise.plan.estimate import estimate
from shardwise.plan.explain import explain
from shardwise.plan.partition import place
from shardwise.plan.recompute import plan_recompute, profile_with
from shardwise.plan.searched import Found, find_schedule
from shardwise.plan.sources import source_of
from shardwise.plan.work import work_of
from shardwise.quantities import format_bytes, format_flops
from shardwise.schedule import Schedule, Timeline
from shardwise.train.balance import with_threads

__all__ = [
    "context_note",
    "experts_note",
    "link_rate",
    "machine_rate",
    "plan_and_timeline",
    "plan_of_profile",
    "schedule_for",
    "statistics_note",
    "threads_of_rank",
]

_SIDE = 384  # of the matrices that are multiplied
_PROBE_S = 0.1
_LINK_BYTES, _LINK_COPIES = 8 * 2**20, 8


def plan_of_profile(
    profile: ModelProfile,
    *,
    layout: Layout,
    num_micro_batches: int,
    flops_per_s: float | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    context: ContextPlan | None = None,
    found: Found | None = None,
) -> str:
    """The plan of a traced model; `flops_per_s` of one rank is measured here if not given. `tensor` divides units,
    `found` is the schedule of a layout that searches for one.

    Says where its seconds come from. Raises LayoutError; ConfigError for a rate that is not above 0.
    """
    text, _ = plan_and_timeline(
        profile,
        layout=layout,
        num_micro_batches=num_micro_batches,
        flops_per_s=flops_per_s,
        tensor=tensor,
        experts=experts,
        context=context,
        found=found,
    )
    return text


def plan_and_timeline(
    profile: ModelProfile,
    *,
    layout: Layout,
    num_micro_batches: int,
    flops_per_s: float | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    context: ContextPlan | None = None,
    found: Found | None = None,
) -> tuple[str, Timeline]:
    """What `plan_of_profile` says, and the step that it predicts."""
    if flops_per_s is not None and not flops_per_s > 0:
        raise ConfigError(f"a rank computes more than 0 flops a second, but got {flops_per_s:g}; give 10 Gflops, say")
    stages = place(profile, layout)
    cut = cut_stages(profile.flow, stages, layout.num_stages)
    timed = work_of(profile).in_seconds
    rate = flops_per_s or (1.0 if timed else machine_rate(layout.world_size))
    profile = _of_one_rank(profile, tensor, experts, context)
    schedule = _schedule(layout, num_micro_batches, found)
    again = plan_recompute(profile, cut, schedule, layout.recompute)
    profile = profile_with(profile, again)
    predicted = estimate(
        profile,
        layout,
        cut,
        num_micro_batches=num_micro_batches,
        flops_per_s=rate if found is None else found.flops_per_s,
        bytes_per_s=None if found is None else found.bytes_per_s,
        schedule=schedule,
    )
    free = "take no time" if found is None else f"at {format_bytes(round(found.bytes_per_s))} a second"
    if timed:
        assumes = f"the seconds that every unit call took here, alone; glue takes no time; transfers {free}"
    else:
        source = "as given" if flops_per_s else _source(layout.world_size)
        assumes = f"{format_flops(rate)} a second on every rank, {source}; transfers {free}"
    gain = "" if found is None else str(found)
    told = explain(profile, layout, cut, predicted, assumes=assumes, tensor=tensor, found=gain, again=again)
    return told, predicted.timeline


def _schedule(layout: Layout, num_micro_batches: int, found: Found | None) -> Schedule:
    if found is not None:
        return found.schedule
    source = source_of(layout)
    if source is None:
        raise LayoutError(f"schedule={layout.schedule} is found for a model; search, and give what was found")
    return source(num_micro_batches)


def schedule_for(
    profile: ModelProfile,
    *,
    layout: Layout,
    num_micro_batches: int,
    flops_per_s: float | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    context: ContextPlan | None = None,
) -> Found | None:
    """The schedule that is searched for a traced model; None where the layout names one. Rates are measured here if
    not given. Raises LayoutError, ScheduleError."""
    if layout.schedule != SEARCHED:
        return None
    timed = work_of(profile).in_seconds
    return find_schedule(
        _of_one_rank(profile, tensor, experts, context),
        layout,
        place(profile, layout),
        num_micro_batches=num_micro_batches,
        flops_per_s=flops_per_s or (1.0 if timed else machine_rate(layout.world_size)),
        bytes_per_s=link_rate(),
    )


def _of_one_rank(
    profile: ModelProfile, tensor: TensorPlan | None, experts: ExpertPlan | None, context: ContextPlan | None
) -> ModelProfile:
    if context is not None:
        profile = profile_of_context(profile, context)
    if tensor is not None:
        profile = profile_of_shard(profile, tensor)
    if experts is not None:
        profile = profile_of_expert_rank(profile, experts, rank=experts.ep - 1)  # the last has the most
    return profile


def link_rate() -> float:
    """Bytes a second between two ranks of this machine: into shared memory and out of it."""
    source, target = torch.ones(_LINK_BYTES, dtype=torch.uint8), torch.empty(_LINK_BYTES, dtype=torch.uint8)
    seconds: list[float] = []
    for _ in range(_LINK_COPIES):
        start = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - start)
    return _LINK_BYTES / 2 / min(seconds)  # a busy moment is not the link's


def machine_rate(num_ranks: int = 1) -> float:
    """Flops per second of float32 matrix products that one of `num_ranks` ranks gets of this machine's cores."""
    matrix = torch.ones(_SIDE, _SIDE)
    with with_threads(threads_of_rank(num_ranks)):
        products, start = 0, time.perf_counter()
        while time.perf_counter() - start < _PROBE_S:
            torch.mm(matrix, matrix)
            products += 1
        rate = 2.0 * _SIDE**3 * products / (time.perf_counter() - start)
    return rate * min(1.0, _num_cores() / num_ranks)


def threads_of_rank(num_ranks: int) -> int:
    """Threads of each of `num_ranks` ranks that share this machine."""
    return max(1, _num_cores() // num_ranks)


def context_note(context: ContextPlan | None) -> str:
    """How sequences are divided, as further lines of a plan; empty where they are not."""
    if context is None:
        return ""
    first, *rest = context.lines()
    return "".join(["\ncontext       " + first, *("\n              " + line for line in rest)])


def experts_note(experts: ExpertPlan | None) -> str:
    """How experts are divided, as further lines of a plan; empty where they are not."""
    if experts is None:
        return ""
    first, *rest = experts.lines()
    return "".join(["\nexperts       " + first, *("\n              " + line for line in rest)])


def statistics_note(model: nn.Module, layout: Layout) -> str:
    """What running statistics mean on a layout with replicas; empty where there are none."""
    if layout.num_replicas == 1 or not any(_has_statistics(module) for module in model.modules()):
        return ""
    return (
        "\nnote          BatchNorm normalises each micro-batch of a replica by itself, or with batch_norm = "
        '"synchronised"\n              those of all together; running statistics are equal on all (docs/tasks.md)'
    )


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats


def _source(num_ranks: int) -> str:
    threads = threads_of_rank(num_ranks)
    share = f", {num_ranks} of them on {_num_cores()} cores" if num_ranks > _num_cores() else ""
    return f"as float32 matrix products reach here on {threads} thread{'s' if threads > 1 else ''}{share}"


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))
