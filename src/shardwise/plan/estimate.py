"""What a step on a layout will take: memory of every stage and rank, bytes on every edge, seconds, the timeline.

Arithmetic on a profile and a cut. Rates (flops a second, bytes a second) are given by the caller. Left out:
buffers of the allocator and of the transport, and what the all-reduce of gradients takes beside the backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from shardwise.describe.profile import CallProfile, ModelProfile, ParameterProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.continuous import VERSIONS, further_step_s
from shardwise.plan.cut import Cut, StageCut
from shardwise.plan.divide_states import StateBytes, divided, sent_bytes
from shardwise.plan.sources import source_of
from shardwise.plan.work import Work, work_of
from shardwise.schedule import GENERATORS, Costs, Kind, Schedule, Timeline, check, simulate
from shardwise.schedule.memory import Memory, peak_bytes

__all__ = [
    "OPTIMIZER_STATES",
    "EdgeEstimate",
    "Estimate",
    "RankEstimate",
    "StageEstimate",
    "costs_of",
    "edge_estimates",
    "estimate",
    "memory_of",
    "stage_estimates",
]

# Tensors as large as the parameter that an optimizer of torch.optim keeps for each one, in its dtype.
OPTIMIZER_STATES: Mapping[str, int] = MappingProxyType({"adamw": 2, "sgd": 0, "momentum": 1, "muon": 1})


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """One stage on one of its ranks. Bytes at the peak of a step; flops and seconds of one micro-batch."""

    stage: int
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    micro_batch_bytes: int  # kept for the backward of one micro-batch: saved and received
    weight_bytes: int  # kept of it when the gradients of its inputs are done: what those of weights are made of
    in_flight: int  # micro-batches whose backward is not done, at most
    activation_bytes: int  # at most; where the rank owns other stages too, not all at their most at once
    flops: int  # forward and backward
    forward_s: float
    backward_s: float
    weight_s: float  # of the backward: gradients of weights, which a schedule may put off
    all_reduce_bytes: int  # sent by each replica in one step to average the gradients, and to gather parameters

    @property
    def memory_bytes(self) -> int:
        """Parameters, gradients, optimizer state and activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """One place of the pipeline, with the stages it owns. Bytes at the peak of a step; what two stages share is held
    once."""

    position: int
    stages: tuple[int, ...]
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Parameters, gradients, optimizer state and activations."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


Held = TypeVar("Held", StageEstimate, RankEstimate)


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
    """A step, predicted. The timeline is of one replica: its ranks are the places of the pipeline."""

    stages: tuple[StageEstimate, ...]
    ranks: tuple[RankEstimate, ...]
    edges: tuple[EdgeEstimate, ...]
    schedule: Schedule
    timeline: Timeline
    further_s: float | None = None  # of a step that follows another without a flush, where the schedule has none

    @property
    def step_s(self) -> float:
        """Forward and backward of all micro-batches; the optimizer is left out."""
        return self.timeline.seconds if self.further_s is None else self.further_s

    @property
    def bubble_fraction(self) -> float:
        """The share of the step in which ranks wait, 0 to 1."""
        if self.further_s is None:
            return self.timeline.bubble_fraction
        total = self.timeline.num_ranks * self.further_s
        return 1.0 - sum(self.timeline.busy_seconds) / total if total else 0.0

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return max(rank.memory_bytes for rank in self.ranks)

    @property
    def imbalance(self) -> float:
        """The seconds of the busiest rank over the mean; 1 is perfect."""
        of_stages = [stage.forward_s + stage.backward_s for stage in self.stages]
        seconds = [sum(of_stages[stage] for stage in rank.stages) for rank in self.ranks]
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
    schedule: Schedule | None = None,
) -> Estimate:
    """The estimate of one step of `num_micro_batches` a replica, by the layout's schedule or the one that is given
    (that of a layout which searches for one).

    flops_per_s: of one rank, reached and not promised; unused where the profile was measured.
    bytes_per_s: of a link in one direction; None: transfers are free.
    scale: samples of a micro-batch over those of the traced batch.
    Raises `LayoutError` for an unknown optimizer or a rate that is not above 0, `ScheduleError` where the
    stages are not numbered in the order of the dataflow.
    """
    _check(optimizer, flops_per_s, bytes_per_s, scale)
    if schedule is None:
        source = source_of(layout)
        if source is None:
            raise LayoutError(f"schedule={layout.schedule} is found for a model; search, and give what was found")
        schedule = source(num_micro_batches)
    in_flight = check(schedule, frozenset(cut.edges)).peak_per_stage
    stages = stage_estimates(
        profile,
        cut,
        flops_per_s=flops_per_s,
        optimizer=optimizer,
        scale=scale,
        replicas=layout.num_replicas,
        in_flight=in_flight,
    )
    edges = edge_estimates(profile, cut, scale=scale)
    costs = costs_of(stages, edges, bytes_per_s=bytes_per_s)
    timeline = simulate(schedule, frozenset(cut.edges), costs=costs)
    ranks = _ranks(profile, cut, stages, schedule, OPTIMIZER_STATES[optimizer])
    stages = tuple(_alone(stage, ranks[schedule.owners[stage.stage]]) for stage in stages)
    if layout.fsdp > 1:
        stages = tuple(
            dataclasses.replace(
                _divided(stage, layout, profile, [cut.stages[stage.stage]]),
                all_reduce_bytes=sent_bytes(
                    layout,
                    parameters=stage.parameter_bytes,
                    gradients=stage.gradient_bytes,
                    num_micro_batches=num_micro_batches,
                ),
            )
            for stage in stages
        )
        ranks = tuple(_divided(rank, layout, profile, [cut.stages[s] for s in rank.stages]) for rank in ranks)
    made = Estimate(stages=stages, ranks=ranks, edges=edges, schedule=schedule, timeline=timeline)
    if layout.schedule not in GENERATORS or GENERATORS[layout.schedule].flushes:
        return made
    return dataclasses.replace(
        made,
        stages=tuple(_held_twice(stage) for stage in stages),
        ranks=tuple(_held_twice(rank) for rank in ranks),
        further_s=further_step_s(schedule, frozenset(cut.edges), costs),
    )


def stage_estimates(
    profile: ModelProfile,
    cut: Cut,
    *,
    flops_per_s: float,
    optimizer: str = "adamw",
    scale: float = 1.0,
    replicas: int = 1,
    in_flight: Sequence[int] | None = None,
) -> tuple[StageEstimate, ...]:
    """Every stage; without a schedule no micro-batch is in flight."""
    work = work_of(profile)
    return tuple(
        _stage(
            profile,
            stage,
            work,
            rate=scale if work.in_seconds else scale / flops_per_s,
            in_flight=0 if in_flight is None else in_flight[stage.stage],
            states=OPTIMIZER_STATES[optimizer],
            scale=scale,
            dp=replicas,
        )
        for stage in cut.stages
    )


def edge_estimates(profile: ModelProfile, cut: Cut, *, scale: float = 1.0) -> tuple[EdgeEstimate, ...]:
    """Every edge of the stage graph."""
    return tuple(_edge(profile, cut, source, target, scale) for source, target in cut.edges)


def memory_of(stages: Sequence[StageEstimate], limit_bytes: tuple[float | None, ...] | None = None) -> Memory:
    """What a micro-batch keeps on each stage, until I or B and until W."""
    return Memory(
        activation_bytes=tuple(float(stage.micro_batch_bytes) for stage in stages),
        weight_bytes=tuple(float(stage.weight_bytes) for stage in stages),
        limit_bytes=limit_bytes,
    )


def costs_of(
    stages: Sequence[StageEstimate], edges: Sequence[EdgeEstimate], *, bytes_per_s: float | None = None
) -> Costs:
    """What the simulator pays; a backward is its two halves, of inputs and of weights (see `plan.work`)."""
    backward = tuple(stage.backward_s for stage in stages)
    priced = [((edge.source, edge.target), edge) for edge in edges] if bytes_per_s else []
    return Costs(
        compute_seconds={
            Kind.F: tuple(stage.forward_s for stage in stages),
            Kind.B: backward,
            Kind.I: tuple(stage.backward_s - stage.weight_s for stage in stages),
            Kind.W: tuple(stage.weight_s for stage in stages),
        },
        activation_seconds={pair: edge.forward_bytes / (bytes_per_s or 1.0) for pair, edge in priced},
        gradient_seconds={pair: edge.backward_bytes / (bytes_per_s or 1.0) for pair, edge in priced},
    )


def _divided(held: Held, layout: Layout, profile: ModelProfile, cuts: Sequence[StageCut]) -> Held:
    """With what is left of parameters, gradients and optimizer state where replicas divide them."""
    names = {name for stage in cuts for name in stage.parameters}
    units = [sum(p.nbytes for name, p in unit.parameters.items() if name in names) for unit in profile.units]
    whole = StateBytes(parameters=held.parameter_bytes, gradients=held.gradient_bytes, optimizer=held.optimizer_bytes)
    left = divided(layout, whole, largest=max(units, default=0))
    return dataclasses.replace(
        held, parameter_bytes=left.parameters, gradient_bytes=left.gradients, optimizer_bytes=left.optimizer
    )


def _held_twice(held: Held) -> Held:
    """With a second version of the trained weights, and the gradients of a second step."""
    more = (VERSIONS - 1) * held.gradient_bytes
    return dataclasses.replace(
        held, parameter_bytes=held.parameter_bytes + more, gradient_bytes=held.gradient_bytes + more
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


def _ranks(
    profile: ModelProfile, cut: Cut, stages: Sequence[StageEstimate], schedule: Schedule, states: int
) -> tuple[RankEstimate, ...]:
    activations = peak_bytes(schedule, memory_of(stages))
    found: list[RankEstimate] = []
    for position, own in enumerate(schedule.ranks):
        names = sorted({name for stage in own for name in cut.stages[stage].parameters})
        held = [profile.parameters[name] for name in names]
        trained = _bytes([parameter for parameter in held if parameter.trainable])
        found.append(
            RankEstimate(
                position=position,
                stages=own,
                parameter_bytes=_bytes(held),
                gradient_bytes=trained,
                optimizer_bytes=states * trained,
                activation_bytes=round(activations[position]),
            )
        )
    return tuple(found)


def _alone(stage: StageEstimate, rank: RankEstimate) -> StageEstimate:
    """With what its rank keeps at most, where the rank owns no other stage."""
    return dataclasses.replace(stage, activation_bytes=rank.activation_bytes) if len(rank.stages) == 1 else stage


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
    for_weights = [part.weight_bytes for part in here if isinstance(part, CallProfile)]
    counted = [nbytes for nbytes in for_weights if nbytes is not None]
    return StageEstimate(
        stage=cut.stage,
        num_parameters=sum(parameter.num_elements for parameter in held),
        parameter_bytes=_bytes(held),
        gradient_bytes=trained,
        optimizer_bytes=states * trained,
        micro_batch_bytes=round(scale * (kept + received)),
        weight_bytes=round(scale * (sum(counted) if len(counted) == len(for_weights) else kept + received)),
        in_flight=in_flight,
        activation_bytes=in_flight * round(scale * (kept + received)),
        flops=round(scale * sum(part.forward_flops + part.backward_flops for part in here)),
        forward_s=rate * sum(work.forward.get(part.node, 0.0) for part in here),
        backward_s=rate * sum(work.backward.get(part.node, 0.0) for part in here),
        weight_s=rate * sum(work.weight.get(part.node, 0.0) for part in here),
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
