"""What workers do with each other's progress when a round ends: a `Rule`, one a file.

    round t of worker k      start ── H optimizer steps of its own ──► now      own = start - now: what it has done
                             next start = a function of start, now, own and the mean of `own` over workers

All tensors are flat, in float32 or wider, and live where the rank has them: a rule sees no ranks and no parameters.
A `stale` rule gets the mean of the round before, which travelled while this one was computed.
"""

from __future__ import annotations

from typing import Protocol

import torch

__all__ = ["Kept", "Rule"]

Kept = dict[str, torch.Tensor]  # by name; "start" is where the round began, "sent" the last `own` of a stale rule


class Rule(Protocol):
    """How workers are brought together. Values are kept in `Kept`, the rule has none."""

    @property
    def stale(self) -> bool:
        """Whether means are applied one round late."""
        ...

    @property
    def common(self) -> tuple[str, ...]:
        """What it keeps that is the same on every worker, besides what `start` says."""
        ...

    @property
    def own(self) -> tuple[str, ...]:
        """What it keeps that is every worker's own, besides what `start` and `sent` say."""
        ...

    def begin(self, weights: torch.Tensor) -> Kept:
        """What is kept when training begins at `weights`."""
        ...

    def end_round(self, kept: Kept, *, now: torch.Tensor, own: torch.Tensor, mean: torch.Tensor | None) -> None:
        """Write the next start. `mean` is over workers, of this round, or, where the rule is stale, of the round
        before; None in the first."""
        ...

    def settle(self, kept: Kept, mean: torch.Tensor | None) -> None:
        """Bring `kept["start"]` to the weights that all workers together stand for: to be evaluated, saved, and gone on
        from. `mean` is that of `kept["sent"]`, where the rule is stale and something was sent."""
        ...
