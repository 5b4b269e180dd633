"""Which parameters a rank holds. The others become absent: name, shape, dtype and device, no storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.describe.flow import Dataflow
from shardwise.plan.cut import Cut
from shardwise.trace.absent import absent_parameter

__all__ = ["hold", "holders_of", "take_own"]


def holders_of(
    model: nn.Module, flow: Dataflow, cut: Cut, units: Sequence[str], placement: Mapping[tuple[str, int], int]
) -> dict[str, tuple[int, ...]]:
    """Parameter name -> the stages that hold it, in ascending order; every parameter has at least one.

    A stage holds what its unit calls and its glue read; a parameter that nobody reads belongs to its unit's stage, or
    to stage 0.
    """
    stages_of: dict[str, set[int]] = {name: set() for name, _ in model.named_parameters()}
    for plan in cut.stages:
        for name in plan.parameters:
            stages_of[name].add(plan.stage)
    of_unit: dict[str, set[int]] = {}
    for (unit, _), stage in placement.items():
        of_unit.setdefault(unit, set()).add(stage)
    for name, parameter in model.named_parameters():
        for unit, stages in of_unit.items():
            if name.startswith(unit + "."):
                stages_of[name] |= stages if parameter.requires_grad or not stages_of[name] else set()
        if not stages_of[name]:
            stages_of[name] = {0}
    return {name: tuple(sorted(stages)) for name, stages in stages_of.items()}


def hold(model: nn.Module, names: Collection[str], *, device: torch.device | None = None) -> None:
    """Make every parameter outside `names` absent, in place, on `device` or its own; ties stay ties."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    absent: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or canonical[id(parameter)] in names:
                continue
            if id(parameter) not in absent:
                absent[id(parameter)] = absent_parameter(
                    name=canonical[id(parameter)],
                    shape=parameter.shape,
                    dtype=parameter.dtype,
                    device=device or parameter.device,
                    requires_grad=parameter.requires_grad,
                )
            module._parameters[leaf] = absent[id(parameter)]


def take_own(model: nn.Module, names: Collection[str], *, device: torch.device) -> None:
    """Give the parameters `names`, and all buffers, storage of their own on `device`: what came may be shared."""
    moved: dict[int, nn.Parameter] = {}
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or canonical.get(id(parameter)) not in names:
                continue
            if id(parameter) not in moved:
                own = parameter.detach().to(device, copy=True)
                moved[id(parameter)] = nn.Parameter(own, requires_grad=parameter.requires_grad)
            module._parameters[leaf] = moved[id(parameter)]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = buffer.detach().to(device, copy=True)
