"""A plan of a narrow instance of a block as the plan of a wide one: every number grows as the size that it divides.

    narrow  q|k|v of 48, rank 0: [0, 8) [16, 24) [32, 40)      ──×16──►   wide  q|k|v of 768: [0, 128) [256, 384) …

That packed parts grow alike is a guess, which whoever lifts has to prove on a second instance. Knows plans and two
instances of one class; refuses to know how they were made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.errors import LayoutError
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.flops_share import on_meta, without_values
from shardwise.parallel.tensor.instance import Call, tensors_of
from shardwise.parallel.tensor.propose import argument_names
from shardwise.parallel.tensor.prove import Draws
from shardwise.trace.placing import named_tensors

__all__ = ["lifted", "misfit_of_instances"]


def misfit_of_instances(narrow: Kind, wide: Kind) -> str:
    """Why one is no narrow instance of the other; "" where it is: same modules, tensors, signatures but for sizes."""
    if [type(module) for module in narrow.module.modules()] != [type(module) for module in wide.module.modules()]:
        return "it has other modules"
    if {n: t.dim() for n, t in named_tensors(narrow.module).items()} != {
        n: t.dim() for n, t in named_tensors(wide.module).items()
    }:
        return "it has other tensors"
    if sorted(map(_signature, narrow.calls)) != sorted(map(_signature, wide.calls)):
        return "it is called with other arguments"
    return ""


def _signature(call: Call) -> str:
    tensors = [(tensor.dim(), str(tensor.dtype)) for tensor in call.tensors]
    return repr((tensors, sorted(call.requires_grad), sorted(call.kwargs), call.read and sorted(call.read)))


def lifted(plan: UnitPlan, narrow: Kind, wide: Kind) -> UnitPlan:
    """`plan` of `narrow` for `wide`, with the narrow one's proof. Raises `LayoutError` where a number cannot grow."""
    lift = _Lift(narrow, wide)
    return dataclasses.replace(
        plan,
        gathers={name: lift.features(name, part) for name, part in plan.gathers.items()},
        joins={name: lift.features(name, part) for name, part in plan.joins.items()},
        alone={name: lift.features(name, part) for name, part in plan.alone.items()},
        cuts={name: lift.features(name, part) for name, part in plan.cuts.items()},
        ends={name: lift.end(name, num) for name, num in plan.ends.items()},
        slices={name: lift.tensor(name, part) for name, part in plan.slices.items()},
        inputs={name: lift.argument(name, part) for name, part in plan.inputs.items()},
        outputs={place: lift.made("output", place, part) for place, part in plan.outputs.items()},
        draws={number: lift.made("draw", number, part) for number, part in plan.draws.items()},
        attributes={place: lift.attribute(place, values) for place, values in plan.attributes.items()},
    )


class _Lift:
    def __init__(self, narrow: Kind, wide: Kind) -> None:
        self._narrow, self._wide = narrow, wide
        self._tensors = (named_tensors(narrow.module), named_tensors(wide.module))

    def tensor(self, name: str, part: Slice) -> Slice:
        few, many = (tensors[name].shape[part.dim] for tensors in self._tensors)
        return _grown(name, part, Fraction(many, few))

    def features(self, module: str, part: Slice) -> Slice:
        """A slice of what a module reads or makes: it grows as the side of its weight that has so many elements."""
        start = f"{module}." if module else ""
        ratios = {
            Fraction(self._tensors[1][name].shape[dim], size)
            for name, tensor in self._tensors[0].items()
            if name.startswith(start) and "." not in name[len(start) :]
            for dim, size in enumerate(tensor.shape)
            if size == part.size
        }
        return _grown(module, part, _only(module, ratios))

    def argument(self, name: str, part: Slice) -> Slice:
        sizes = [_argument(kind, name).shape[part.dim] for kind in (self._narrow, self._wide)]
        if sizes[0] != part.size:
            raise LayoutError(f"argument {name} has {sizes[0]} elements along a dim that is divided as {part.size}")
        return _grown(name, part, Fraction(sizes[1], sizes[0]))

    def made(self, what: str, place: int, part: Slice) -> Slice:
        """A slice of a returned tensor, or of what is drawn: it grows as that dim of the tensor."""
        (few, samples), (many, others) = (_shape(kind, what, place) for kind in (self._narrow, self._wide))
        dim = part.dim % len(few)
        if few[dim] == part.size:
            return _grown(f"{what} {place}", part, Fraction(many[dim], few[dim]))
        if dim or few[0] != samples * part.size or many[0] % others:
            raise LayoutError(f"{what} {place} has {few[dim]} elements along a dim that is divided as {part.size}")
        return _grown(f"{what} {place}", part, Fraction(many[0] // others, part.size))

    def _attributes(self) -> list[tuple[int, int]]:
        modules = zip(self._narrow.module.modules(), self._wide.module.modules(), strict=True)
        return [
            (value, vars(wide)[name])
            for few, wide in modules
            for name, value in vars(few).items()
            if type(value) is int and type(vars(wide).get(name)) is int and value > 0
        ]

    def end(self, module: str, num: int) -> int:
        ratios = {Fraction(wide, few) for few, wide in self._attributes() if few == num}
        return _whole(module, num * _only(module, ratios))

    def attribute(self, place: tuple[str, str], values: tuple[Any, ...]) -> tuple[Any, ...]:
        few, many = (_value(kind.module, place) for kind in (self._narrow, self._wide))
        name = ".".join(part for part in place if part)
        if type(few) is not int or type(many) is not int or not few:
            raise LayoutError(f"{name} is {few!r} in the narrow instance and {many!r} in the wide one")
        return tuple(value if value is None else _whole(name, value * Fraction(many, few)) for value in values)


def _shape(kind: Kind, what: str, place: int) -> tuple[tuple[int, ...], int]:
    """The shape of a returned tensor or of a draw of the first call, run without numbers; and the number of samples."""
    unit, call, draws = without_values(kind.module), kind.calls[0], Draws()
    args, kwargs = tree_map(on_meta, (call.args, dict(call.kwargs)))
    with _Still(), draws, torch.no_grad():
        out = unit.train()(*args, **kwargs)
    shapes = draws.shapes if what == "draw" else [tuple(tensor.shape) for tensor in tensors_of(out)]
    samples = next((tensor.shape[0] for tensor in call.tensors if tensor.is_floating_point() and tensor.dim()), 1)
    return shapes[place], samples


class _Still(TorchFunctionMode):
    """Attention without its dropout, which has no kernel without numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


def _value(unit: nn.Module, place: tuple[str, str]) -> Any:
    own, _, inner = place[1].partition(".")
    value = vars(unit.get_submodule(place[0]))[own]
    return getattr(value, inner) if inner else value


def _argument(kind: Kind, name: str) -> Any:
    call = kind.calls[0]
    place = next(place for place, known in argument_names(kind.module, call).items() if known == name)
    return tensors_of((call.args, dict(call.kwargs)))[place]


def _grown(what: str, part: Slice, ratio: Fraction) -> Slice:
    return Slice(
        dim=part.dim,
        size=_whole(what, part.size * ratio),
        ranges=tuple(tuple((_whole(what, a * ratio), _whole(what, b * ratio)) for a, b in r) for r in part.ranges),
    )


def _whole(what: str, number: Fraction | int) -> int:
    if Fraction(number).denominator != 1:
        raise LayoutError(
            f"what is divided of {what} in the narrow instance has no whole number in the wide one: {number}"
        )
    return int(number)


def _only(what: str, ratios: set[Fraction]) -> Fraction:
    if len(ratios) != 1:
        told = ", ".join(map(str, sorted(ratios))) or "nothing"
        raise LayoutError(f"what {what} has in parts grows by {told}; it must grow by one number")
    return next(iter(ratios))
