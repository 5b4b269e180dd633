"""A run of two stages by hand: its estimate, and what it measured, in numbers that can be added in the head."""

from __future__ import annotations

import dataclasses

from plan.hand_works import cluster, device
from shardwise.describe.cluster import Cluster
from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.run_estimate import Predicted, Predictor, RunEstimate
from shardwise.plan.run_measured import RunMeasured
from shardwise.plan.stage_work import StageWork

LAYOUT = Layout(pp=2, micro_batches=4)
SENT = 1e6


def products(seconds_at_full_rate: float, phase: Phase) -> Kernel:
    """Products that a device of 100 Tflops/s would take so long for."""
    flops = round(seconds_at_full_rate * 1e14)
    return Kernel(
        kind=KernelKind.MATMUL,
        phase=phase,
        dtype="bfloat16",
        flops=flops,
        nbytes=8,
        shape=(1, flops // 2**21, 1024, 1024),
    )


def works() -> tuple[StageWork, ...]:
    return tuple(
        StageWork(
            stage=stage,
            parameters=10_000_000,
            trained=10_000_000,
            kernels=(
                *(products(seconds, phase) for phase, seconds in zip(Phase, (0.010, 0.010, 0.010), strict=True)),
                Kernel(kind=KernelKind.MEMORY, phase=Phase.FORWARD, dtype="bfloat16", nbytes=10**9, count=4),
            ),
            saved_bytes=5e7,
            sends={1: SENT} if stage == 0 else {},
            gradients={1: SENT} if stage == 0 else {},
        )
        for stage in range(2)
    )


def machine() -> Cluster:
    return cluster(hosts=1, devices=2, kind=device())


def predictor() -> Predictor:
    return Predictor(works(), LAYOUT, Job(global_batch=8), 4, machine())


def estimate() -> RunEstimate:
    return RunEstimate(
        layout=LAYOUT.to_dict(),
        num_micro_batches=4,
        job=Job(global_batch=8),
        cluster=machine(),
        source="a machine by hand",
        works=works(),
        traffic=({"pp.send": int(4 * SENT)}, {"pp.send": int(4 * SENT)}),
        predicted=predictor()(machine()),
    )


def measured_as(predicted: Predicted, **changes: object) -> RunMeasured:
    """What a run would have measured that did as it was predicted."""
    outside = predicted.time[0].replicas + predicted.time[0].optimizer
    made = RunMeasured(
        steps=10,
        recorded=2,
        step_s=predicted.step_s,
        pipeline_s=predicted.pipeline_s,
        sums_s=predicted.time[0].replicas,
        optimizer_s=outside - predicted.time[0].replicas,
        data_s=1e-3,
        memory={place: round(lines.total) for place, lines in enumerate(predicted.memory)},
        actions={kind: dict(enumerate(predicted.actions[kind])) for kind in ("F", "B")},
        waiting={place: predicted.waiting_s(place) for place in range(2)},
        forward_s={(0, 1): predicted.edges[0].forward_s},
        backward_s={(0, 1): predicted.edges[0].backward_s},
        traffic={0: {"pp.send": int(4 * SENT)}, 1: {"pp.send": int(4 * SENT)}},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]
