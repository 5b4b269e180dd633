"""The learning rate of a step: a pure function, so that a resumed run needs no state of a scheduler.

rate  │    ╭──╮
      │   ╱    ╲
      │  ╱      ╰──╮      cosine, to final_fraction of the peak at the last step
      │ ╱          ╰───
      └──────────────────
        warm-up       step
"""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(
    step: int, *, peak: float, steps: int, warm_up: int, schedule: str = "cosine", final_fraction: float = 0.1
) -> float:
    """The rate of step number `step`, counted from 0: linear to `peak` in `warm_up` steps, then the schedule.

    Source of the cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5, one period.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if schedule == "constant":
        return peak
    done = (step - warm_up) / max(1, steps - 1 - warm_up)
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))
