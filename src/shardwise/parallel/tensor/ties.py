"""Tensors with several names: an embedding that is also the head is one tensor in two units, and one part of it here.

    embed.weight ─┐                        embed.weight ─┐
                  ├─ whole     ──cut once──►             ├─ part of rank t
    head.weight  ─┘                        head.weight  ─┘

Knows modules and names; refuses to know who divides them, and how.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn as nn

from shardwise.trace.placing import named_tensors

__all__ = ["Tied", "Ties", "names_of", "ties_between"]


@dataclasses.dataclass(slots=True)
class Tied:
    """A tensor of several units: the whole, its part once a unit has cut it, and the whole without values."""

    whole: torch.Tensor
    part: torch.Tensor | None = None
    shown: torch.Tensor | None = None


Ties = Mapping[int, Tied]  # id of the whole -> what has become of it


def ties_between(units: Mapping[str, nn.Module]) -> dict[int, Tied]:
    """The tensors that stand in several of these units."""
    first: dict[int, str] = {}
    ties: dict[int, Tied] = {}
    for unit, module in units.items():
        for tensor in named_tensors(module).values():
            if first.setdefault(id(tensor), unit) != unit:
                ties[id(tensor)] = Tied(tensor)
    return ties


def names_of(model: nn.Module) -> dict[int, list[str]]:
    """Parameter, by id -> its names, that of `named_parameters` first; a module with two names counts under one."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{path}.{leaf}" if path else leaf)
    return names
