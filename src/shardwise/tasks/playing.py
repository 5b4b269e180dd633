"""Worlds side by side, each with an episode under way and the last steps of it; a world whose episode has ended begins
the next seed. As many rows all the time: what a row says that has nothing left to play is not heard.

    seeds  0 1 2 3 4 5        world 0   0 0 0 2 2 5 5 5
                              world 1   1 1 3 3 3 4 · ·
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardwise.tasks.film import Frame
from shardwise.tasks.scored import Score
from shardwise.tasks.sight import Sight
from shardwise.tasks.simulator import Pictured, Simulator

__all__ = ["Episode", "Seat", "score_of"]

_HELD = 3  # times that the last frame of an episode is shown again


@dataclass(frozen=True, kw_only=True)
class Episode:
    """How an episode went."""

    seed: int
    instruction: str
    succeeded: bool
    steps: int


@dataclass(kw_only=True)
class Seat:
    """A world, the episode in it, and the seeds that it takes its next one from, which all seats share."""

    world: Simulator
    seeds: Iterator[int]
    window: int  # steps that are remembered
    filmed: frozenset[int]  # seeds
    images: list[NDArray[np.uint8]] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)  # one before each image; the first is `start`
    instruction: str = ""
    seed: int | None = None  # None: nothing is left to play
    steps: int = 0
    frames: list[Frame] = field(default_factory=list)

    def begin(self, start: int) -> None:
        """The next seed's episode; `start` stands for the action before the first. Without one the last image stays."""
        self.seed = next(self.seeds, None)
        if self.seed is None:
            return
        sight = self.world.reset(self.seed)
        self.instruction, self.steps = sight.instruction, 0
        self.images, self.taken = [sight.image], [start]
        self._film(sight)

    def act(self, action: int) -> Episode | None:
        """Do it; how the episode went, if it has ended."""
        assert self.seed is not None
        outcome = self.world.step(action)
        self.steps += 1
        self.images = [*self.images, outcome.sight.image][-self.window :]
        self.taken = [*self.taken, action][-self.window :]
        self._film(outcome.sight)
        if not outcome.ended:
            return None
        self.frames += self.frames[-1:] * _HELD
        return Episode(seed=self.seed, instruction=self.instruction, succeeded=outcome.succeeded, steps=self.steps)

    def _film(self, sight: Sight) -> None:
        if self.seed in self.filmed and isinstance(self.world, Pictured):
            self.frames.append((self.world.picture(), sight.instruction))


def score_of(played: Sequence[Episode]) -> Score:
    """`success`, the share of episodes in which it was done, and `steps`, the mean of those; the report names the
    others."""
    well = [each for each in played if each.succeeded]
    success = len(well) / len(played)
    error = math.sqrt(success * (1 - success) / len(played))
    steps = sum(each.steps for each in well) / max(1, len(well))
    lines = [f"{len(well)} of {len(played)} episodes: success {success:.3f} ± {error:.3f}, {steps:.1f} steps"]
    lines += [
        f"  seed {each.seed}: {each.instruction}: not after {each.steps} steps"
        for each in sorted(played, key=lambda each: each.seed)
        if not each.succeeded
    ]
    return Score(figures={"success": success, "steps": steps}, report="\n".join(lines))
