"""What is under way in one step of one rank: forwards that wait for their backward, messages, losses.

Values of the executor, and what it asks of those who sum gradients and gather parameters. Does nothing itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import torch
import torch.nn as nn

from shardwise.comm.point_to_point import Incoming, Outgoing
from shardwise.execute.batches import MicroBatch
from shardwise.execute.buffers import Buffer
from shardwise.execute.deferred import Deferred
from shardwise.execute.flows import Flow
from shardwise.trace.randomness import Scope

__all__ = ["Alive", "Gathered", "StepState", "UnderWay", "Waiting", "Way", "Work"]


class Waiting(Protocol):
    """Who reduces gradients once they are final (`parallel.gradients.GradientSum`)."""

    def begin(self, order: Sequence[int]) -> None: ...

    def during(self, stage: int) -> contextlib.AbstractContextManager[Callable[[torch.Tensor], None]]: ...

    def end(self, stage: int, *, but: Collection[int] = ()) -> None: ...

    def final(self, parameter: nn.Parameter) -> None: ...


class Gathered(Protocol):
    """Who makes the parameters of a stage whole, where ranks divide them (`execute.divided_states.DividedStates`)."""

    def unshard(self, stage: int) -> None: ...

    def reshard(self, stage: int) -> None: ...


class Way(Protocol):
    """A forward of a micro-batch that is not the objective's: one that generates, say."""

    def compute(self, stage: int) -> torch.Tensor:
        """The model's forward as this stage runs it; what it returns stands in the place of a loss."""
        ...

    def absent(self, stage: int, node: int) -> None:
        """A unit call that this stage does not run has been answered."""
        ...

    def left(self, stage: int, node: int) -> None:
        """The stage has left the forward; what comes from `node` on is not met."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """One micro-batch of a step: its inputs, its flow, and the factor of its loss in the global mean."""

    micro_batch: MicroBatch
    flow: Flow
    factor: float
    scope: Scope
    headers: bool
    way: Way | None = None


@dataclasses.dataclass(slots=True)
class Alive:
    """A forward whose backward has not run."""

    sent: dict[int, torch.Tensor]
    leaves: dict[int, torch.Tensor]
    loss: torch.Tensor | None
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)
    written: Sequence[Buffer] = ()  # by a forward that is run again, as they were before it


@dataclasses.dataclass(slots=True)
class UnderWay:
    """What one row leaves to the next: forwards whose backward has not run, messages on their way, losses."""

    alive: dict[int, Alive] = dataclasses.field(default_factory=dict)
    incoming: dict[int, Incoming] = dataclasses.field(default_factory=dict)
    local: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    losses: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)  # sends of the last row


@dataclasses.dataclass(slots=True)
class StepState:
    """What is under way in one step, by the keys of its table."""

    works: Sequence[Work]
    gradients: Waiting | None
    alive: dict[int, Alive]
    incoming: dict[int, Incoming]
    local: dict[int, torch.Tensor]
    losses: dict[int, torch.Tensor]
    deferred: dict[int, Deferred] = dataclasses.field(default_factory=dict)
    outgoing: list[Outgoing] = dataclasses.field(default_factory=list)
    ready: Any = None  # when the inputs of the action under way were there
