"""Eager DiLoCo: the outer update of a round takes the others' progress of the round before, and its own as it is.

    gradient of worker k = own / n + (mean(sent) - sent / n)         of n workers; sent: `own` of the round before

Exchanges overlap with a whole round. Workers differ by what has not arrived yet; besides their own they keep the
weights that the outer optimizer makes of complete means, the same on all of them, to be evaluated and saved. Source:
Kale, Douillard and Donchev, "Eager updates for overlapped communication and computation in DiLoCo", arXiv:2502.12996.
"""

from __future__ import annotations

import dataclasses

import torch

from shardwise.train.asynchronous.outer_sgd import OuterSGD
from shardwise.train.asynchronous.rule import Kept

__all__ = ["EagerDiLoCo"]


@dataclasses.dataclass(frozen=True, slots=True)
class EagerDiLoCo:
    """A `Rule` of `num_workers` with the outer optimizer `outer`."""

    outer: OuterSGD
    num_workers: int
    stale = True
    common: tuple[str, ...] = ("complete", "complete_velocity")
    own: tuple[str, ...] = ("velocity",)

    def begin(self, weights: torch.Tensor) -> Kept:
        """See `Rule`."""
        kept = {"start": weights.clone(), "complete": weights.clone()}
        return kept | {name: torch.zeros_like(weights) for name in ("velocity", "complete_velocity")}

    def end_round(self, kept: Kept, *, now: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        gradient = own / self.num_workers
        if mean is not None:
            gradient.add_(mean).sub_(kept["sent"], alpha=1 / self.num_workers)
            self.outer.step(kept["complete"], kept["complete_velocity"], mean)
        self.outer.step(kept["start"], kept["velocity"], gradient)

    def settle(self, kept: Kept, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        if mean is not None:
            self.outer.step(kept["complete"], kept["complete_velocity"], mean)
        kept["start"].copy_(kept["complete"])
        kept["velocity"].copy_(kept["complete_velocity"])
