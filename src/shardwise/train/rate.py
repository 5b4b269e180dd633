"""The learning rate of a step: a pure function, so that a resumed run needs no state of a scheduler.

rate  │    ╭──╮              cosine, linear   to final_fraction of the peak at the last step
      │   ╱    ╲             wsd              stays at the peak, and falls in the last `decay` steps
      │  ╱      ╰──╮         inverse-sqrt     peak · √(warm_up / step): falls for ever, needs no last step
      │ ╱          ╰───      constant
      └──────────────────
        warm-up       step
"""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(
    step: int,
    *,
    peak: float,
    steps: int,
    warm_up: int,
    schedule: str = "cosine",
    final_fraction: float = 0.1,
    decay: int = 0,
) -> float:
    """The rate of step number `step`, counted from 0: linear to `peak` in `warm_up` steps, then the schedule.

    decay: the steps in which "wsd" falls, linearly; 0: a fifth of all. Sources: cosine: Loshchilov and Hutter, "SGDR",
    ICLR 2017, equation 5, one period; inverse-sqrt: Vaswani et al. 2017, section 5.3; wsd: Hu et al. 2024
    (arXiv:2404.06395), section 4.
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if schedule == "constant":
        return peak
    if schedule == "inverse-sqrt":
        first = max(1, warm_up)
        return peak * math.sqrt(first / max(first, step + 1))
    first = warm_up
    if schedule == "wsd":
        first = max(warm_up, steps - (decay or max(1, steps // 5)))
        if step < first:
            return peak
        done = min(1.0, (step - first + 1) / (steps - first))  # the last step has the final rate
    else:
        done = min(1.0, (step - first) / max(1, steps - 1 - first))
    falls = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return peak * (final_fraction + (1 - final_fraction) * falls)
