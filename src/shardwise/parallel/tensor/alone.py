"""Layers that no group takes, divided by columns by themselves: what they make is joined right behind them.

    x ──copy──► columns of rank t ──► y_t ──joined──► y        whatever stands around the layer runs whole

It costs an all-gather more than a pair of columns and rows, and saves as much memory and as many flops. Layers that are
small beside their model stay whole. Knows one kind of unit and its plan so far; proven like all else.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping

import torch.nn as nn

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.instance import random_copy
from shardwise.parallel.tensor.layers import Layer, layer_of
from shardwise.parallel.tensor.prove import Wholes, prove
from shardwise.parallel.tensor.slices import spread
from shardwise.parallel.tensor.whole_numbers import with_whole_numbers

__all__ = ["divide_alone"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SMALLEST = 1 / 256  # of the parameters of a model's matrix products, all units that are alike together


def divide_alone(
    kind: Kind, plan: UnitPlan | None, reason: str, *, tp: int, total: int, dead: Collection[str] = ()
) -> tuple[UnitPlan | None, str]:
    """`plan` and `reason` of a kind, with the layers divided that `plan` leaves whole and that can be by themselves.

    `total` are the parameters of all matrix products of the model, `dead` parameters that no call uses (a proof would
    say nothing of them). What is not proven stays whole.
    """
    layers = _candidates(kind, plan or UnitPlan(), tp, total, dead) if kind.calls else {}
    if not layers:
        return plan, reason
    unit = random_copy(kind.module)
    kind = dataclasses.replace(kind, calls=with_whole_numbers(unit, kind.calls))
    base = plan or UnitPlan()
    done: set[str] = set()
    wholes = Wholes()
    pending = [tuple(layers)]
    while pending:  # all at once; where that is not equal, each half of them
        names = pending.pop()
        proven = _proven(kind, unit, _with(base, {name: layers[name] for name in names}, unit), tp, wholes)
        if proven is not None:
            base = proven
            done.update(names)
        elif len(names) > 1:
            pending += [names[len(names) // 2 :], names[: len(names) // 2]]
    return (base, _without(reason, done, everything=len(done) == _num_layers(kind.module))) if done else (plan, reason)


def _candidates(kind: Kind, plan: UnitPlan, tp: int, total: int, dead: Collection[str]) -> dict[str, Slice]:
    """Layers that the plan leaves whole, with the slice of their out features."""
    found: dict[str, Slice] = {}
    for name, module in kind.module.named_modules():
        layer = _layer_of(module, tp)
        own = f"{name}.weight" if name else "weight"
        if layer is None or not isinstance(module._parameters.get("weight"), nn.Parameter):
            continue
        taken = own in dead or own in plan.slices or own in plan.partial or name in plan.reduces
        shared = own in kind.tied or own in kind.foreign
        size = module._parameters["weight"].numel() * len(kind.units)
        if not taken and not shared and layer.num_out(module) >= tp and size >= _SMALLEST * total:
            found[name] = spread(layer.out_dim, layer.num_out(module), tp)
    return found


def _layer_of(module: nn.Module, tp: int) -> Layer | None:
    """As `layer_of`; convolutions in groups too, where every rank gets as many groups, and transposed ones."""
    if isinstance(module, _CONVOLUTIONS) and module.groups > 1 and module.groups % tp == 0:
        return Layer(out_dim=0, in_dim=1, features=-1 - len(module.kernel_size))
    if isinstance(module, _TRANSPOSED) and module.groups == 1:
        return Layer(out_dim=1, in_dim=0, features=-1 - len(module.kernel_size))
    return layer_of(module)


def _num_layers(unit: nn.Module) -> int:
    more = (*_CONVOLUTIONS, *_TRANSPOSED)
    return sum(layer_of(module) is not None or isinstance(module, more) for module in unit.modules())


def _with(base: UnitPlan, layers: Mapping[str, Slice], unit: nn.Module) -> UnitPlan:
    slices, alone, cuts, attributes = dict(base.slices), dict(base.alone), dict(base.cuts), dict(base.attributes)
    copies = list(base.copies)
    for name, part in layers.items():
        module = unit.get_submodule(name)
        layer = _layer_of(module, part.num_ranks)
        assert layer is not None
        if isinstance(module, _CONVOLUTIONS) and module.groups > 1:  # a rank's groups read their own channels alone
            cuts[name] = Slice.even(layer.features, int(module.in_channels), part.num_ranks)
            attributes[name, "groups"] = (int(module.groups) // part.num_ranks,) * part.num_ranks
        else:
            copies.append(name)
        start = f"{name}." if name else ""
        slices[f"{start}weight"] = part
        if module._parameters.get("bias") is not None:
            slices[f"{start}bias"] = dataclasses.replace(part, dim=0)
        alone[name] = dataclasses.replace(part, dim=layer.features)
    return dataclasses.replace(base, copies=tuple(copies), cuts=cuts, attributes=attributes, slices=slices, alone=alone)


def _proven(kind: Kind, unit: nn.Module, plan: UnitPlan, tp: int, wholes: Wholes) -> UnitPlan | None:
    plan = dataclasses.replace(plan, proof=None)
    try:
        for seed, (training, call) in enumerate(itertools.product((True, False), kind.calls), start=1):
            plan, _ = prove(unit, call, plan, tp=tp, training=training, seed=seed, wholes=wholes)
    except Exception:  # it differs, or whatever a model raises of sizes that do not fit
        return None
    return plan


def _without(reason: str, done: Collection[str], *, everything: bool) -> str:
    """The reasons of the layers that are still whole, and why others are joined where they might have been a group."""
    kept: list[str] = []
    joined: dict[str, list[str]] = {}
    for part in reason.split("; "):
        name, _, why = part.partition(": ")
        if part and name not in done and not everything:
            kept.append(part)
        elif "cannot be divided" in why or why.startswith(("not proven", "a share of it")):
            joined.setdefault(why, []).append(name)
    return "; ".join([*kept, *(f"what {', '.join(names)} makes, joined: {why}" for why, names in joined.items())])
