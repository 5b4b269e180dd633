"""What the items of one rank's row ask of the executor; found once a row, before its first step.

    0F0 1F0 1I0 1W0 0I0 0F1 … 0W0        1I0 1W0 with nothing between is one whole backward; 0I0 … 0W0 is split
                                         a stage's gradients are final behind its last B or W, or at its G

Knows actions and their order; no tensors, no stages' contents.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence

from shardwise.errors import DataflowError
from shardwise.schedule.actions import Action, Kind, StageAction, StageKind, Transfer, TransferKind

__all__ = ["Item", "Op", "RowPlan", "Step", "plan_of"]

Item = Action | StageAction | Transfer


class Op(enum.Enum):
    """What the executor does for an item of a row."""

    POST = enum.auto()
    SEND_VALUES = enum.auto()
    SEND_GRADIENTS = enum.auto()
    FORWARD = enum.auto()
    FORWARD_TWICE = enum.auto()  # keeps its inputs alone: C runs it again
    AGAIN = enum.auto()
    OFFLOAD = enum.auto()  # what a forward keeps goes to the host
    LOAD = enum.auto()
    BACKWARD = enum.auto()
    INPUTS = enum.auto()  # the gradients of inputs; weights' are put off
    WEIGHTS = enum.auto()
    DONE = enum.auto()  # the W of a whole backward
    REDUCE = enum.auto()
    UNSHARD = enum.auto()
    RESHARD = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """An item, what to do for it, and what is known behind it."""

    op: Op
    item: Item
    ends: bool = False  # the stage's gradients are final behind it
    last_forward: bool = False  # of the row


@dataclasses.dataclass(frozen=True, slots=True)
class RowPlan:
    """A row, resolved. `order` are the stages in the order in which their gradients become final."""

    steps: tuple[Step, ...]
    splits: bool
    order: tuple[int, ...]


def plan_of(row: Sequence[Item]) -> RowPlan:
    """Raises `DataflowError` for an action that this executor does not run, or out of order."""
    ends = _ends(row)
    again = {(a.stage, a.micro_batch) for a in row if isinstance(a, Action) and a.kind is Kind.C}
    last_forward = max((p for p, a in enumerate(row) if isinstance(a, Action) and a.kind is Kind.F), default=-1)
    steps: list[Step] = []
    for position, item in enumerate(row):
        op = _op(row, position, again)
        merged = op is Op.BACKWARD and isinstance(item, Action) and item.kind is Kind.I
        final = op is not Op.DONE and position + merged in ends.values()
        steps.append(Step(op, item, final, position == last_forward))
    return RowPlan(
        steps=tuple(steps),
        splits=any(step.op is Op.INPUTS for step in steps),
        order=tuple(sorted(ends, key=ends.__getitem__)),
    )


def _op(row: Sequence[Item], position: int, again: set[tuple[int, int]]) -> Op:
    item = row[position]
    if isinstance(item, Transfer):
        if item.kind is TransferKind.RECV:
            return Op.POST
        return Op.SEND_GRADIENTS if item.gradient else Op.SEND_VALUES
    if isinstance(item, StageAction):
        return {StageKind.G: Op.REDUCE, StageKind.U: Op.UNSHARD, StageKind.H: Op.RESHARD}[item.kind]
    if item.kind is Kind.F:
        return Op.FORWARD_TWICE if (item.stage, item.micro_batch) in again else Op.FORWARD
    elif item.kind is Kind.C:
        return Op.AGAIN
    elif item.kind in (Kind.O, Kind.L):
        return Op.OFFLOAD if item.kind is Kind.O else Op.LOAD
    elif item.kind is Kind.B:
        return Op.BACKWARD
    elif item.kind is Kind.I:
        whole = position + 1 < len(row) and _is_rest(row[position + 1], item)
        return Op.BACKWARD if whole else Op.INPUTS
    elif item.kind is Kind.W:
        before = row[position - 1] if position else None
        return Op.DONE if isinstance(before, Action) and _is_rest(item, before) else Op.WEIGHTS
    raise DataflowError(
        f"this executor runs F, B, I, W, C, O, L, G, U and H, but the row holds {item}; use another schedule"
    )


def _is_rest(item: Item, first: Action) -> bool:
    """Whether `item` is the W of the I `first`."""
    same = isinstance(item, Action) and (item.stage, item.micro_batch) == (first.stage, first.micro_batch)
    return same and item.kind is Kind.W and first.kind is Kind.I


def _ends(row: Sequence[Item]) -> dict[int, int]:
    """Stage -> the position in the row behind which its gradients are final: that of its G, else of its last B or W."""
    last: dict[int, int] = {}
    reduced: dict[int, int] = {}
    for position, item in enumerate(row):
        if isinstance(item, Action) and item.kind in (Kind.B, Kind.W):
            last[item.stage] = position
        elif isinstance(item, StageAction) and item.kind is StageKind.G:
            reduced[item.stage] = position
    early = [stage for stage, position in reduced.items() if position < last.get(stage, position)]
    if early:
        raise DataflowError(
            f"a stage's gradients are reduced once they are final, but {row[reduced[early[0]]]} stands ahead of "
            f"{row[last[early[0]]]}; put it behind"
        )
    return last | reduced
