"""BabyAI's worlds: what the agent sees as minigrid draws it, the same for a seed, and an expert that does well."""

from __future__ import annotations

import numpy as np
import pytest

from shardwise.errors import ConfigError
from shardwise.tasks.babyai import BabyAI
from shardwise.tasks.simulator import Expert, Pictured

pytest.importorskip("minigrid")


def episode(world: BabyAI, seed: int) -> tuple[list[np.ndarray], list[int], bool]:
    """Images and actions of the expert, and whether it did well."""
    sight = world.reset(seed)
    images, actions = [sight.image], []
    while True:
        action = world.advice()
        assert action is not None
        outcome = world.step(action)
        images.append(outcome.sight.image)
        actions.append(action)
        if outcome.ended:
            return images, actions, outcome.succeeded


def test_a_seed_is_an_episode_whatever_was_played_before_it() -> None:
    one, other = (BabyAI.make(level="BabyAI-GoToLocal-v0") for _ in range(2))
    for seed in range(5):
        episode(one, seed)
    (images, actions, well), again = episode(one, 7), episode(other, 7)
    assert well
    assert actions == again[1]
    assert all(np.array_equal(a, b) for a, b in zip(images, again[0], strict=True))


@pytest.mark.parametrize("level", ["BabyAI-GoToRedBallNoDists-v0", "BabyAI-GoToLocal-v0"])
def test_an_image_is_minigrids_own_where_the_agent_can_see(level: str) -> None:
    world = BabyAI.make(level=level, tile=4)
    for seed in range(8):
        seen = world.reset(seed).image
        environment = world._environment
        visible = np.kron(environment.gen_obs_grid()[1].T, np.ones((4, 4), dtype=np.uint8))
        drawn = environment.get_frame(tile_size=4, agent_pov=True)
        assert np.array_equal(seen, (drawn * visible[:, :, None]).transpose(2, 0, 1))


def test_it_has_an_expert_and_pictures_and_says_what_it_depends_on() -> None:
    world = BabyAI.make(tile=8)
    assert isinstance(world, Expert)
    assert isinstance(world, Pictured)
    assert world.reset(0).image.shape == (3, 56, 56)
    assert world.reset(0).instruction == "go to the red ball"
    assert [world.actions[action] for action in world.harmless] == ["left", "right", "forward"]
    assert world.fingerprint != BabyAI.make(tile=4).fingerprint
    assert world.picture().shape == (128, 128, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"level": "BabyAI-GoToNowhere-v0"}, "minigrid has no level 'BabyAI-GoToNowhere-v0'"),
        ({"level": "MiniGrid-Empty-5x5-v0"}, "the expert knows BabyAI's levels, but 'MiniGrid-Empty-5x5-v0' is none"),
        ({"tile": 0}, "a tile has at least a pixel, but tile=0"),
    ],
)
def test_other_worlds_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BabyAI.make(**options)  # type: ignore[arg-type]
