"""What each stage must hold in a step, in bytes: parameters, gradients, activations. Arithmetic on a profile.

activations = (bytes saved for backward + values received + values sent), of one micro-batch
              x micro-batches whose backward has not run, at the peak of the schedule
"""

from __future__ import annotations

import dataclasses

from shardwise.plan.cut import cut_stages
from shardwise.plan.estimate import estimate
from shardwise.plan.partition import place
from shardwise.trace.profile import trace
from shardwise.train.build import Job, build_model, build_task, first_micro_batch
from shardwise.train.run_file import Run

__all__ = ["Needs", "needs_of_stages"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """One stage; bytes."""

    num_parameters: int
    parameters: int
    gradients: int
    activations: int
    in_flight: int  # micro-batches

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.activations


def needs_of_stages(run: Run) -> list[Needs]:
    """By stage. The model is traced with fake parameters; none of it is allocated."""
    job = Job(run=run, task_options=run.task_options)
    task = build_task(job)
    model, _ = build_model(job)
    profile = trace(model, first_micro_batch(run, task), loss=task.loss)
    cut = cut_stages(profile.flow, place(profile, run.layout), run.layout.num_stages)
    number = run.num_micro_batches
    predicted = estimate(profile, run.layout, cut, num_micro_batches=number, flops_per_s=1e9, optimizer="sgd")
    values = profile.flow.values
    return [
        Needs(
            num_parameters=stage.num_parameters,
            parameters=stage.parameter_bytes,
            gradients=stage.gradient_bytes,
            activations=stage.activation_bytes
            + stage.in_flight * sum(values[value].nbytes for value in {value for value, _ in plan.sends}),
            in_flight=stage.in_flight,
        )
        for stage, plan in zip(predicted.stages, cut.stages, strict=True)
    ]
