"""What shardwise asks of a simulated world: an episode for every seed, what is seen, and what an action does.

    seed ──reset──► Sight (image, instruction) ──► an action ──step──► Sight, whether it has ended, whether well …

A world knows no task, no model and no ranks. One whose seed is the same goes the same way under the same actions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.babyai import BabyAI
from shardwise.tasks.by_name import found
from shardwise.tasks.sight import Outcome, Sight

__all__ = ["SIMULATORS", "Expert", "Outcome", "Pictured", "Sight", "Simulator", "simulator_from"]


class Simulator(Protocol):
    """One world, in which one episode is under way."""

    @property
    def actions(self) -> tuple[str, ...]:
        """A name for every action; actions are numbered in this order."""
        ...

    @property
    def fingerprint(self) -> str:
        """Stands for all that episodes depend on besides the seed: name, options, version."""
        ...

    def reset(self, seed: int) -> Sight:
        """Begins the episode of a seed, 0 or more."""
        ...

    def step(self, action: int) -> Outcome:
        """What an action does."""
        ...


@runtime_checkable
class Expert(Simulator, Protocol):
    """A world that knows what to do in it, so that episodes can be recorded."""

    @property
    def harmless(self) -> tuple[int, ...]:
        """Actions that may be put in the place of the expert's: whatever they do can be made good."""
        ...

    def advice(self) -> int | None:
        """What the expert does now; asked once before every step. None: it does not know any more."""
        ...


@runtime_checkable
class Pictured(Protocol):
    """A world that can be looked at from outside."""

    def picture(self) -> NDArray[np.uint8]:
        """(height, width, 3)"""
        ...


SIMULATORS: Mapping[str, Callable[..., Simulator]] = MappingProxyType({"babyai": BabyAI.make})


def simulator_from(name: str, options: Mapping[str, object]) -> Simulator:
    """A simulator of SIMULATORS, or what "package.module:factory" makes of the options. Raises ConfigError."""
    if name not in SIMULATORS and ":" not in name:
        raise ConfigError(
            f"a simulator is one of {', '.join(SIMULATORS)} or package.module:factory, but got {name!r}; correct "
            "task.simulator"
        )
    factory = SIMULATORS[name] if name in SIMULATORS else found(name, "a simulator")
    try:
        inspect.signature(factory).bind(**options)
    except TypeError as error:
        raise ConfigError(
            f"simulator_options are what {name} is called with, but {error}; correct task.simulator_options"
        ) from error
    made: Simulator = factory(**options)
    return made
