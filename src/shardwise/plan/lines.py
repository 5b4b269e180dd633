"""An estimate line by line: where the bytes of a rank and the seconds of a step go. Sums of named numbers."""

from __future__ import annotations

import dataclasses

__all__ = ["MemoryLines", "TimeLines"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemoryLines:
    """Bytes of one rank at the peak of a step."""

    parameters: float = 0.0
    gradients: float = 0.0
    masters: float = 0.0  # float32 copies of what is held in fewer bits
    optimizer: float = 0.0
    activations: float = 0.0  # kept for the backward at the schedule's peak
    transient: float = 0.0  # alive only while one unit computes: recomputed activations, workspaces
    logits: float = 0.0  # with the loss and their gradient
    buffers: float = 0.0  # of communication: what is whole of divided states, messages on their way
    framework: float = 0.0
    slack: float = 0.0  # fragments

    @property
    def total(self) -> float:
        held = self.parameters + self.gradients + self.masters + self.optimizer + self.buffers
        return held + self.activations + self.transient + self.logits + self.framework + self.slack


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TimeLines:
    """Seconds of one rank in a step, as they follow each other: what is hidden behind compute is in none of them."""

    compute: float = 0.0  # kernels of forwards and backwards
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pipeline: float = 0.0  # messages that somebody waited for
    bubble: float = 0.0
    replicas: float = 0.0  # sums of gradients and gathered parameters that show
    optimizer: float = 0.0
    host: float = 0.0  # the program's own time

    @property
    def total(self) -> float:
        return float(sum(getattr(self, field.name) for field in dataclasses.fields(self)))
