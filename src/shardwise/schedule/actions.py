"""The words of a schedule: what one rank computes (Action, StageAction) and moves (Transfer), and their text form.

    2F0     stage 2 runs the forward of micro-batch 0
    2B0     stage 2 runs its whole backward        2I0  only the gradient of its inputs
    2W0     only the gradient of its weights (2B0 is 2I0 and 2W0 in one)
    2C0     its forward once more, just ahead of the backward; 2F0 then keeps only its inputs
    2O0     what 2F0 kept moves to the host          2L0  and back to the device
    2G      stage 2 reduces its gradients over the replicas of the model
    2U      stage 2 gathers its sharded parameters   2H   and gives the parts of others back
    0S1F3   stage 0 sends to stage 1 the activation of micro-batch 3; the matching receive is 1R0F3
    1S0B3   stage 1 sends to stage 0 the gradient of micro-batch 3; the matching receive is 0R1B3

The stage that acts is always written first. This file knows neither ranks nor order nor time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from shardwise.errors import ScheduleError

__all__ = [
    "Action",
    "Kind",
    "StageAction",
    "StageKind",
    "Transfer",
    "TransferKind",
    "parse",
    "parse_row",
    "print_row",
]

_NUMBER = "(0|[1-9][0-9]*)"  # no leading zeros: text and value are one to one
_ACTION = re.compile(f"{_NUMBER}([FBIWCOL]){_NUMBER}")
_STAGE_ACTION = re.compile(f"{_NUMBER}([GUH])")
_TRANSFER = re.compile(f"{_NUMBER}([SR]){_NUMBER}([FB]){_NUMBER}")


class Kind(StrEnum):
    """What a stage does for one micro-batch; I and W are the two halves of B (zero bubble, arXiv:2401.10241).

    C computes the forward again, O and L move what the forward kept to the host and back. All but O and L keep the
    rank busy; those two run beside its work.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  the field's name for the input gradient
    W = "W"
    C = "C"
    O = "O"  # noqa: E741  offload
    L = "L"

    @property
    def computes(self) -> bool:
        """Whether the rank is busy with it, and cannot do anything else meanwhile."""
        return self not in _BESIDE


_BESIDE = (Kind.O, Kind.L)


class StageKind(StrEnum):
    """What a stage does once for all micro-batches; all of it moves data beside the work of the rank."""

    G = "G"  # reduce gradients
    U = "U"  # unshard: gather the parameters
    H = "H"  # reshard: keep only the own part of them


class TransferKind(StrEnum):
    """Which of the two ends of a transfer."""

    SEND = "S"
    RECV = "R"


@dataclass(frozen=True, kw_only=True, slots=True)
class Action:
    """One stage computes one thing for one micro-batch.

    Raises ScheduleError if stage or micro_batch is negative.
    """

    kind: Kind
    stage: int
    micro_batch: int

    def __post_init__(self) -> None:
        if self.stage < 0 or self.micro_batch < 0:
            raise ScheduleError(
                f"an action counts from 0, but has stage {self.stage} and micro-batch {self.micro_batch}; "
                "number both from 0"
            )

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}{self.micro_batch}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StageAction:
    """One stage does one thing for all micro-batches at once. Raises ScheduleError if stage is negative."""

    kind: StageKind
    stage: int

    def __post_init__(self) -> None:
        if self.stage < 0:
            raise ScheduleError(f"an action counts from 0, but has stage {self.stage}; number stages from 0")

    def __str__(self) -> str:
        return f"{self.stage}{self.kind.value}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """One end of a transfer of one micro-batch from stage `source` to stage `target`.

    An activation runs up the stage numbers and a gradient down, because stages are numbered topologically.
    Raises ScheduleError if `gradient` and the direction contradict each other.
    """

    kind: TransferKind
    source: int
    target: int
    micro_batch: int
    gradient: bool

    def __post_init__(self) -> None:
        if self.source < 0 or self.target < 0 or self.micro_batch < 0:
            raise ScheduleError(
                f"a transfer counts from 0, but has stages {self.source} and {self.target} and micro-batch "
                f"{self.micro_batch}; number them from 0"
            )
        if self.source == self.target or self.gradient != (self.source > self.target):
            moved = "gradient runs down" if self.gradient else "activation runs up"
            raise ScheduleError(
                f"a {moved} the stage numbers, but this one goes from stage {self.source} to stage "
                f"{self.target}; swap the stages or change what moves"
            )

    @property
    def edge(self) -> tuple[int, int]:
        """The edge of the stage graph that this transfer uses, in the direction of the forward."""
        return (self.target, self.source) if self.gradient else (self.source, self.target)

    def __str__(self) -> str:
        what = "B" if self.gradient else "F"
        if self.kind is TransferKind.SEND:
            return f"{self.source}S{self.target}{what}{self.micro_batch}"
        return f"{self.target}R{self.source}{what}{self.micro_batch}"


def parse(text: str) -> Action | StageAction | Transfer:
    """The action or transfer written as `text`; the inverse of str(). Raises ScheduleError."""
    if found := _ACTION.fullmatch(text):
        stage, kind, micro_batch = found.groups()
        return Action(kind=Kind(kind), stage=int(stage), micro_batch=int(micro_batch))
    if found := _STAGE_ACTION.fullmatch(text):
        return StageAction(kind=StageKind(found[2]), stage=int(found[1]))
    if found := _TRANSFER.fullmatch(text):
        acting, kind, other, what, micro_batch = found.groups()
        source, target = (acting, other) if kind == TransferKind.SEND else (other, acting)
        return Transfer(
            kind=TransferKind(kind),
            source=int(source),
            target=int(target),
            micro_batch=int(micro_batch),
            gradient=what == "B",
        )
    raise ScheduleError(
        f"an action is written STAGE, one of F B I W C O L, MICRO-BATCH, or STAGE, one of G U H, and a transfer "
        f'STAGE, S or R, STAGE, F or B, MICRO-BATCH, but found "{text}"; write for example 2F0 or 0S1F3'
    )


def parse_row(text: str) -> tuple[Action | StageAction | Transfer, ...]:
    """The row of one rank, its items separated by white space. Raises ScheduleError."""
    return tuple(parse(word) for word in text.split())


def print_row(row: Iterable[Action | StageAction | Transfer]) -> str:
    """The row of one rank as one line of text."""
    return " ".join(map(str, row))
