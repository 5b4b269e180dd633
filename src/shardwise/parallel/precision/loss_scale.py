"""The number by which a loss is multiplied so that small gradients are not lost in float16.

    overflow ──► scale / 2, the step is skipped          `window` good steps in a row ──► scale * 2

Knows a number and how it moves (Micikevicius et al. 2018, section 3.2); refuses to know gradients. All ranks tell it
the same norm, which is not finite on any of them if a gradient overflowed on one, so that all skip the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardwise.errors import CheckpointError

__all__ = ["FIRST", "LossScale"]

FIRST = 2.0**16
_SMALLEST, _LARGEST = 2.0**-24, 2.0**40


class LossScale:
    """`value` is that of the step under way; `accepts` is told the norm of every step, once, before its update."""

    def __init__(self, value: float = FIRST, *, dynamic: bool = True, window: int = 2000) -> None:
        self.value = float(value)
        self.dynamic = dynamic
        self.window = window
        self.good_steps = 0  # since it last moved
        self.skipped_steps = 0

    def accepts(self, norm: float) -> bool:
        """Whether the update of a step with gradients of this norm is made; the scale of the next step follows."""
        if not math.isfinite(norm):
            self.skipped_steps += 1
            self.good_steps = 0
            if self.dynamic:
                self.value = max(_SMALLEST, self.value / 2)
            return False
        self.good_steps += 1
        if self.dynamic and self.good_steps >= self.window:
            self.value, self.good_steps = min(_LARGEST, self.value * 2), 0
        return True

    def to_state(self) -> dict[str, float]:
        """What a checkpoint keeps of it."""
        return {"value": self.value, "good_steps": self.good_steps, "skipped_steps": self.skipped_steps}

    def from_state(self, state: Mapping[str, object]) -> None:
        """Go on from what a checkpoint kept. A constant scale stays what it is. Raises `CheckpointError`."""
        numbers = {name: state.get(name) for name in ("value", "good_steps", "skipped_steps")}
        value, good, skipped = (each if isinstance(each, int | float) else None for each in numbers.values())
        if value is None or good is None or skipped is None:
            raise CheckpointError(
                f"a loss scale is saved as value, good_steps and skipped_steps, but {dict(state)} was; save it again"
            )
        self.good_steps, self.skipped_steps = int(good), int(skipped)
        if self.dynamic:
            self.value = float(value)
