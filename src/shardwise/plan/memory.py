"""Bytes of one rank at the worst moment of a step, line by line, from what its stages do and hold.

    moment     parameters, masters, optimizer   gradients         activations            besides
    loss       all the time                     those before it   all that the schedule  logits
                                                                  keeps at its peak
    turn       all the time                     those before it   the same               one unit's work
    passed     all the time                     all, fresh ones   without the micro-     one unit's work
                                                                  batch that is done
    next loss  all the time                     all               the same               logits
    step       all the time                     all, fresh ones   none                   the optimizer's temporaries

"loss" and "turn" are where the last forward ends and its backward begins: logits and the loss are alive until the
head's backward is done, then the work of one unit after the other. In "passed" a first backward is about to end, behind
it the next one begins, in "step" the optimizer runs.

What replicas divide is what `plan.divide_states` says (Rajbhandari et al. 2020, arXiv:1910.02054, section 5); what is
whole of it meanwhile is counted as buffers. Micro-batches in flight as in Narayanan et al. 2021 (arXiv:2104.04473,
section 2.2) are given, from a schedule (`plan.in_flight`) or in closed form. Refuses to know models, units and seconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from shardwise.describe.cluster import Overheads
from shardwise.errors import LayoutError
from shardwise.layout import Layout
from shardwise.plan.continuous import VERSIONS
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines
from shardwise.plan.stage_work import StageWork
from shardwise.schedule import GENERATORS

__all__ = ["memory_lines", "moments", "on_device", "share_here", "states_of"]

_AT_ONCE = 2  # units whose parameters are whole at the same time: the one that computes, and the next
_ON_THE_DEVICE = (
    2.0  # micro-batches, without a pipeline units, whose activations are not in the host's memory: the one that
    # computes, and the next
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Elements:
    """What the stages of a rank hold before replicas divide anything."""

    parameters: int
    trained: int
    largest_unit: int

    @classmethod
    def of(cls, stages: Sequence[StageWork]) -> _Elements:
        return cls(
            parameters=sum(stage.parameters for stage in stages),
            trained=sum(stage.trained for stage in stages),
            largest_unit=max((unit for stage in stages for unit in stage.unit_parameters), default=0),
        )


def memory_lines(
    stages: Sequence[StageWork],
    layout: Layout,
    job: Job,
    *,
    num_micro_batches: int,
    in_flight: Sequence[float],
    overheads: Overheads = Overheads(),  # noqa: B008 (a frozen value)
) -> MemoryLines:
    """The lines of the worst moment of a rank that owns `stages`.

    in_flight: for each of them, micro-batches that it keeps for their backwards when the rank keeps the most; one that
        waits for its gradients of weights alone counts by what it still keeps.
    Raises `LayoutError` unless there is such a number, 0 or more, for every stage.
    """
    states = states_of(stages, layout, job)
    alive = _alive(stages, layout, job, states.gradients, num_micro_batches, in_flight)
    worst = max(alive.values(), key=lambda moment: moment.gradients + (1.0 + overheads.slack) * moment.passing)
    return worst.lines(states, framework=overheads.framework_bytes, slack=overheads.slack * worst.passing)


def moments(
    stages: Sequence[StageWork],
    layout: Layout,
    job: Job,
    *,
    num_micro_batches: int,
    in_flight: Sequence[float],
) -> Mapping[str, MemoryLines]:
    """What is alive at every moment that may be the worst, by name; slack and framework apart. See `memory_lines`."""
    states = states_of(stages, layout, job)
    alive = _alive(stages, layout, job, states.gradients, num_micro_batches, in_flight)
    return {name: moment.lines(states) for name, moment in alive.items()}


class _Moment(NamedTuple):
    """Bytes that are not there all the time."""

    gradients: float
    activations: float = 0.0
    transient: float = 0.0
    logits: float = 0.0

    @property
    def passing(self) -> float:
        """What comes and goes. What stays is taken once, and leaves no fragments."""
        return self.activations + self.transient + self.logits

    def lines(self, states: MemoryLines, *, framework: float = 0.0, slack: float = 0.0) -> MemoryLines:
        """With what is there all the time."""
        return dataclasses.replace(states, **self._asdict(), framework=framework, slack=slack)


def _alive(
    stages: Sequence[StageWork],
    layout: Layout,
    job: Job,
    gradients: float,
    num_micro_batches: int,
    in_flight: Sequence[float],
) -> Mapping[str, _Moment]:
    """The moments by name; gradients: those of a step, whole or in parts."""
    if len(in_flight) != len(stages) or any(number < 0 for number in in_flight):
        raise LayoutError(
            f"every stage of a rank keeps so many micro-batches, 0 or more, but got {list(in_flight)} for "
            f"{len(stages)} stages; give one number a stage"
        )
    here = on_device(layout, stages, in_flight)
    kept = float(sum(number * stage.saved_bytes for number, stage in zip(here, stages, strict=True)))
    done = min((stage.saved_bytes for number, stage in zip(here, stages, strict=True) if number >= 1), default=kept)
    left = max(0.0, kept - done)
    transient = max((stage.transient_bytes for stage in stages), default=0.0)
    logits = max((stage.logits_bytes for stage in stages), default=0.0)
    trained = sum(stage.trained for stage in stages)
    most = max(here, default=0.0)
    stay = _gradients_stay(layout, job)
    beside = float(job.per_parameter.gradient * sum(stage.small_trained for stage in stages)) if stay else 0.0
    before = gradients if stay or num_micro_batches > max(in_flight, default=0.0) else 0.0
    before += beside if num_micro_batches > 1 else 0.0
    fresh = gradients + beside + job.per_parameter.fresh * trained
    return {
        "loss": _Moment(gradients=before, activations=kept, logits=logits),
        "turn": _Moment(gradients=before, activations=kept, transient=transient),
        "passed": _Moment(gradients=fresh, activations=left, transient=transient),
        "next loss": _Moment(gradients=gradients, activations=left, logits=logits if most > 1 else 0.0),
        "step": _Moment(gradients=fresh, transient=job.per_parameter.temporary * trained / layout.fsdp),
    }


def states_of(stages: Sequence[StageWork], layout: Layout, job: Job) -> MemoryLines:
    """What a rank holds of the state of training, all through a step, and what is whole or on its way besides.

    Gradients are those that a step sums up; `Job.gradients_stay` says whether they are there between steps too.
    """
    held, bytes_of, n = _Elements.of(stages), job.per_parameter, layout.fsdp
    versions = VERSIONS if layout.schedule in GENERATORS and not GENERATORS[layout.schedule].flushes else 1
    parameters = float(bytes_of.parameter * (held.parameters + (versions - 1) * held.trained))
    gradients = float(versions * bytes_of.gradient * held.trained)
    turn = min(_AT_ONCE * held.largest_unit, held.parameters)
    buffers = max((_on_its_way(stage) for stage in stages), default=0.0)
    by_step, zero = layout.unshards_by_step, layout.zero if n > 1 else 0
    if zero >= 2 and not by_step:
        buffers += min(bytes_of.gradient * turn, gradients)
        gradients /= n
    if zero == 3:
        buffers += parameters if by_step else bytes_of.parameter * turn
        parameters /= n
    if layout.num_replicas > 1 and zero < 3:
        buffers += bytes_of.wire * held.trained
    return MemoryLines(
        parameters=parameters,
        gradients=gradients,
        masters=bytes_of.master * held.trained / n,
        optimizer=0.0 if layout.offloads_optimizer else bytes_of.optimizer * held.trained / n,
        buffers=buffers,
    )


def _gradients_stay(layout: Layout, job: Job) -> bool:
    """Whether gradients have their bytes before a step's first backward: replicas sum them in buffers that are kept,
    but not in parts of them."""
    return job.gradients_stay or (layout.num_replicas > 1 and (layout.fsdp == 1 or layout.zero == 1))


def on_device(layout: Layout, stages: Sequence[StageWork], in_flight: Sequence[float]) -> Sequence[float]:
    """Micro-batches, or of one the share, whose activations are on the device."""
    if not layout.offloads_activations:
        return in_flight
    if layout.pp > 1:
        return [min(number, _ON_THE_DEVICE) for number in in_flight]
    return [number * share_here(stage) for number, stage in zip(in_flight, stages, strict=True)]


def share_here(stage: StageWork) -> float:
    """Of what a micro-batch keeps, what the largest units keep."""
    if not stage.unit_saved_bytes:
        return 1.0
    return min(1.0, _ON_THE_DEVICE * stage.unit_saved_bytes / stage.saved_bytes)


def _on_its_way(stage: StageWork) -> float:
    """The messages of one micro-batch that wait to be taken."""
    return float(sum(stage.sends.values()) + sum(stage.gradients.values()))
