"""A model whose experts are divided: parts of parameters in place of whole ones, forwards that exchange rows.

The same code runs in training and in the proof. Installed behind what divides units among shards, so that a shard of
an expert is what stays here. Knows a plan and one rank of its group; refuses to know how the plan was found.
"""

from __future__ import annotations

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan, Experts, Listed, Ordered, Stacked, runs_of_experts
from shardwise.describe.tensor import Slice
from shardwise.errors import ModelError
from shardwise.parallel.expert.groups import ExpertGroup
from shardwise.parallel.expert.listed import ListedExperts
from shardwise.parallel.expert.load import Loads
from shardwise.parallel.expert.ordered import ordered_forward
from shardwise.parallel.expert.stacked import stacked_forward
from shardwise.parallel.switched import Switched
from shardwise.parallel.tensor.slices import cut, local_shape
from shardwise.trace.absent import Absent, absent_parameter
from shardwise.trace.placing import as_before, replace

__all__ = ["DividedExperts"]


class DividedExperts(Switched):
    """The experts of `model`, divided in place as `plan` says. `off()` shows them whole, `close()` ends it."""

    def __init__(self, model: nn.Module, plan: ExpertPlan, group: ExpertGroup) -> None:
        super().__init__(model)
        self.plan = plan
        self.group = group
        self.loads = Loads()
        self._model = model
        self._slices = plan.slices()
        self._owners = {
            f"{name}.{leaf}": owner
            for name, owner in plan.owners().items()
            for leaf, _ in self._module(name).named_parameters()
        }
        self._replaced: dict[int, torch.Tensor] = {}
        number = 0
        for unit, experts in plan.units.items():
            for each in experts:
                self._divide(unit, each, number)
                number += 1
        replace(model, self._replaced)
        self._replaced = {}

    # -- what is where --------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """Which of the ranks that divide the experts this one is."""
        return self.group.rank

    def slice_of(self, parameter: str) -> Slice | None:
        """The slice of a parameter along the experts; None where it has none."""
        return self._slices.get(parameter)

    def holds(self, parameter: str) -> bool:
        """Whether this rank has the parameter, or a part of it."""
        return self._owners.get(parameter, self.rank) == self.rank

    def divides(self, parameter: str) -> bool:
        """Whether ranks of the group have different parts of the parameter, or not all of them have it."""
        return parameter in self._slices or parameter in self._owners

    def cut(self, parameter: str, whole: torch.Tensor) -> torch.Tensor:
        """What of a value belongs on this rank; the value itself where that is all of it."""
        part = self._slices.get(parameter)
        return whole if part is None else cut(whole, part, self.rank)

    # -- division -------------------------------------------------------------------------------

    def _divide(self, unit: str, experts: Experts, number: int) -> None:
        layer = ".".join(name for name in (unit, experts.module) if name)
        self.loads.declare(layer, experts.num_experts)
        if not isinstance(experts, Listed):
            self._divide_stacked(layer, experts, number)
        else:
            self._divide_listed(unit, layer, experts, number)

    def _divide_stacked(self, layer: str, experts: Stacked | Ordered, number: int) -> None:
        module = self._module(layer)
        start, stop = runs_of_experts(experts.num_experts, self.group.size)[self.rank]
        for leaf in experts.parameters:
            name, whole = f"{layer}.{leaf}" if layer else leaf, module._parameters.get(leaf)
            if whole is None or whole.shape[0] != experts.num_experts or name not in self._slices:
                raise ModelError(
                    f"experts are divided once: {layer} has no parameter {leaf} of {experts.num_experts} experts here "
                    f"({'none' if whole is None else list(whole.shape)}); where tp divides the same ones, use ep or tp"
                )
            self._replaced[id(whole)] = as_before(whole, _part(name, whole, self._slices[name], self.rank))
            self._wholes[name] = _without_values(name, whole)
        for attribute in experts.attributes:
            self._attributes.append((module, attribute, vars(module)[attribute], stop - start))
            module.__dict__[attribute] = stop - start
        if isinstance(experts, Stacked):
            forward = stacked_forward(module, experts, self.group, self.loads, layer=layer, number=number)
        else:
            forward = ordered_forward(module, experts, self.group, self.loads, layer=layer, number=number)
        self._forwards.wrap(module, forward)

    def _divide_listed(self, unit: str, layer: str, experts: Listed, number: int) -> None:
        names = [".".join(name for name in (unit, member) if name) for member in experts.members]
        members = [self._module(name) for name in names]
        listed = ListedExperts(members, experts, self.group, self.loads, layer=layer, number=number)
        for expert, member in enumerate(members):
            self._forwards.wrap(member, listed.member(expert))
        caller = self._module(".".join(name for name in (unit, experts.caller) if name))
        self._forwards.wrap(caller, listed.caller(caller.forward))
        for name, member in zip(names, members, strict=True):
            for leaf, parameter in member.named_parameters():
                if not self.holds(f"{name}.{leaf}"):
                    self._replaced[id(parameter)] = _without_values(f"{name}.{leaf}", parameter)

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"a plan names modules that there are: the model has no {name!r}") from None


def _part(name: str, whole: nn.Parameter, part: Slice, rank: int) -> torch.Tensor:
    shape = local_shape(whole.shape, part, rank)
    if isinstance(whole, Absent):
        return absent_parameter(
            name=name, shape=shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
        )
    if whole.device.type == "meta":
        return torch.empty(shape, dtype=whole.dtype, device="meta")
    return cut(whole.detach(), part, rank)


def _without_values(name: str, whole: nn.Parameter) -> nn.Parameter:
    return absent_parameter(
        name=name, shape=whole.shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
    )
