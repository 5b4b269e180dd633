"""What a unit leaves behind besides its output: hooked activations, attributes, containers that it fills.

Where the unit runs these are picked up to be sent; where it is absent its collectors are fed, in the trace's order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from shardwise.errors import DataflowError
from shardwise.trace.extras import follow
from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, Made, Record

__all__ = ["feed", "pick_up", "watched"]

Modules = Mapping[str, nn.Module]
ValueOf = Callable[[int], torch.Tensor]


@contextlib.contextmanager
def watched(modules: Modules, record: Record, taken: dict[int, torch.Tensor]) -> Iterator[None]:
    """Take extra outputs from the hooked modules inside a present unit, in the order of the trace, into `taken`."""
    by_number: dict[int, list[tuple[int, AtHook]]] = {}
    for value, place in record.extras.items():
        if isinstance(place, AtHook):
            by_number.setdefault(place.number, []).append((value, place))
    if not by_number:
        yield
        return
    count = [0]

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            number = next(i for i in range(count[0], len(record.hooked)) if record.hooked[i].module == name)
            count[0] = number + 1
            for value, place in by_number.get(number, ()):
                taken[value] = tree_flatten(output if place.in_output else args)[0][place.leaf]

        return hook

    handles = [modules[name].register_forward_hook(watch(name)) for name in {call.module for call in record.hooked}]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pick_up(modules: Modules, record: Record, value: int, what: str, args: Any, kwargs: Any) -> torch.Tensor:
    """The extra output `value` from where a unit that has run left it. Raises `DataflowError` if it is not there."""
    place = record.extras[value]
    found: Any = None
    match place:
        case AtAttribute(module, name, path):
            found = follow(getattr(modules[module], name), path)
        case AtArgument(path, key):
            found = follow((args, kwargs), path)[key]
        case AtHook():
            found = None
    if not isinstance(found, torch.Tensor):
        raise DataflowError(
            f"{what} is taken from {place}, which holds {type(found).__name__}: the forward took another path than "
            "when it was traced"
        )
    return found


def feed(
    modules: Modules, record: Record, unit: str, stage: int, value_of: ValueOf, args: Sequence[Any], kwargs: Any
) -> None:
    """Feed the collectors of an absent unit in order: hooks inside it, attributes it sets, containers it fills."""
    arguments = tree_flatten((args, kwargs))[0]
    for value, place in record.extras.items():
        match place:
            case AtAttribute(owner, name, path):
                _leave(modules[owner], name, path, value_of(value))
            case AtArgument(path, key):
                box = follow((args, kwargs), path)
                if isinstance(box, list):
                    box.insert(key, value_of(value))  # type: ignore[arg-type]
                else:
                    box[key] = value_of(value)
            case AtHook():
                pass
    for hooked in record.hooked:
        module = modules[hooked.module]
        given = hooked.arguments.build(arguments, value_of)
        output = hooked.output.build(arguments, value_of)
        wanted = any(isinstance(leaf, Made) for leaf in hooked.output.leaves)
        for hook_id, hook in list(module._forward_hooks.items()):
            try:
                if hook_id in module._forward_hooks_with_kwargs:
                    hook(module, given, {}, output)
                else:
                    hook(module, given, output)
            except DataflowError as error:
                if wanted or record.out_of_reach:
                    raise DataflowError(
                        f"a hook on {hooked.module} computes with what unit {unit} made, and stage {stage} does not "
                        "hold that; let the hook keep the tensor as it is, and compute with it in the model"
                    ) from error


def _leave(module: nn.Module, name: str, path: Sequence[object], tensor: torch.Tensor) -> None:
    if not path:
        setattr(module, name, tensor)
        return
    box = getattr(module, name, None)
    key = path[0]
    if isinstance(box, dict):
        box[key] = tensor
    elif isinstance(box, list) and isinstance(key, int):
        if key < len(box):
            box[key] = tensor
        else:
            box.append(tensor)
    else:
        raise DataflowError(f"attribute {name!r} of an absent unit is a {type(box).__name__}; it cannot be filled")
