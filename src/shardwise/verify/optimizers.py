"""The optimizer of a verification over a program's states, and which parameters it normalises element by element.

What has been divided by its own size says nothing where it was nothing but rounding. Knows a job and a program.
"""

from __future__ import annotations

import torch

from shardwise.execute.program import Program
from shardwise.train.optimizer import optimizer_of, set_rate
from shardwise.train.optimizers.hidden import hidden_matrices
from shardwise.train.optimizers.host_adamw import HostAdamW
from shardwise.verify.job import Job, optimizer_over

__all__ = ["normalised_by", "program_optimizer"]


def program_optimizer(job: Job, program: Program, *, on_host: bool = False) -> torch.optim.Optimizer | None:
    """At its first step; None where nothing is trained on this rank. Collective for Muon."""
    if job.optimizer == "muon":
        made = optimizer_of(program, name="muon", weight_decay=0.01)
        assert made is not None
        set_rate(made, job.learning_rate)
        return made
    held = [state.parameter for state in program.states.values()]
    if held and on_host and job.optimizer == "adamw":
        return HostAdamW([{"params": held, "weight_decay": 0.01}], lr=job.learning_rate)
    return optimizer_over(job, held) if held else None


def normalised_by(job: Job, program: Program) -> bool | frozenset[str]:
    """Whether the optimizer normalises all parameters, or the names of those of this rank that it does."""
    if job.optimizer == "muon":
        return frozenset(program.parameters) - hidden_matrices(program)
    return job.optimizer == "adamw"
