"""BabyAI's levels as minigrid simulates them, with the expert that it ships: a room, objects, "go to the red ball".

The policy sees what the agent sees: 7 x 7 tiles before it as pixels, black where it cannot see. minigrid is imported
when a world is made. Source: Chevalier-Boisvert et al., "BabyAI", ICLR 2019.
"""

from __future__ import annotations

import contextlib
import io
import types
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.sight import Outcome, Sight

__all__ = ["BabyAI"]

_VIEW = 7  # tiles of a side
_AGENT = (_VIEW // 2, _VIEW - 1)  # the tile on which the agent stands, column and row
_UP = 3  # where the agent looks to in its own view
_PICTURE_TILE = 16  # pixels of a tile's side as seen from outside
_HARMLESS = ("left", "right", "forward")


class BabyAI:
    """A level such as "BabyAI-GoToLocal-v0"; an `Expert` and `Pictured`. Use `make`."""

    def __init__(self, environment: Any, library: types.SimpleNamespace, *, level: str, tile: int) -> None:
        self._environment, self._library, self._level, self._tile = environment, library, level, tile
        self._bot: Any = None
        self._taken: int | None = None
        self._tiles: dict[tuple[int, ...], NDArray[np.uint8]] = {}

    @classmethod
    def make(cls, *, level: str = "BabyAI-GoToRedBallNoDists-v0", tile: int = 4) -> BabyAI:
        """`tile`: pixels of a tile's side; images are (3, 7 * tile, 7 * tile). Raises ConfigError."""
        if not isinstance(tile, int) or tile < 1:
            raise ConfigError(f"a tile has at least a pixel, but tile={tile!r}; use 4 or 8")
        library = _minigrid()
        try:
            environment = library.gymnasium.make(level, disable_env_checker=True).unwrapped
        except library.gymnasium.error.Error as error:
            raise ConfigError(f"minigrid has no level {level!r}: {error}; correct task.simulator_options") from error
        if not isinstance(environment, library.Level):
            raise ConfigError(
                f"the expert knows BabyAI's levels, but {level!r} is none; use one such as BabyAI-GoToLocal-v0"
            )
        return cls(environment, library, level=level, tile=tile)

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(action.name for action in self._environment.actions)

    @property
    def harmless(self) -> tuple[int, ...]:
        return tuple(map(self.actions.index, _HARMLESS))

    @property
    def fingerprint(self) -> str:
        return f"babyai-1 {self._level} tile={self._tile} minigrid={self._library.version}"

    def reset(self, seed: int) -> Sight:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of worlds that it does not take
            seen, _ = self._environment.reset(seed=seed)
            self._bot = self._library.Bot(self._environment)
        self._taken = None
        return self._sight(seen)

    def step(self, action: int) -> Outcome:
        seen, reward, terminated, truncated, _ = self._environment.step(action)
        self._taken = action
        return Outcome(sight=self._sight(seen), ended=bool(terminated or truncated), succeeded=float(reward) > 0)

    def advice(self) -> int | None:
        try:
            return int(self._bot.replan(self._taken))
        except (AssertionError, IndexError, self._library.Lost):  # how the bot says that it is at a loss
            return None

    def picture(self) -> NDArray[np.uint8]:
        """The whole room; what the agent sees is lighter."""
        picture: NDArray[np.uint8] = self._environment.get_frame(tile_size=_PICTURE_TILE)
        return picture

    def _sight(self, seen: dict[str, Any]) -> Sight:
        codes = seen["image"].tolist()  # (columns, rows, 3): object, colour, state
        tiles = [
            self._tile_of(tuple(code), (i, j) == _AGENT)
            for i, column in enumerate(codes)
            for j, code in enumerate(column)
        ]
        side = self._tile
        image = np.stack(tiles).reshape(_VIEW, _VIEW, side, side, 3)  # (columns, rows, y, x, channels)
        image = image.transpose(4, 1, 2, 0, 3).reshape(3, _VIEW * side, _VIEW * side)
        return Sight(image=image, instruction=str(seen["mission"]))

    def _tile_of(self, code: tuple[int, ...], of_agent: bool) -> NDArray[np.uint8]:
        """(side, side, 3), as minigrid draws it."""
        key = (*code, int(of_agent))
        if key not in self._tiles:
            self._tiles[key] = self._drawn(code, of_agent)
        return self._tiles[key]

    def _drawn(self, code: tuple[int, ...], of_agent: bool) -> NDArray[np.uint8]:
        library, side = self._library, self._tile
        if code[0] == library.unseen:
            return np.zeros((side, side, 3), dtype=np.uint8)
        thing = None if code[0] == library.empty else library.Thing.decode(*code)
        drawn = library.Grid.render_tile(thing, agent_dir=_UP if of_agent else None, highlight=True, tile_size=side)
        return np.asarray(drawn).astype(np.uint8)


def _minigrid() -> types.SimpleNamespace:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # pygame greets
            import gymnasium
            import minigrid
            from minigrid.core.constants import OBJECT_TO_IDX
            from minigrid.core.grid import Grid
            from minigrid.core.world_object import WorldObj
            from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
            from minigrid.utils.baby_ai_bot import BabyAIBot, DisappearedBoxError
    except ImportError as error:
        raise ConfigError(
            f"BabyAI is simulated by minigrid, which cannot be imported: {error}; run: pip install 'shardwise[vla]'"
        ) from error
    return types.SimpleNamespace(
        gymnasium=gymnasium,
        version=minigrid.__version__,
        Grid=Grid,
        Thing=WorldObj,
        Level=RoomGridLevel,
        Bot=BabyAIBot,
        Lost=DisappearedBoxError,
        unseen=OBJECT_TO_IDX["unseen"],
        empty=OBJECT_TO_IDX["empty"],
    )
