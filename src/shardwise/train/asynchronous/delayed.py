"""Delayed averaging: what workers have done in a round is averaged while the next one is computed.

    next start = now + (sent - mean(sent))           sent: `own` of the round before

A worker keeps its own progress, and that of the round before is replaced by everybody's. Where all of it has arrived,
every worker stands at W0 - (the sum of all means). Source: Zhou et al., "DaSGD: squeezing SGD parallelization
performance in distributed training using delayed averaging", arXiv:2006.00441, with the delay of one round.
"""

from __future__ import annotations

import dataclasses

import torch

from shardwise.train.asynchronous.rule import Kept

__all__ = ["DelayedAveraging"]


@dataclasses.dataclass(frozen=True, slots=True)
class DelayedAveraging:
    """A `Rule`."""

    stale = True
    common: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    def begin(self, weights: torch.Tensor) -> Kept:
        """See `Rule`."""
        return {"start": weights.clone()}

    def end_round(self, kept: Kept, *, now: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        kept["start"].copy_(now)
        if mean is not None:
            kept["start"].add_(kept["sent"]).sub_(mean)

    def settle(self, kept: Kept, mean: torch.Tensor | None) -> None:
        """See `Rule`."""
        if mean is not None:
            kept["start"].add_(kept["sent"]).sub_(mean)
