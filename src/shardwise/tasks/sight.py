"""What a policy is given, and what an action led to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Outcome", "Sight"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What a policy is given at one step: pixels uint8 (channels, height, width), and what it was told to do."""

    image: NDArray[np.uint8]
    instruction: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What is seen behind an action, whether the episode has ended with it, and whether what was told is done."""

    sight: Sight
    ended: bool
    succeeded: bool
