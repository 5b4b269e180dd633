"""Local SGD: every round ends at the mean of the workers' weights.

    next start = start - mean(own) = mean(now)

With one step a round and plain gradient descent inside, this is synchronous data parallelism. Source: Stich, "Local SGD
converges fast and communicates little", ICLR 2019; workers weighed by what they have seen as in McMahan et al.,
"Communication-efficient learning of deep networks from decentralized data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

import dataclasses

import torch

from shardwise.train.asynchronous.rule import Kept

__all__ = ["LocalSGD"]


@dataclasses.dataclass(frozen=True, slots=True)
class LocalSGD:
    """A `Rule`."""

    stale = False
    common: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    def begin(self, weights: torch.Tensor) -> Kept:
        """See `Rule`."""
        return {"start": weights.clone()}

    def end_round(self, kept: Kept, *, now: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        assert mean is not None
        kept["start"].sub_(mean)

    def settle(self, kept: Kept, mean: torch.Tensor | None) -> None:
        """Every round ends so."""
