"""What the items of one rank's row do, with everything looked up: what each reads, makes and moves.

    row     1R0F0           1F0               1B0                  1S0B0
    table   Post(messages)  Forward(inputs …) Backward(gradients …) SendGradients(messages)

Made by `resolve`, run by the executor. A value on its way, and a forward whose backward has not run, are named by small
numbers. Knows stages and messages; no tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from shardwise.comm.point_to_point import Expected
from shardwise.execute.flows import Flow
from shardwise.execute.programme import Programme
from shardwise.execute.row_plan import RowPlan
from shardwise.plan.cut import StageCut
from shardwise.schedule.actions import Action

__all__ = [
    "Arrival",
    "Backward",
    "Done",
    "Entry",
    "Forward",
    "Message",
    "Move",
    "Post",
    "Reduce",
    "SendGradients",
    "SendValues",
    "Table",
    "Weights",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """A value, or its gradient, on its way between two stages of different ranks."""

    value: int
    key: int
    expected: Expected
    peer: int
    confirmed: bool  # an activation: its gradient will tell that it has arrived


@dataclasses.dataclass(frozen=True, slots=True)
class Post:
    """Receives to post."""

    micro_batch: int
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SendValues:
    """What a forward has made and other ranks read."""

    micro_batch: int
    forward: int
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SendGradients:
    """Gradients of what a stage has received from other ranks."""

    micro_batch: int
    messages: tuple[Message, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """A value, or its gradient, that an action reads: from another rank, or from another stage of this one."""

    value: int
    key: int
    local: bool
    differentiable: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Forward:
    """A forward, or its repetition."""

    action: Action
    key: int
    stage: StageCut
    table: Programme
    idle: bool  # all layers of the stage are dropped
    has_loss: bool
    twice: bool  # keeps its inputs alone: it is run again
    moves: bool  # what it keeps goes to the host
    inputs: tuple[Arrival, ...]
    handed: tuple[tuple[int, int], ...]  # (value, key) of what other stages of this rank read


@dataclasses.dataclass(frozen=True, slots=True)
class Backward:
    """A backward, whole or of the inputs alone."""

    action: Action
    key: int
    ends: bool  # the stage's gradients are final behind it
    gradients: tuple[Arrival, ...]
    made: tuple[tuple[int, int], ...]  # (value, key) of the gradients of what the forward received


@dataclasses.dataclass(frozen=True, slots=True)
class Weights:
    """The weight gradients that a backward of the inputs has left."""

    action: Action
    key: int
    ends: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Reduce:
    """A stage's gradients are final."""

    stage: int


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """The second half of a backward that was run whole."""

    action: Action


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """What a forward keeps goes to the host, or comes back."""

    key: int


Entry = Post | SendValues | SendGradients | Forward | Backward | Weights | Reduce | Done | Move


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A row, resolved: of every item who runs it, what it does, the action that it is (no transfer, no reduction), and
    whether it is the row's last forward."""

    plan: RowPlan
    entries: tuple[tuple[Callable[[Any, Any], None], Entry, Action | None, bool], ...]
    actions: tuple[Action, ...]
    flows: tuple[Flow, ...]  # kept: the table is found again by who they are
