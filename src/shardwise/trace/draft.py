"""The dataflow while it is written: nodes, values, and which value a tensor is.

Every tensor is a value, a tensor still inside the unit that made it, a parameter, a buffer, or free (the batch and
what is computed from it alone). Refuses to know how functions are run and how answers are built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from shardwise.describe.flow import Node, Value
from shardwise.trace.origins import Born, Origin, Origins
from shardwise.trace.running import Touched, UnitCall
from shardwise.trace.tape import Record

__all__ = ["Draft"]


class Draft:
    """`parameters` and `buffers` are names by id(tensor); `records[i]` belongs to `nodes[i]`."""

    def __init__(self, *, parameters: Mapping[int, str], buffers: Mapping[int, str]) -> None:
        self.parameters = dict(parameters)
        self.buffers = dict(buffers)
        self.origins = Origins()
        self.nodes: list[Node] = []
        self.records: list[Record] = []
        self.values: list[Value] = []
        self.tensors: list[torch.Tensor] = []  # of each value, for its metadata
        self.calls: dict[int, UnitCall] = {}  # node -> call, in order

    def value(self, node: int, leaf: int, tensor: torch.Tensor, *, crossable: bool = True) -> int:
        """A new value: output `leaf` of `node`."""
        index = len(self.values)
        self.values.append(
            Value(
                index=index,
                node=node,
                leaf=leaf,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                nbytes=tensor.numel() * tensor.element_size(),
                requires_grad=tensor.requires_grad,
                crossable=crossable,
            )
        )
        self.tensors.append(tensor)
        return index

    def stays(self, value: int) -> None:
        """`value` may not cross between stages."""
        self.values[value] = dataclasses.replace(self.values[value], crossable=False)

    def read(self, tensor: torch.Tensor, touched: Touched, inside: int | None) -> None:
        """Note in `touched` what reading `tensor` reads; `inside` is the node of the unit that runs, or None."""
        name = self.parameters.get(id(tensor))
        if name is not None and self.origins.value_of(tensor) is None:  # a view that glue made is a value of its own
            touched.parameters.add(name)
            return
        buffer = self.buffers.get(id(tensor))
        if buffer is not None:
            touched.buffers.add(buffer)
        for origin in self.origins.of(tensor):
            value = self.resolved(tensor, origin, inside)
            if value is not None:
                touched.values.add(value)

    def resolved(self, tensor: torch.Tensor, origin: Origin, inside: int | None) -> int | None:
        """The value that an origin of `tensor` is to a reader; None for what was made by the unit that reads it."""
        if isinstance(origin, int):
            return None if inside is not None and self.values[origin].node == inside else origin
        return None if origin.node == inside else self._promoted(tensor, origin)

    def _promoted(self, tensor: torch.Tensor, origin: Born) -> int:
        """Made inside a unit and read outside of it: an extra output of that call."""
        call = self.calls[origin.node]
        for value, known in call.promoted.items():
            if known is tensor:
                return value
        node = self.nodes[call.node]
        value = self.value(call.node, len(node.makes), tensor)
        self.nodes[call.node] = dataclasses.replace(node, makes=(*node.makes, value))
        call.promoted[value] = tensor
        self.origins.name(tensor, value)
        return value

    def view(self, tensor: torch.Tensor, base: torch.Tensor) -> None:
        """`tensor` is a view of `base`: it has its origin and its name."""
        self.origins.alias(tensor, base)
        for names in (self.parameters, self.buffers):
            if id(base) in names:
                names[id(tensor)] = names[id(base)]
