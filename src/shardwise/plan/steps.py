"""Steps of many rows at once: pipelines, what shows of sums of gradients, the optimizer; arrays (rows, stages).

    pipeline of all micro-batches  +  sums of gradients that show  +  optimizer  +  parameters gathered  +  host

where a micro-batch on a stage takes what the device or the host takes, whichever is longer: the host starts kernels
ahead of the device, and a device that is faster waits for it. Refuses to know kernels and bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy.special import ndtri

from shardwise.describe.cluster import Cluster, Overheads
from shardwise.layout import Layout
from shardwise.plan.compute import FloatArray
from shardwise.plan.pipeline_time import PipelineTimes, pipeline_seconds
from shardwise.plan.sources import source_of
from shardwise.plan.stage_seconds import StageSeconds
from shardwise.schedule import GENERATORS, placement

__all__ = ["Steps", "of_the_slowest", "ranks_of", "steps_of", "times_of", "with_sums"]

_COMPUTED = ("forward", "input", "weight", "recompute", "accumulation", "optimizer")
WAITS = 4.0  # norm of device and host: where both take one second, a phase takes 2 ** (1 / 4) = 1.19


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps:
    """Seconds of many rows: a step and its parts, shape (rows,); of stages, shape (rows, stages)."""

    step_s: FloatArray
    pipeline: FloatArray
    replicas: FloatArray
    optimizer: FloatArray
    times: PipelineTimes


def steps_of(
    seconds: StageSeconds,
    num_micro_batches: FloatArray,
    layout: Layout,
    overheads: Overheads,
    *,
    overlap: bool,
    step_kernels: FloatArray | float = 0.0,
) -> Steps:
    """Steps of many rows with the stages, schedule and chunks of `layout`. Arrays of `seconds`: (rows, stages);
    step_kernels: (rows,), see `Job`."""
    times = times_of(seconds, overheads)
    chunks = layout.num_stages // layout.pp
    pipeline = pipeline_seconds(times, num_micro_batches, schedule=_formula(layout), chunks=chunks)
    # The last backward of a stage ends before the pipeline does, by the backwards of the stages before it.
    early = np.cumsum(times.backward + times.back, axis=1) - (times.backward + times.back)
    if overlap:
        left = seconds.reduce - np.minimum(seconds.reduce, times.backward) * overheads.overlap
    else:  # a rank sums all of its stages behind its last backward, which is that of its first stage
        left = times.by_rank(seconds.reduce, ranks_of(layout))
        early = early[:, [own[0] for own in ranks_of(layout)]]
    shown = np.maximum((left - early).max(axis=1), 0.0) + seconds.shared.max(axis=1)
    per_rank = [times.by_rank(part, ranks_of(layout)).max(axis=1) for part in (seconds.optimizer, seconds.gather)]
    optimizer, gather = per_rank
    optimizer = np.maximum(optimizer, step_kernels * overheads.kernel_s)
    return Steps(
        step_s=pipeline + shown + optimizer + gather + overheads.step_s,
        pipeline=pipeline,
        replicas=shown + gather,
        optimizer=optimizer,
        times=times,
    )


def _formula(layout: Layout) -> str:
    """The generator whose closed form is taken; a schedule that is only given is simulated in its place."""
    if layout.schedule in GENERATORS:
        return layout.schedule
    return "gpipe" if layout.num_stages == layout.pp else "looped-bfs"


def times_of(seconds: StageSeconds, overheads: Overheads) -> PipelineTimes:
    """Of every stage a forward and a backward of one micro-batch. Where the forward is computed again a backward is two
    phases: in each the host runs ahead of the device, and the slower of the two sets the pace of that phase."""
    shows = 1.0 - overheads.overlap
    slower = 1.0 + overheads.beside
    waits_forward = sum((pair[0] for pair in seconds.exchanges.values()), np.zeros_like(seconds.forward))
    waits_backward = sum((pair[1] for pair in seconds.exchanges.values()), np.zeros_like(seconds.forward))
    again_s = seconds.recompute + seconds.again
    backward_s = again_s + seconds.input + seconds.weight + waits_backward - seconds.again
    forward_s = _beside(
        seconds.forward + waits_forward, seconds.hidden_forward + seconds.unshard_forward, shows, slower
    )
    backward_s = _beside(backward_s, seconds.hidden_backward + seconds.unshard_backward, shows, slower)
    forward_s = _beside(forward_s, seconds.offload, shows, slower)  # over a link of its own
    backward_s = _beside(backward_s, seconds.offload, shows, slower)
    return PipelineTimes(
        forward=_longer(forward_s, seconds.host_forward) + overheads.action_s,
        backward=_longer(again_s, seconds.host_again)
        + _longer(np.maximum(backward_s - again_s, 0.0), seconds.host_backward)
        + overheads.action_s,
        weight=seconds.weight,
        send=seconds.send,
        back=seconds.back,
    )


def with_sums(seconds: StageSeconds, counts: FloatArray) -> StageSeconds:
    """Seconds of the mean micro-batch of a step: all but the first add their gradients to those before. counts: of
    micro-batches, a number, or one a row."""
    share = 1.0 - 1.0 / np.asarray(counts, dtype=np.float64)
    weight = seconds.weight + share[..., None] * seconds.accumulation
    return dataclasses.replace(seconds, weight=weight, accumulation=0.0 * seconds.accumulation)


def of_the_slowest(seconds: StageSeconds, num_devices: FloatArray, cluster: Cluster) -> StageSeconds:
    """What devices compute, as long as those of the slowest host take for it: all wait for it in every step.

    Arrays of `seconds`: (rows, stages); num_devices: (rows,), on hosts of the cluster. The largest of n normal numbers
    is expected where all but (n - 0.375) / (n + 0.25) of them lie (Blom 1958)."""
    if not cluster.overheads.spread:
        return seconds
    hosts = np.ceil(num_devices / cluster.hosts[0].devices)
    slower = 1.0 + cluster.overheads.spread * ndtri((hosts - 0.375) / (hosts + 0.25))[:, None]
    return dataclasses.replace(seconds, **{name: getattr(seconds, name) * slower for name in _COMPUTED})


def _beside(computing: FloatArray, messages: FloatArray, shows: float, slower: float) -> FloatArray:
    """Messages beside computing: what is longer, with the share that does not hide, and what they take of its pace."""
    both = np.minimum(computing, messages)
    return np.asarray(np.maximum(computing, messages) + both * (shows + slower - 1.0))


def _longer(device: FloatArray, host: FloatArray) -> FloatArray:
    """The longer of the two, and somewhat more where they are alike: each waits for the other now and then."""
    return np.asarray((device**WAITS + host**WAITS) ** (1.0 / WAITS))


def ranks_of(layout: Layout) -> tuple[tuple[int, ...], ...]:
    """[r]: the stages of place r of the pipeline."""
    if layout.schedule in GENERATORS:
        return placement(layout.schedule, num_ranks=layout.pp, chunks=layout.num_stages // layout.pp)
    source = source_of(layout)
    return source.ranks if source is not None else tuple((stage,) for stage in range(layout.num_stages))
