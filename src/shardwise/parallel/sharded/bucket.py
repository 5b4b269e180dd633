"""A bucket on one rank: a flat tensor that the parameters are views of, and the part of it that is this rank's.

    at rest     own part │ ──gather──►  flat: part 0 │ part 1 │ … ──free──► no storage, same tensors
                  ▲ optimizer            w0  w0  w0  b0  w1  w1

A parameter stays the same object with the same versions, and so does what autograd has saved of it: only the memory
behind them comes and goes. Where parameters are whole all the time (`frees=False`), the own part is a view of `flat`.
With masters the own part is in float32, and `flat` in what the model computes with. Knows tensors and one group;
refuses to know who needs what when, and gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.comm.collective import Collective
from shardwise.comm.point_to_point import Waitable
from shardwise.parallel.sharded.buckets import BucketPlan, Run
from shardwise.parallel.sharded.memory import memory_for
from shardwise.parallel.states import State

__all__ = ["Bucket"]


class Bucket:
    """The `parameters` of a plan, in its order, whose values move into it. `masters`: their float32 values, by name,
    where the parameters are in another dtype. `stages`: those that hold them, on any rank."""

    def __init__(
        self,
        plan: BucketPlan,
        parameters: Sequence[nn.Parameter],
        group: Collective,
        *,
        frees: bool,
        stages: tuple[int, ...] = (0,),
        masters: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.plan = plan
        self.parameters = tuple(parameters)
        self.group = group
        self.sums = group  # what sums gradients
        self.frees = frees
        self.stages = stages
        first = self.parameters[0]
        self.trained = first.requires_grad
        self._memory = memory_for(plan.numel, like=first, group=group, frees=frees)
        self.flat = self._memory.flat
        self.is_common = self._memory.is_common  # what ranks write reaches others at the next barrier
        self.runs: dict[str, Run] = plan.runs(group.rank, group.size)
        shapes = [tuple(parameter.shape) for parameter in self.parameters]
        self._own_values(masters or {})
        self.states: dict[str, State] = {}
        for name, shape in zip(plan.names, shapes, strict=True):
            run = self.runs.get(name)
            if run is not None:
                own = nn.Parameter(self.own[run.at : run.at + run.numel], requires_grad=self.trained)
                self.states[name] = State(parameter=own, shape=shape, start=run.start)
        self._under_way: Waitable | None = None
        self.is_whole = True
        if frees:
            self.free()

    def _own_values(self, masters: Mapping[str, torch.Tensor]) -> None:
        """Moves the parameters into `flat`, and makes the own part."""
        part = self._memory.part
        wide = self.flat.new_zeros(part.stop - part.start, dtype=torch.float32) if masters else None
        here = self.flat[part]
        for name, start, parameter in zip(self.plan.names, self.plan.starts, self.parameters, strict=True):
            view = self.flat[start : start + parameter.numel()].view(parameter.shape)
            run = self.runs.get(name)
            if not self.is_common:
                view.copy_(parameter.data)
            elif run is not None:
                here[run.at : run.at + run.numel].copy_(parameter.data.reshape(-1)[run.start : run.start + run.numel])
            parameter.data = view
            if wide is not None and run is not None:
                value = masters[name].reshape(-1)[run.start : run.start + run.numel]
                wide[run.at : run.at + run.numel].copy_(value)
        self.own = self._memory.at_rest() if wide is None else wide

    def gather(self) -> None:
        """Begin to make the parameters whole, where they are not. Collective."""
        if not self.is_whole:
            self._under_way = self._memory.gather(self.own)
            self.is_whole = True

    def wait(self) -> None:
        """Until the parameters are whole."""
        if self._under_way is not None:
            work, self._under_way = self._under_way, None
            work.wait()

    def free(self) -> None:
        """Keep the own part alone."""
        if self.frees and self.is_whole:
            self.wait()
            self._memory.free()
            self.is_whole = False

    @torch.no_grad()
    def refresh(self) -> None:
        """The own part has new values: begin to make the others see them. Collective; `wait()` is its end."""
        assert not (self.frees and self.is_whole), "parameters are updated at rest"
        self._under_way = self._memory.refresh(self.own)
