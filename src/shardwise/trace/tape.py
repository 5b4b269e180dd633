"""The live half of a trace: for every node of a dataflow, what was called and how its answer is built elsewhere.

`Tape.records[i]` belongs to `Tape.flow.nodes[i]`. It knows functions and structures; sizes and edges are in the
dataflow, values are nowhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_unflatten

from shardwise.describe.flow import Dataflow
from shardwise.trace.absent import Absent
from shardwise.trace.memos import Memo

__all__ = [
    "AtArgument",
    "AtAttribute",
    "AtHook",
    "Fixed",
    "FromArgument",
    "HookedCall",
    "Made",
    "Place",
    "Record",
    "Tape",
    "Unseen",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """A leaf that is a value of the dataflow: received if it crosses to this stage, absent otherwise."""

    value: int


@dataclasses.dataclass(frozen=True, slots=True)
class FromArgument:
    """A leaf that is the call's own argument, handed through; `position` among the flattened arguments."""

    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """A leaf that is no tensor, the same in every call of this signature."""

    value: object


@dataclasses.dataclass(frozen=True, slots=True)
class Unseen:
    """A tensor that nobody outside the unit reads: always absent elsewhere."""

    stand_in: Absent


Leaf = Made | FromArgument | Fixed | Unseen


@dataclasses.dataclass(frozen=True, slots=True)
class Structure:
    """A structure of leaves: how to build an answer."""

    spec: TreeSpec
    leaves: tuple[Leaf, ...]

    def build(self, arguments: Sequence[object], value: Callable[[int], object]) -> Any:
        """The structure with its leaves filled in: `value` answers value indices."""
        filled: list[object] = []
        for leaf in self.leaves:
            match leaf:
                case Made(index):
                    filled.append(value(index))
                case FromArgument(position):
                    filled.append(arguments[position])
                case Fixed(constant):
                    filled.append(constant)
                case Unseen(stand_in):
                    filled.append(stand_in)
        return tree_unflatten(filled, self.spec)


@dataclasses.dataclass(frozen=True, slots=True)
class HookedCall:
    """A call, inside a unit, of a module that has forward hooks: where the unit is absent its hooks are still fed."""

    module: str  # name relative to the model
    arguments: Structure
    output: Structure


@dataclasses.dataclass(frozen=True, slots=True)
class AtHook:
    """An extra output is leaf `leaf` of the output (or the arguments) of the unit's hooked call number `number`."""

    number: int
    leaf: int
    in_output: bool


@dataclasses.dataclass(frozen=True, slots=True)
class AtAttribute:
    """An extra output is left in attribute `name` of a module, at `path` inside it."""

    module: str
    name: str
    path: tuple[object, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class AtArgument:
    """An extra output is put into a list or dictionary among the arguments: at `key` of the container `position`."""

    path: tuple[object, ...]
    key: object


Place = AtHook | AtAttribute | AtArgument


@dataclasses.dataclass(slots=True)
class Record:
    """What one node did. `func` is the torch function of glue, None for a unit call."""

    func: Any
    answer: Structure
    hooked: tuple[HookedCall, ...] = ()
    extras: Mapping[int, Place] = dataclasses.field(default_factory=dict)  # value -> where it is left
    changes: bool = False  # writes into a tensor that existed before
    writes: tuple[tuple[int, int], ...] = ()  # (position among the flattened arguments, value it becomes)
    out_of_reach: bool = False  # something it made is read outside, and is not left where it can be picked up
    touches: tuple[int, ...] = ()  # values made before it that share the memory it writes
    buffers_written: tuple[str, ...] = ()
    written_later: bool = False  # something it made is overwritten later: a send must copy
    random: bool = False  # draws from a torch generator
    draw: int = 0  # glue: its number among the draws of the glue, which does not depend on how samples are dealt
    host_random: bool = False  # draws from numpy or `random`
    look: object = None  # of a READ: what Python saw


@dataclasses.dataclass(slots=True)
class Tape:
    """A dataflow, what it takes to run a part of it, and the units it speaks of."""

    flow: Dataflow
    records: list[Record]
    stand_ins: list[Absent]  # one for every value
    queries: frozenset[Any]  # functions that neither read nor make tensors: never recorded
    units: tuple[str, ...]
    host_random: bool = False  # glue draws from numpy or `random`
    memos: tuple[Memo, ...] = ()  # empty when the forward was recorded; to be so whenever it is followed

    @property
    def random(self) -> bool:
        """Whether anything in the forward draws random numbers."""
        return self.host_random or any(record.random or record.host_random for record in self.records)

    @property
    def looks(self) -> tuple[tuple[int, object], ...]:
        """What Python saw where it looked at values, in order: (node, value)."""
        return tuple((i, record.look) for i, record in enumerate(self.records) if record.look is not None)


def stand_in(what: str, tensor: torch.Tensor) -> Absent:
    """An absent tensor with the metadata of `tensor`."""
    return Absent(
        what=what,
        shape=tensor.shape,
        dtype=tensor.dtype,
        device=tensor.device,
        strides=tensor.stride() if tensor.layout is torch.strided else None,
        requires_grad=tensor.requires_grad,
    )
