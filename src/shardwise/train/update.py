"""The update of a step: gradients clipped, the rate of the step, the optimizer. Knows a run's options, no loop."""

from __future__ import annotations

import torch

from shardwise.execute.program import Program
from shardwise.execute.scaled_step import step_scaled
from shardwise.train.optimizer import set_rate
from shardwise.train.rate import learning_rate
from shardwise.train.run_tables import TrainingOptions

__all__ = ["rate_of", "update"]


def update(
    program: Program, optimizer: torch.optim.Optimizer | None, options: TrainingOptions, *, step: int, norm: float
) -> None:
    """Apply the gradients of a step to this rank's parameters; `norm` is that of all gradients of the model.

    A step whose scaled gradients overflowed is left out, on all ranks alike: `norm` is not finite on any of them.
    """
    if not program.accepts(norm):
        return
    if optimizer is not None:
        set_rate(optimizer, rate_of(options, step))
        step_scaled(program, optimizer, options.clip / norm if options.clip and norm > options.clip else 1.0)
    program.updated()


def rate_of(options: TrainingOptions, step: int) -> float:
    """The learning rate of a step."""
    return learning_rate(
        step,
        peak=options.learning_rate,
        steps=options.steps,
        warm_up=options.warm_up,
        schedule=options.schedule,
        final_fraction=options.final_fraction,
        decay=options.decay,
    )
