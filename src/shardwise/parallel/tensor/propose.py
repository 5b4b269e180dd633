"""Groups as a plan of one unit, still without attributes: which modules are copied into, forked, reduced, cut.

Knows which dims of a layer's tensors hold its out and in features.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence

import torch.nn as nn

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.groups import Group
from shardwise.parallel.tensor.instance import Call, tensors_of
from shardwise.parallel.tensor.layers import Layer, layer_of
from shardwise.parallel.tensor.products import Product

__all__ = ["argument_names", "plan_of"]


def plan_of(unit: nn.Module, groups: Sequence[Group], call: Call, *, tp: int) -> UnitPlan:
    """The plan that divides these groups."""
    modules = dict(unit.named_modules())
    slices: dict[str, Slice] = {}
    inputs: dict[str, Slice] = {}
    names = argument_names(unit, call)
    for group in groups:
        for column, part in group.columns.items():
            if column in group.products:
                slices.update(_of_product(column, group.products[column], part))
            else:
                slices.update(_column(column, modules[column], part))
        for row in group.rows:
            if row in group.products:
                dim = group.products[row].in_dim
                slices[row] = Slice.even(dim, unit.get_parameter(row).shape[dim], tp)
                continue
            layer = _layer(modules[row])
            width = layer.num_in(modules[row])
            slices[f"{row}.weight"] = Slice.even(layer.in_dim, width, tp)
        slices.update(group.tensors)
        for name, part in group.tensors.items():
            slices.update(_buffers_beside(modules, name, part))
        inputs.update({names[place]: part for place, part in group.arguments.items() if place in names})
    once = frozenset(name for group in groups for name in group.once)
    products = {name: _role(name, group) for group in groups for name in group.products}
    copies = tuple(c for group in groups for c in (*group.columns, *group.closed) if c not in group.forked)
    reduces = tuple(row for group in groups for row in (*group.rows, *group.closed))
    return UnitPlan(
        copies=tuple(name for name in copies if name not in products),
        forks=tuple(sorted(name for group in groups for name in group.forks if name not in products)),
        reduces=tuple(name for name in reduces if name not in products),
        products={name: role for name, role in products.items() if role},
        heads=tuple(name for group in groups for name in group.heads),
        gathers={name: part for group in groups for name, part in group.gathers.items()},
        slices=slices,
        partial=once,
        once=once,
        inputs=inputs,
    )


def _role(name: str, group: Group) -> str:
    if name in group.rows:
        return "row"
    if name in group.forks:
        return "fork"
    return "" if name in group.forked else "column"


def _of_product(name: str, product: Product, part: Slice) -> dict[str, Slice]:
    slices = {name: dataclasses.replace(part, dim=product.out_dim)}
    return {**slices, product.bias: dataclasses.replace(part, dim=0)} if product.bias else slices


def argument_names(unit: nn.Module, call: Call) -> dict[int, str]:
    """Place among the call's tensors -> parameter of `forward`, for tensors that are an argument themselves."""
    parameters = list(inspect.signature(unit.forward).parameters)
    found: dict[int, str] = {}
    place = 0
    for name, value in (*zip(parameters, call.args, strict=False), *call.kwargs.items()):
        tensors = tensors_of(value)
        if len(tensors) == 1 and tensors[0] is value and name in parameters:
            found[place] = name
        place += len(tensors)
    return found


def _layer(module: nn.Module) -> Layer:
    layer = layer_of(module)
    assert layer is not None
    return layer


def _column(name: str, module: nn.Module, part: Slice) -> dict[str, Slice]:
    layer = _layer(module)
    slices = {f"{name}.weight": Slice(dim=layer.out_dim, size=part.size, ranges=part.ranges)}
    if module._parameters.get("bias") is not None:
        slices[f"{name}.bias"] = Slice(dim=0, size=part.size, ranges=part.ranges)
    return slices


def _buffers_beside(modules: dict[str, nn.Module], name: str, part: Slice) -> dict[str, Slice]:
    """Running statistics follow the weight that they stand beside."""
    owner, _, _ = name.rpartition(".")
    module = modules[owner]
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return {}
    return {
        f"{owner}.{leaf}": part
        for leaf, buffer in module._buffers.items()
        if buffer is not None and buffer.dim() == 1 and buffer.shape[0] == part.size
    }
