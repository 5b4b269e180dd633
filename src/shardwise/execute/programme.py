"""Tables of one stage, indexed by node: what it computes, sends, answers. Made once a signature, read every call."""

from __future__ import annotations

import dataclasses

from shardwise.describe.flow import NodeKind
from shardwise.plan.cut import StageCut
from shardwise.trace.tape import FromArgument, Made, Record, Tape

__all__ = ["Programme", "programme"]


@dataclasses.dataclass(slots=True)
class Programme:
    """Per node: does this stage compute it, which values does it send, which does it receive."""

    computes: list[bool]
    sends: list[tuple[int, ...]]  # values to send, of each node
    units: list[str | None]  # the unit that a node calls
    plain: list[int | None]  # the value that is the whole answer, where an answer is one
    given: list[int | None]  # the same, of absent unit calls that leave nothing else behind
    simple: list[bool]  # a unit call of this stage without random numbers, extra outputs, values to send
    places: list[bool]  # whether an answer or a write asks for the arguments
    random: bool
    writes: bool  # something in the forward writes in place


def programme(tape: Tape, cut: StageCut) -> Programme:
    """Tables of one stage, indexed by node."""
    nodes, records = tape.flow.nodes, tape.records
    computes = [index in cut.computes for index in range(len(nodes))]
    sends: list[tuple[int, ...]] = [() for _ in nodes]
    for value in sorted({value for value, _ in cut.sends}):
        node = tape.flow.values[value].node
        sends[node] = (*sends[node], value)
    plain = [_only_value(record) for record in records]
    return Programme(
        computes,
        sends,
        units=[node.name if node.kind is NodeKind.CALL else None for node in nodes],
        plain=plain,
        given=[
            None if present or record.extras or record.hooked else value
            for present, record, value in zip(computes, records, plain, strict=True)
        ],
        simple=[
            present and not (record.extras or record.random or record.host_random or values)
            for present, record, values in zip(computes, records, sends, strict=True)
        ],
        places=[
            bool(record.writes) or any(isinstance(leaf, FromArgument) for leaf in record.answer.leaves)
            for record in records
        ],
        random=tape.random,
        writes=any(record.changes for record in records),
    )


def _only_value(record: Record) -> int | None:
    """The value that a node answers with, if that is all there is to its answer."""
    leaves = record.answer.leaves
    if record.changes or record.writes or not record.answer.spec.is_leaf() or len(leaves) != 1:
        return None
    return leaves[0].value if isinstance(leaves[0], Made) else None
