"""Puts tensors in place of a module's own: parameters, buffers and plain attributes.

It knows modules. What the tensors are worth, whole or a slice, fake or real, is known to the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.errors import ModelError

__all__ = ["as_before", "held_tensors", "named_tensors", "place", "replace"]


def place(module: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Replaces the parameters and buffers named in `values`, wherever the module holds them.

    A parameter stays an `nn.Parameter` with its `requires_grad` and the attributes set on it; tied ones stay
    tied, under whichever of their names the value comes. Shapes are the caller's affair: a slice may replace
    a whole. Raises ModelError for an unknown name, and for tied names that are given different tensors.
    """
    present = named_tensors(module)
    replaced: dict[int, torch.Tensor] = {}
    given: dict[int, tuple[str, torch.Tensor]] = {}
    for name, value in values.items():
        if name not in present:
            raise ModelError(f"the model has no parameter or buffer {name!r}; it has {_few(present)}")
        old = present[name]
        other, tensor = given.setdefault(id(old), (name, value))
        if tensor is not value:
            raise ModelError(f"{other!r} and {name!r} are tied, but were given two tensors; give one for both")
        if id(old) not in replaced:
            replaced[id(old)] = as_before(old, value)
    replace(module, replaced)


def replace(module: nn.Module, replaced: Mapping[int, torch.Tensor]) -> None:
    """Puts `replaced[id(tensor)]` where the module holds `tensor`, also in lists and dicts of attributes."""
    for child in module.modules():
        tables: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) in replaced:
                    table[name] = replaced[id(tensor)]
        for name, leaves, spec in held_tensors(child):
            if any(id(leaf) in replaced for leaf in leaves):
                child.__dict__[name] = tree_unflatten([replaced.get(id(leaf), leaf) for leaf in leaves], spec)


def as_before(old: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` in the role of `old`: a parameter or not, `requires_grad`, the attributes set on it."""
    if isinstance(old, nn.Parameter):
        new: torch.Tensor = nn.Parameter(value.detach(), requires_grad=old.requires_grad)
    else:
        new = value.detach().requires_grad_(old.requires_grad)
    for name, attribute in vars(old).items():
        if name not in _own_attributes(old):
            setattr(new, name, attribute)
    return new


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, then all buffers, by name; tied ones under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict(parameters) | dict(module.named_buffers(remove_duplicate=False))


def held_tensors(module: nn.Module) -> Iterator[tuple[str, list[Any], Any]]:
    """The module's plain attributes that are or contain tensors: name, leaves and their structure."""
    for name, attribute in list(vars(module).items()):
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        leaves, spec = tree_flatten(attribute)
        if any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            yield name, leaves, spec


def _own_attributes(tensor: torch.Tensor) -> frozenset[str]:
    """What a tensor holds by being what it is, as opposed to what a model's author has set on it."""
    if not isinstance(tensor, FakeTensor):
        return frozenset({"_is_param"})
    return frozenset(vars(tensor.fake_mode.from_tensor(torch.empty(0)))) | {"_is_param"}


def _few(names: Mapping[str, object]) -> str:
    return ", ".join(list(names)[:5]) + (", ..." if len(names) > 5 else "")
