"""A world of one row of places, with an expert: the instruction names the end to go to, the image where one is."""

from __future__ import annotations

import numpy as np

from shardwise.tasks.sight import Outcome, Sight

PLACES = 8  # pixels of a row; 8 x 8 pixels, so that patches of 4 are two by two
ENDS = ("left", "right")


class Corridor:
    """Actions: left, right, and one that ends the episode badly. `lost`: seeds whose expert knows nothing."""

    actions = ("left", "right", "give-up")
    harmless = (0, 1)

    def __init__(self, *, places: int = PLACES, lost: int = 0) -> None:
        self.fingerprint = f"corridor {places} {lost}"
        self.places, self.lost = places, lost
        self.place = self.goal = self.steps = self.seed = 0

    def reset(self, seed: int) -> Sight:
        self.seed, self.steps = seed, 0
        self.goal = seed % 2
        self.place = 1 + seed // 2 % (self.places - 2)
        return self.sight()

    def step(self, action: int) -> Outcome:
        self.steps += 1
        self.place = min(max(self.place + (-1, 1, 0)[action], 0), self.places - 1)
        well = self.place == (0, self.places - 1)[self.goal]
        ended = well or action == 2 or self.steps == 3 * self.places
        return Outcome(sight=self.sight(), ended=ended, succeeded=well and action != 2)

    def advice(self) -> int | None:
        return None if self.seed < self.lost else self.goal

    def picture(self) -> np.ndarray:
        return np.broadcast_to(self.sight().image[0][:, :, None], (PLACES, PLACES, 3)).copy()

    def sight(self) -> Sight:
        image = np.zeros((1, PLACES, PLACES), dtype=np.uint8)
        image[:, :, self.place * PLACES // self.places] = 200
        return Sight(image=image, instruction=f"Go to the {ENDS[self.goal]} end")


class Confused(Corridor):
    """Its expert names an action that there is not."""

    def advice(self) -> int | None:
        return 7


class WithoutExpert:
    """As it, without advice."""

    actions = Corridor.actions
    fingerprint = "without"

    def reset(self, seed: int) -> Sight:
        raise NotImplementedError

    def step(self, action: int) -> Outcome:
        raise NotImplementedError
