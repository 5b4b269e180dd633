"""What the blocks of a model are made of, read from the parameters of their matrix products. Knows no names of models.

A weight counts as

    convolution   of a convolution layer
    recurrence    of a recurrent layer of torch; or of a module that has a depthwise convolution over time of its own:
                  a state-space mixer, or what is built like one
    matmul        everything else with two dims or more: attention, MLPs, experts

Blocks and tables are those of `plan_tensor`'s share: elements of lists of modules; embeddings apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch.nn as nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["CONVOLUTION", "MATMUL", "RECURRENCE", "Weight", "block_weights", "weights_by_kind"]

MATMUL, CONVOLUTION, RECURRENCE = "matmul", "convolution", "recurrence"


@dataclasses.dataclass(frozen=True, slots=True)
class Weight:
    """What a weight is, and how large."""

    kind: str
    num_elements: int


def weights_by_kind(model: nn.Module) -> dict[str, int]:
    """Kind -> elements of the weights of matrix products in blocks."""
    found = dict.fromkeys((MATMUL, CONVOLUTION, RECURRENCE), 0)
    for weight in block_weights(model).values():
        found[weight.kind] += weight.num_elements
    return found


def block_weights(model: nn.Module) -> dict[str, Weight]:
    """The weights of matrix products in blocks, by name; of the whole model where it has no blocks."""
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    modules = dict(model.named_modules())
    blocks: dict[str, Weight] = {}
    everything: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in tables:
            continue
        owners = _owners(modules, name)
        everything[name] = Weight(_kind(owners), parameter.numel())
        if any(isinstance(owner, (nn.ModuleList, nn.ModuleDict, nn.Sequential)) for owner in owners[1:]):
            blocks[name] = everything[name]
    return blocks or everything


def _owners(modules: Mapping[str, nn.Module], parameter: str) -> list[nn.Module]:
    """The module that has the parameter, the one around it, and so on."""
    path = parameter.split(".")[:-1]
    return [modules[".".join(path[:depth])] for depth in range(len(path), -1, -1)]


def _kind(owners: list[nn.Module]) -> str:
    if isinstance(owners[0], _ConvNd):
        return CONVOLUTION
    if isinstance(owners[0], nn.RNNBase) or any(_mixes_time(owner) for owner in owners[:2]):
        return RECURRENCE
    return MATMUL


def _mixes_time(module: nn.Module) -> bool:
    """Whether a depthwise convolution over one dim is one of its own layers."""
    return any(
        isinstance(child, nn.Conv1d) and child.groups == child.in_channels == child.out_channels > 1
        for child in module.children()
    )
