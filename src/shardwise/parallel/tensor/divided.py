"""All units of a model that a rank divides, as one thing: what of a parameter is here, and sums that are still to do.

Knows a `TensorPlan` and one rank of its group; refuses to know replicas, stages and who is asked first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

import torch
import torch.nn as nn

from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.divided_logits import Reads
from shardwise.parallel.tensor.install import Sharding, shard_unit
from shardwise.parallel.tensor.sequence_shard import Region
from shardwise.parallel.tensor.slices import cut, paste
from shardwise.parallel.tensor.sums import sum_shared
from shardwise.parallel.tensor.ties import ties_between

__all__ = ["Divided"]


class Divided:
    """The units `units` of `model`, divided in place as `plan` says; the others are left alone.

    With `keep_logits` heads give `DividedLogits`: whoever sends one to another process makes it whole before, and steps
    run inside `step()`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TensorPlan,
        group: TensorGroup,
        units: Collection[str],
        *,
        keep_logits: bool = False,
    ) -> None:
        self.plan = plan
        self.group = group
        self._reads = Reads()
        self.start_up_errors: Mapping[str, float] = {}  # of units that the ranks have proven once more
        self.shares = any(part.shared for unit in plan.units.values() for part in unit.slices.values())
        self.region = Region(group) if plan.deals_tokens else None  # then every unit is asked what it is given
        chosen = {unit: model.get_submodule(unit) for unit in units if unit in plan.units or self.region is not None}
        ties = ties_between(chosen)
        reads = self._reads if keep_logits else None
        self._shardings: dict[str, Sharding] = {
            unit: shard_unit(
                module, plan.units.get(unit, UnitPlan()), group, ties, keep_logits=reads, region=self.region
            )
            for unit, module in chosen.items()
        }

    @property
    def shard(self) -> int:
        """Which of the ranks that share the units this one is."""
        return self.group.rank

    @property
    def shardings(self) -> Mapping[str, Sharding]:
        """What is installed, by unit."""
        return self._shardings

    def part_of(self, parameter: str) -> Slice | None:
        """The slice of a parameter or buffer, by its name in the model; None where it is whole."""
        return self.plan.slice_of(parameter)

    def cut(self, parameter: str, whole: torch.Tensor) -> torch.Tensor:
        """What of a parameter's whole value belongs on this rank; the value itself where that is all of it."""
        part = self.part_of(parameter)
        return whole if part is None or part.num_ranks == 1 else cut(whole, part, self.shard)

    def counted(self, parameter: str, local: torch.Tensor) -> torch.Tensor | None:
        """What of `local` (a gradient, say) this rank counts: None, if another one counts all of it.

        What several ranks hold is counted by the lowest; elements that others count are zero.
        """
        part = self.part_of(parameter)
        if part is None:
            return local if self.shard == 0 else None
        return paste(local, part, self.shard, owned=True) if part.shared else local

    def sum_shared(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Sum the gradients of what several ranks hold a part of (key/value heads fewer than ranks). Collective."""
        slices = {name: part for name in parameters if (part := self.part_of(name)) is not None and part.shared}
        sum_shared({name: parameters[name] for name in slices}, slices, self.group)

    def step(self) -> contextlib.AbstractContextManager[None]:
        """While the model's forward runs, on all ranks alike: divided logits may be read."""
        return self._reads.on()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The units as they were, divided parameters absent: to be traced, not to be run."""
        with contextlib.ExitStack() as stack:
            for sharding in self._shardings.values():
                stack.enter_context(sharding.off())
            yield

    def close(self) -> None:
        """Forwards and attributes as they were; parameters stay this rank's parts."""
        for sharding in reversed(self._shardings.values()):
            sharding.close()
