"""What leaves a unit other than by its return value: attributes set, containers filled, tensors taken by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, HookedCall, Made, Place

__all__ = ["changed_attributes", "containers_of", "follow", "grown_containers", "place_of"]

_OWN = frozenset({"_parameters", "_buffers", "_modules"})


def _attribute_tensors(module: nn.Module) -> dict[tuple[nn.Module, str, tuple[object, ...]], torch.Tensor]:
    found: dict[tuple[nn.Module, str, tuple[object, ...]], torch.Tensor] = {}
    for part in module.modules():
        for name, value in vars(part).items():
            if name in _OWN or name == "forward":
                continue
            if isinstance(value, torch.Tensor):
                found[(part, name, ())] = value
            elif isinstance(value, (list, tuple)):
                for place, element in enumerate(value):
                    if isinstance(element, torch.Tensor):
                        found[(part, name, (place,))] = element
            elif isinstance(value, dict):
                for key, element in value.items():
                    if isinstance(element, torch.Tensor):
                        found[(part, name, (key,))] = element
    return found


def changed_attributes(module: nn.Module, names: Mapping[nn.Module, str]) -> Callable[[], dict[int, Place]]:
    """Look at the tensors among a unit's attributes now; the answer tells which are new when it is called."""
    before = {key: id(tensor) for key, tensor in _attribute_tensors(module).items()}

    def after() -> dict[int, Place]:
        return {
            id(tensor): AtAttribute(names[part], name, path)
            for (part, name, path), tensor in _attribute_tensors(module).items()
            if before.get((part, name, path)) != id(tensor) and part in names
        }

    return after


def containers_of(tree: Any, path: tuple[object, ...] = ()) -> list[tuple[tuple[object, ...], Any]]:
    """Lists and dictionaries inside a structure of tuples, lists and dictionaries, with their paths."""
    found: list[tuple[tuple[object, ...], Any]] = []
    if isinstance(tree, (list, dict)):
        found.append((path, tree))
    if isinstance(tree, (list, tuple)):
        for place, element in enumerate(tree):
            found.extend(containers_of(element, (*path, place)))
    elif isinstance(tree, dict):
        for key, element in tree.items():
            found.extend(containers_of(element, (*path, key)))
    return found


def grown_containers(arguments: Any) -> Callable[[], dict[int, Place]]:
    """Look at the lists and dictionaries among the arguments now; the answer tells what was put into them since."""
    boxes = containers_of(arguments)
    before = [(path, box, set(range(len(box))) if isinstance(box, list) else set(box)) for path, box in boxes]

    def after() -> dict[int, Place]:
        grown: dict[int, Place] = {}
        for path, box, keys in before:
            for key in range(len(box)) if isinstance(box, list) else list(box):
                if key not in keys and isinstance(box[key], torch.Tensor):
                    grown[id(box[key])] = AtArgument(path, key)
        return grown

    return after


def place_of(value: int, tensor: torch.Tensor, hooked: Sequence[HookedCall], left: Mapping[int, Place]) -> Place | None:
    """Where the extra output `value` can be picked up, and put down elsewhere; None if nowhere."""
    for number, call in enumerate(hooked):
        for in_output, structure in ((True, call.output), (False, call.arguments)):
            for leaf, answer in enumerate(structure.leaves):
                if isinstance(answer, Made) and answer.value == value:
                    return AtHook(number, leaf, in_output)
    return left.get(id(tensor))


def follow(tree: Any, path: Sequence[object]) -> Any:
    """The element of a structure at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def leaves_of(tree: object) -> list[Any]:
    """The leaves of a structure."""
    return list(tree_flatten(tree)[0])
