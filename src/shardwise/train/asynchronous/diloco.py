"""DiLoCo: the mean of what workers have done in a round is a gradient for an outer optimizer with momentum.

    next start = start - outer update (mean(own))

Source: Douillard et al., "DiLoCo: distributed low-communication training of language models", arXiv:2311.08105,
algorithm 1 (inner AdamW, outer Nesterov).
"""

from __future__ import annotations

import dataclasses

import torch

from shardwise.train.asynchronous.outer_sgd import OuterSGD
from shardwise.train.asynchronous.rule import Kept

__all__ = ["DiLoCo"]


@dataclasses.dataclass(frozen=True, slots=True)
class DiLoCo:
    """A `Rule` with the outer optimizer `outer`."""

    outer: OuterSGD
    stale = False
    common: tuple[str, ...] = ("velocity",)
    own: tuple[str, ...] = ()

    def begin(self, weights: torch.Tensor) -> Kept:
        """See `Rule`."""
        return {"start": weights.clone(), "velocity": torch.zeros_like(weights)}

    def end_round(self, kept: Kept, *, now: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        assert mean is not None
        self.outer.step(kept["start"], kept["velocity"], mean)

    def settle(self, kept: Kept, mean: torch.Tensor | None) -> None:
        """Every round ends so."""
