"""The mean loss of a step, summed over all ranks.

    one pipeline on one host    loss stage ── behind the step, through shared memory ──► the others
    else                        every rank ── all-reduce while the last backwards run ──► every rank

Knows what each micro-batch weighs, not how a loss is computed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.same_host_group import SameHostGroup

__all__ = ["MeanLoss"]


class MeanLoss:
    """The mean loss of a step, summed over all ranks: behind the step through `group`, which costs next to nothing, or
    while the last backwards run."""

    def __init__(
        self,
        factors: Sequence[float],
        *,
        device: torch.device,
        alone: bool,
        shards: int,
        group: SameHostGroup | None = None,
        positions: Collection[int] = (),
    ) -> None:
        self._group = group  # one replica: places in the group are positions in the pipeline
        self._positions = sorted(positions)  # that know losses
        self._factors = [factor / shards for factor in factors]  # every shard of a stage knows the same losses
        self._alone = alone
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._pending: dist.Work | None = None
        self._losses: Mapping[int, torch.Tensor] = {}

    def start(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Begin, with the losses that this rank has; every rank calls it once a step."""
        if self._group is not None:  # nothing to begin: the backwards go first
            self._losses = losses
            return
        self._add(losses)
        if not self._alone:
            self._pending = dist.all_reduce(self._sum, async_op=True)

    def _add(self, losses: Mapping[int, torch.Tensor]) -> None:
        weighed = {m: loss for m, loss in losses.items() if self._factors[m]}  # a mean over no label is 0 / 0
        if weighed:
            factors = torch.tensor([self._factors[m] for m in weighed], dtype=torch.float64, device=self._sum.device)
            self._sum = torch.stack(list(weighed.values())).to(factors).dot(factors)

    def wait(self) -> float:
        """The sum. Behind everything that the step sends: messages of a pair of ranks keep their order."""
        self._add(self._losses)
        if self._group is not None and len(self._positions) == 1:
            self._group.broadcast(self._sum, self._positions[0])
        elif self._group is not None:
            self._group.all_reduce(self._sum)
        if self._pending is not None:
            self._pending.wait()
        return float(self._sum.item())
