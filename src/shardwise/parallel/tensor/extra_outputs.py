"""What a unit leaves outside of its return value and somebody reads there: picked up where it is left.

A router's logits that a hook takes for the loss, an attribute that glue looks up, an element of a list that is an
argument. Knows the places that a trace notes; refuses to know what is done with the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from shardwise.trace.extras import follow
from shardwise.trace.tape import AtArgument, AtAttribute, AtHook, Record, Tape

__all__ = ["AtModule", "Extra", "Left", "extras_of", "picked_up"]

Left = Callable[[Any], dict[str, torch.Tensor]]


@dataclasses.dataclass(frozen=True, slots=True)
class AtModule:
    """Leaf `leaf` of what the module returns (or is given) in its call number `call` within one call of the unit."""

    module: str
    call: int
    leaf: int
    in_output: bool


Extra = AtModule | AtAttribute | AtArgument  # names of modules relative to the unit


def extras_of(tape: Tape, unit: str) -> frozenset[Extra]:
    """The places of what a unit's calls leave and somebody reads. What is left nowhere (`out_of_reach`) has none."""
    found: set[Extra] = set()
    for node in tape.flow.calls:
        if node.name != unit:
            continue
        record = tape.records[node.index]
        for place in record.extras.values():
            extra = _relative(_at_module(place, record) if isinstance(place, AtHook) else place, unit)
            if extra is not None:
                found.add(extra)
    return frozenset(found)


def _at_module(place: AtHook, record: Record) -> AtModule:
    module = record.hooked[place.number].module
    call = sum(earlier.module == module for earlier in record.hooked[: place.number])
    return AtModule(module, call, place.leaf, place.in_output)


def _relative(place: Extra, unit: str) -> Extra | None:
    """The same place with the module's name as the unit knows it; None where it is a module of somebody else."""
    if isinstance(place, AtArgument):
        return place
    if place.module == unit:
        return dataclasses.replace(place, module="")
    inside = place.module.startswith(f"{unit}.")
    return dataclasses.replace(place, module=place.module[len(unit) + 1 :]) if inside else None


@contextlib.contextmanager
def picked_up(unit: nn.Module, extras: Collection[Extra]) -> Iterator[Left]:
    """While `unit` is called once. The answer takes the arguments, and gives what was left by what it is."""
    calls: dict[str, list[tuple[list[Any], list[Any]]]] = {}
    handles = []
    for module in {extra.module for extra in extras if isinstance(extra, AtModule)}:
        seen = calls.setdefault(module, [])

        def note(_: nn.Module, args: Any, out: Any, seen: list[tuple[list[Any], list[Any]]] = seen) -> None:
            seen.append((tree_flatten(args)[0], tree_flatten(out)[0]))

        handles.append(unit.get_submodule(module).register_forward_hook(note))

    def left(arguments: Any) -> dict[str, torch.Tensor]:
        found = {_told(extra): _found(extra, unit, calls, arguments) for extra in sorted(extras, key=repr)}
        return {what: tensor for what, tensor in found.items() if isinstance(tensor, torch.Tensor)}

    try:
        yield left
    finally:
        for handle in handles:
            handle.remove()


def _found(extra: Extra, unit: nn.Module, calls: dict[str, list[tuple[list[Any], list[Any]]]], arguments: Any) -> Any:
    """What stands there; None where this call has left nothing."""
    try:
        if isinstance(extra, AtModule):
            return calls[extra.module][extra.call][extra.in_output][extra.leaf]
        if isinstance(extra, AtAttribute):
            return follow(vars(unit.get_submodule(extra.module))[extra.name], extra.path)
        return follow(arguments, extra.path)[extra.key]
    except LookupError:
        return None


def _told(extra: Extra) -> str:
    if isinstance(extra, AtModule):
        what = "output" if extra.in_output else "input"
        return f"{what} {extra.leaf} of call {extra.call} of {extra.module or 'the unit'}"
    if isinstance(extra, AtAttribute):
        return f"attribute {'.'.join(part for part in (extra.module, extra.name) if part)}{[*extra.path] or ''}"
    return f"argument {[*extra.path, extra.key]}"
