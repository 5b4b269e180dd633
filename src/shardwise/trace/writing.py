"""Writes what has run into a draft: a glue function as a node, a unit call as a node, and how their answers are built.

Refuses to know how they were run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import TreeSpec, tree_flatten

from shardwise.describe.flow import Node, NodeKind
from shardwise.trace.draft import Draft
from shardwise.trace.functions import is_constructor, looks_at_arguments, name_of
from shardwise.trace.running import GlueOp, UnitCall
from shardwise.trace.tape import Fixed, FromArgument, Leaf, Made, Record, Structure

__all__ = ["positions", "write_call", "write_op"]


def write_op(
    draft: Draft,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    op: GlueOp,
    leaves: Sequence[Any],
    spec: TreeSpec,
    *,
    draw: int,
) -> None:
    """A node for a glue function that has answered `leaves`; `draw` is its number among the draws of the glue."""
    index = len(draft.nodes)
    storage = draft.origins.storage
    arguments = tree_flatten((args, kwargs))[0]
    by_storage = {storage(leaf): leaf for leaf in reversed(arguments) if isinstance(leaf, torch.Tensor)}
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    for tensor in tensors if not op.dispatched else ():  # aliased without a dispatched operation
        draft.read(by_storage.get(storage(tensor), tensor), op.touched, None)
    for leaf in arguments if looks_at_arguments(func) else ():
        if isinstance(leaf, torch.Tensor):
            draft.read(leaf, op.touched, None)
    if is_constructor(func):  # zeros_like and the like read metadata only
        op.touched.values.clear()
    # A view made by the function itself (of `x[0] = y`) stands for the argument it is a view of.
    targets = (by_storage.get(storage(tensor), tensor) for tensor in op.written)
    written = list({id(tensor): tensor for tensor in targets}.values())
    given = positions(arguments)
    through = {key: place for key, place in given.items() if all(key != id(tensor) for tensor in written)}
    answer, made = _answer(draft, index, leaves, through)
    makes, writes = _name_written(draft, index, written, made, given)
    for value, tensor in made:
        draft.origins.name(tensor, value, fresh=storage(tensor) not in by_storage)
    kind = NodeKind.OP if tensors or written else NodeKind.READ
    buffers_written = tuple(draft.buffers[id(tensor)] for tensor in written if id(tensor) in draft.buffers)
    draft.nodes.append(
        Node(
            index=index,
            kind=kind,
            name=name_of(func),
            reads=tuple(sorted(op.touched.values)) if makes or kind is NodeKind.READ else (),
            makes=makes,
            parameters=tuple(sorted(op.touched.parameters)),
            buffers=tuple(sorted(op.touched.buffers)),
            keeps_state=bool(buffers_written),
        )
    )
    draft.records.append(
        Record(
            func=func,
            answer=Structure(spec, answer),
            changes=bool(written),
            writes=writes,
            buffers_written=buffers_written,
            random=op.random,
            draw=draw,
            look=_seen(leaves) if kind is NodeKind.READ else None,
        )
    )


def _answer(
    draft: Draft, node: int, leaves: Sequence[Any], given: Mapping[int, int]
) -> tuple[tuple[Leaf, ...], list[tuple[int, torch.Tensor]]]:
    """How the leaves of an answer are built; new values with their tensors. `given` are arguments handed through."""
    answer: list[Leaf] = []
    made: list[tuple[int, torch.Tensor]] = []
    for leaf in leaves:
        if id(leaf) in given:
            answer.append(FromArgument(given[id(leaf)]))
        elif isinstance(leaf, torch.Tensor):
            made.append((draft.value(node, len(made), leaf), leaf))
            answer.append(Made(made[-1][0]))
        else:
            answer.append(Fixed(leaf))
    return tuple(answer), made


def _name_written(
    draft: Draft,
    node: int,
    written: Sequence[torch.Tensor],
    made: Sequence[tuple[int, torch.Tensor]],
    given: Mapping[int, int],
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Every tensor written in place is a new value: all values of the node, and (position of the argument, value)."""
    makes = [value for value, _ in made]
    writes: list[tuple[int, int]] = []
    for tensor in written:
        value = next((value for value, leaf in made if leaf is tensor), None)
        if value is None:
            value = draft.value(node, len(makes), tensor, crossable=False)
            makes.append(value)
        draft.origins.write(tensor, value)
        draft.origins.name(tensor, value)
        if id(tensor) in given:
            writes.append((given[id(tensor)], value))
    return tuple(makes), tuple(writes)


def write_call(draft: Draft, call: UnitCall, out: object, *, host_random: bool) -> None:
    """Fill in the node and the record of a unit call that has answered `out`."""
    leaves, spec = tree_flatten(out)
    answer, made = _answer(draft, call.node, leaves, positions(call.arguments))
    for value, tensor in made:
        draft.origins.name(tensor, value)
    draft.nodes[call.node] = dataclasses.replace(
        draft.nodes[call.node],
        reads=tuple(sorted(call.touched.values)),
        makes=tuple(value for value, _ in made),
        parameters=tuple(sorted(call.touched.parameters)),
        buffers=tuple(sorted(call.touched.buffers)),
    )
    record = draft.records[call.node]
    record.answer = Structure(spec, answer)
    record.random = call.random
    record.host_random = host_random
    record.changes = call.changes


def positions(arguments: Sequence[object]) -> dict[int, int]:
    """id -> place among flattened arguments, of everything that has an identity."""
    return {id(leaf): place for place, leaf in enumerate(arguments) if not _plain(leaf)}


def _plain(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, (bool, int, float, str, bytes, torch.dtype, torch.device))


def _seen(leaves: Sequence[object]) -> object:
    return tuple(leaf.tobytes() if isinstance(leaf, np.ndarray) else leaf for leaf in leaves)
