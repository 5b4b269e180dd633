"""What a run measured of itself, step by step, as one value. Knows numbers; refuses to know where they were read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

__all__ = ["RunMeasured"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunMeasured:
    """Medians over steps behind the first two of a run; None, or no entry, where nothing was measured.

    steps: that counted; recorded: steps whose actions were. spread: half of the middle half of steps, as a share.
    memory[rank]: bytes at the peak of a step. actions[kind][stage]: seconds of one action. waiting[place]: seconds of a
    step in which a rank there computed nothing. forward_s, backward_s[(source, target)]: of a message, as far as its
    reader waited for it. sums_s: for sums of gradients behind the last action; optimizer_s; data_s: until the step had
    its samples. traffic[rank]: bytes that it sent in a step, by kind.
    """

    steps: int = 0
    recorded: int = 0
    step_s: float | None = None
    spread: float = 0.0
    pipeline_s: float | None = None
    sums_s: float | None = None
    optimizer_s: float | None = None
    data_s: float | None = None
    memory: Mapping[int, int] = dataclasses.field(default_factory=dict)
    actions: Mapping[str, Mapping[int, float]] = dataclasses.field(default_factory=dict)
    waiting: Mapping[int, float] = dataclasses.field(default_factory=dict)
    forward_s: Mapping[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    backward_s: Mapping[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    traffic: Mapping[int, Mapping[str, int]] = dataclasses.field(default_factory=dict)
