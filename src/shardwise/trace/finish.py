"""From a draft to the tape: where extra outputs are picked up, what may not cross because it is overwritten.

Runs once, when the forward is over and every reader is known. Refuses to know how anything was run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from shardwise.describe.flow import Dataflow
from shardwise.trace.draft import Draft
from shardwise.trace.extras import place_of
from shardwise.trace.origins import Born, Origin
from shardwise.trace.running import UnitCall
from shardwise.trace.tape import Fixed, FromArgument, HookedCall, Leaf, Made, Place, Structure, Tape, Unseen, stand_in
from shardwise.trace.writing import positions

__all__ = ["finished"]


def finished(draft: Draft, results: object, *, units: Sequence[str], queries: Collection[Any]) -> Tape:
    """The tape of a draft; `results` are the tensors that the caller needs, as a rule the loss."""
    wanted: set[int] = set()
    for leaf in tree_flatten(results)[0]:
        if isinstance(leaf, torch.Tensor):
            found = (draft.resolved(leaf, origin, None) for origin in draft.origins.of(leaf))
            wanted.update(value for value in found if value is not None)
    for call in draft.calls.values():
        _place_extras(draft, call)
    _mind_aliases(draft)
    return Tape(
        flow=Dataflow(nodes=tuple(draft.nodes), values=tuple(draft.values), results=tuple(sorted(wanted))),
        records=draft.records,
        stand_ins=[
            stand_in(f"{draft.nodes[value.node].label} output {value.leaf}", tensor)
            for value, tensor in zip(draft.values, draft.tensors, strict=True)
        ],
        queries=frozenset(queries),
        units=tuple(units),
    )


def _place_extras(draft: Draft, call: UnitCall) -> None:
    """Say of every extra output of a call where it is left; what is left nowhere may not cross."""
    record = draft.records[call.node]
    structure = _structures(draft, call)
    record.hooked = tuple(HookedCall(h.module, structure(h.arguments), structure(h.output)) for h in call.hooked)
    extras: dict[int, Place] = {}
    for value, tensor in call.promoted.items():
        place = place_of(value, tensor, record.hooked, call.left)
        if place is None:
            record.out_of_reach = True
            draft.stays(value)
        else:
            extras[value] = place
    record.extras = extras


def _structures(draft: Draft, call: UnitCall) -> Callable[[object], Structure]:
    """How structures that hooks were given are built from the values and the arguments of a call."""
    values = {id(tensor): value for value, tensor in call.promoted.items()}
    for value in draft.nodes[call.node].makes:
        values.setdefault(id(draft.tensors[value]), value)
    given = positions(call.arguments)

    def structure(tree: object) -> Structure:
        leaves, spec = tree_flatten(tree)
        return Structure(spec, tuple(_leaf(leaf, values, given) for leaf in leaves))

    return structure


def _leaf(leaf: object, values: Mapping[int, int], given: Mapping[int, int]) -> Leaf:
    if id(leaf) in values:
        return Made(values[id(leaf)])
    if id(leaf) in given:
        return FromArgument(given[id(leaf)])
    if isinstance(leaf, torch.Tensor):
        return Unseen(stand_in("a tensor inside a unit", leaf))
    return Fixed(leaf)


def _mind_aliases(draft: Draft) -> None:
    """Of a storage written in place, only what it was at first and what one object holds at last may cross."""
    by_storage: dict[int | None, list[int]] = {}
    for value, tensor in enumerate(draft.tensors):
        by_storage.setdefault(draft.origins.storage(tensor), []).append(value)
    for key, writers in draft.origins.written().items():
        values = by_storage.get(key)
        if values:
            _mind(draft, values, writers)


def _mind(draft: Draft, values: Sequence[int], writers: Sequence[Origin]) -> None:
    """`values`, in order, share a storage that `writers` wrote."""
    for writer in writers:
        node = writer.node if isinstance(writer, Born) else draft.values[writer].node
        before = {value for value in values if draft.values[value].node < node}
        draft.records[node].touches = tuple(sorted({*draft.records[node].touches, *before}))
    last = max((writer for writer in writers if isinstance(writer, int)), default=None)
    one_object = len({id(draft.tensors[value]) for value in values}) == 1
    for value in values:
        draft.records[draft.values[value].node].written_later = True
        if value != values[0] and not (value == last and one_object):
            draft.stays(value)
