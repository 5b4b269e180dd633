"""What a step on a layout will take: memory of every stage, bytes on every edge, seconds, the timeline.

Arithmetic on a profile and a cut. Rates (flops a second, bytes a second) are given by the caller. Left out:
buffers of the allocator and of the transport, and what the all-reduce of gradients takes beside the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from shardwise.describe.profile import ModelProfile, ParameterProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.cut import Cut, StageCut
from shardwise.plan.work import Work, work_of
from shardwise.schedule import Costs, Kind, Schedule, Timeline, check, generate, simulate

__all__ = ["OPTIMIZER_STATES", "EdgeEstimate", "Estimate", "StageEstimate", "estimate"]

# Tensors as large as the parameter that an optimizer of torch.optim keeps for each one, in its dtype.
OPTIMIZER_STATES: Mapping[str, int] = MappingProxyType({"adamw": 2, "sgd": 0, "sgd-momentum": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage on one of its ranks. Bytes at the peak of a step; flops and seconds of one micro-batch."""

    stage: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    micro_batch_bytes: int  # kept for the backward of one micro-batch: saved and received
    in_flight: int  # micro-batches whose backward is not done, at most
    flops: int  # forward and backward
    forward_s: float
    backward_s: float
    all_reduce_bytes: int  # sent by each replica in one step to average the gradients

    @property
    def activation_bytes(self) -> int:
        return self.micro_batch_bytes * self.in_flight

    @property
    def memory_bytes(self) -> int:
        """Parameters, gradients, optimizer state and activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeEstimate:
    """What crosses from a stage to another with every micro-batch; `values` of the dataflow."""

    source: int
    target: int
    values: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A step, predicted. The timeline is of one replica: its ranks are the stages."""

    stages: tuple[StageEstimate, ...]
    edges: tuple[EdgeEstimate, ...]
    schedule: Schedule
    timeline: Timeline

    @property
    def step_s(self) -> float:
        """Forward and backward of all micro-batches; the optimizer is left out."""
        return self.timeline.seconds

    @property
    def bubble_fraction(self) -> float:
        """The share of the step in which ranks wait, 0 to 1."""
        return self.timeline.bubble_fraction

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def imbalance(self) -> float:
        """The seconds of the busiest stage over the mean; 1 is perfect."""
        seconds = [stage.forward_s + stage.backward_s for stage in self.stages]
        mean = sum(seconds) / len(seconds)
        return max(seconds) / mean if mean else 1.0


def estimate(
    profile: ModelProfile,
    layout: Layout,
    cut: Cut,
    *,
    num_micro_batches: int,
    flops_per_s: float,
    bytes_per_s: float | None = None,
    optimizer: str = "adamw",
    scale: float = 1.0,
) -> Estimate:
    """The estimate of one step of `num_micro_batches` a replica.

    flops_per_s: of one rank, reached and not promised; unused where the profile was measured.
    bytes_per_s: of a link in one direction; None: transfers are free.
    scale: samples of a micro-batch over those of the traced batch.
    Raises `LayoutError` for an unknown optimizer or a rate that is not above 0, `ScheduleError` where the
    stages are not numbered in the order of the dataflow.
    """
    _check(optimizer, flops_per_s, bytes_per_s, scale)
    edges = tuple(_edge(profile, cut, source, target, scale) for source, target in cut.edges)
    schedule = generate(layout.schedule, num_ranks=layout.pp, num_micro_batches=num_micro_batches)
    in_flight = check(schedule, frozenset(cut.edges)).peak_per_stage
    work = work_of(profile)
    rate = scale if work.in_seconds else scale / flops_per_s
    stages = tuple(
        _stage(
            profile,
            stage,
            work,
            rate=rate,
            in_flight=in_flight[stage.stage],
            states=OPTIMIZER_STATES[optimizer],
            scale=scale,
            dp=layout.num_replicas,
        )
        for stage in cut.stages
    )
    timeline = simulate(schedule, frozenset(cut.edges), costs=_costs(stages, edges, bytes_per_s))
    return Estimate(stages=stages, edges=edges, schedule=schedule, timeline=timeline)


def _costs(stages: tuple[StageEstimate, ...], edges: tuple[EdgeEstimate, ...], bytes_per_s: float | None) -> Costs:
    """What the simulator pays; I and W are each half of a backward."""
    backward = tuple(stage.backward_s for stage in stages)
    half = tuple(seconds / 2 for seconds in backward)
    priced = [((edge.source, edge.target), edge) for edge in edges] if bytes_per_s else []
    return Costs(
        compute_seconds={
            Kind.F: tuple(stage.forward_s for stage in stages),
            Kind.B: backward,
            Kind.I: half,
            Kind.W: half,
        },
        activation_seconds={pair: edge.forward_bytes / (bytes_per_s or 1.0) for pair, edge in priced},
        gradient_seconds={pair: edge.backward_bytes / (bytes_per_s or 1.0) for pair, edge in priced},
    )


def _check(optimizer: str, flops_per_s: float, bytes_per_s: float | None, scale: float) -> None:
    if optimizer not in OPTIMIZER_STATES:
        known = ", ".join(OPTIMIZER_STATES)
        raise LayoutError(f"an optimizer is one of {known}, but got {optimizer!r}; use one of these")
    link = 1.0 if bytes_per_s is None else bytes_per_s
    given = {"flops_per_s": flops_per_s, "scale": scale, "bytes_per_s": link}
    for name, number in given.items():
        if not number > 0:
            raise LayoutError(f"{name} is above 0, but got {number}; measure it, or give a guess")


def _stage(
    profile: ModelProfile,
    cut: StageCut,
    work: Work,
    *,
    rate: float,
    in_flight: int,
    states: int,
    scale: float,
    dp: int,
) -> StageEstimate:
    held = [profile.parameters[name] for name in sorted(cut.parameters)]
    trained = _bytes([parameter for parameter in held if parameter.trainable])
    here = [part for part in profile.parts if part.node in cut.computes]
    kept = sum(part.saved_bytes for part in here)
    received = sum(profile.flow.values[value].nbytes for value, _ in cut.receives)
    return StageEstimate(
        stage=cut.stage,
        num_parameters=sum(parameter.num_elements for parameter in held),
        parameter_bytes=_bytes(held),
        gradient_bytes=trained,
        optimizer_bytes=states * trained,
        micro_batch_bytes=round(scale * (kept + received)),
        in_flight=in_flight,
        flops=round(scale * sum(part.forward_flops + part.backward_flops for part in here)),
        forward_s=rate * sum(work.forward.get(part.node, 0.0) for part in here),
        backward_s=rate * sum(work.backward.get(part.node, 0.0) for part in here),
        all_reduce_bytes=2 * (dp - 1) * trained // dp,  # a ring (Patarasuk and Yuan 2009)
    )


def _bytes(parameters: list[ParameterProfile]) -> int:
    return sum(parameter.nbytes for parameter in parameters)


def _edge(profile: ModelProfile, cut: Cut, source: int, target: int, scale: float) -> EdgeEstimate:
    crossing = [profile.flow.values[value] for value, at in cut.stages[target].receives if at == source]
    return EdgeEstimate(
        source=source,
        target=target,
        values=tuple(value.index for value in crossing),
        forward_bytes=round(scale * sum(value.nbytes for value in crossing)),
        backward_bytes=round(scale * sum(value.nbytes for value in crossing if value.requires_grad)),
    )
