"""Values that cross between stages and grow by every token: a bias for all tokens so far, which a first layer computes
for the others (T5).

    pass       5 tokens      6 tokens      7 tokens
    hidden     (2, 1, 64)    (2, 1, 64)    (2, 1, 64)
    bias       (1, 4, 1, 5)  (1, 4, 1, 6)  (1, 4, 1, 7)     found from two recordings, told for all

The dataflow is one; its crossing values are of other shapes. Knows tapes; no models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch

from shardwise.describe.flow import NodeKind, Value
from shardwise.errors import DataflowError
from shardwise.execute.flows import Flow
from shardwise.execute.programme import programme
from shardwise.trace.absent import Absent

__all__ = ["Growing", "compute_free_glue", "growing_between"]


@dataclasses.dataclass(slots=True)
class Growing:
    """How much longer the dims of values are for each token behind `tokens`; nothing where none are."""

    tokens: int = 0
    by: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    _flows: dict[int, Flow] = dataclasses.field(default_factory=dict)

    def at(self, flow: Flow, tokens: int) -> Flow:
        """The flow of a pass in which texts have so many tokens."""
        more = tokens - self.tokens
        if not self.by or more == 0:
            return flow
        if tokens not in self._flows:
            values, stand_ins = list(flow.tape.flow.values), list(flow.tape.stand_ins)
            for value, by in self.by.items():
                values[value] = _longer(values[value], by, more)
                stand_ins[value] = _stand_in(stand_ins[value], values[value].shape)
            described = dataclasses.replace(flow.tape.flow, values=tuple(values))
            tape = dataclasses.replace(flow.tape, flow=described, stand_ins=stand_ins)
            self._flows[tokens] = dataclasses.replace(flow, tape=tape, digest=(flow.digest + tokens) & (2**56 - 1))
        return self._flows[tokens]


def compute_free_glue(flow: Flow) -> None:
    """Let every stage compute what follows from the batch alone, also what only others need: masks are longer with
    every token, and what stands in for one is not."""
    free: set[int] = set()
    for node in flow.tape.flow.nodes:
        made_by = {flow.tape.flow.values[value].node for value in node.reads}
        if node.kind is NodeKind.OP and node.makes and not node.parameters and made_by <= free:
            free.add(node.index)
    stages = tuple(
        dataclasses.replace(stage, computes=stage.computes | free) if stage.computes else stage
        for stage in flow.cut.stages
    )
    flow.cut = dataclasses.replace(flow.cut, stages=stages)
    flow.free = frozenset(free)
    flow.tables = {stage.stage: programme(flow.tape, stage) for stage in stages}


def growing_between(first: Flow, second: Flow, tokens: int, crossing: Collection[int]) -> Growing:
    """What has grown from a pass with so many tokens to the one behind it. Raises `DataflowError` where these do not
    take the same path."""
    one, other = first.tape.flow, second.tape.flow
    if [node.label for node in one.nodes] != [node.label for node in other.nodes] or len(one.values) != len(
        other.values
    ):
        raise DataflowError(
            f"passes of one token take the same path, but that of text {tokens + 1} tokens long has {len(other.nodes)} "
            f"nodes and the one before {len(one.nodes)}; generate with tp instead of pp"
        )
    pairs = zip(one.values, other.values, strict=True)
    grown = {
        before.index: tuple(b - a for a, b in zip(before.shape, after.shape, strict=True))
        for before, after in pairs
        if before.shape != after.shape
    }
    return Growing(tokens, grown if set(grown) & set(crossing) else {})


def _longer(value: Value, by: tuple[int, ...], more: int) -> Value:
    shape = tuple(size + step * more for size, step in zip(value.shape, by, strict=True))
    elements = max(1, torch.Size(value.shape).numel())
    return dataclasses.replace(value, shape=shape, nbytes=value.nbytes // elements * torch.Size(shape).numel())


def _stand_in(known: Absent, shape: tuple[int, ...]) -> Absent:
    """Of another shape; what was repeated along a dim is so still."""
    dense = torch.empty(shape, device="meta").stride()
    strides = tuple(0 if old == 0 else new for old, new in zip(known.stride(), dense, strict=True))
    return Absent(what=known.what, shape=shape, dtype=known.dtype, device=known.device, strides=strides)
