"""Episodes of an expert: recorded in a simulated world, stored, read by the step.

    seed ──► world ──► image, what the expert would do ──► that is done, or now and then something else ──► world …

It knows worlds and files; it refuses to know what is learnt from them. An episode depends on the world, its seed and
the share of strayed actions alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.mixing import derive_keys, mix
from shardwise.tasks.simulator import Expert

__all__ = ["Demonstrations", "record"]

_LONGEST = 10_000  # steps of an episode, at most: a world that never ends is a fault of it


@dataclass(frozen=True, kw_only=True)
class RecordSummary:
    """What is known of recorded episodes."""

    instructions: tuple[str, ...]  # of every episode
    image_shape: tuple[int, int, int]  # channels, height, width
    num_failed: int  # episodes in which the expert did not do what it was told: they are left out
    seconds: float  # that recording took


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations:
    """Episodes of different lengths, one behind another. Frame `starts[e] + t` is step t of episode e."""

    summary: RecordSummary
    images: NDArray[np.uint8]  # (frames, channels, height, width)
    wanted: NDArray[np.int64]  # (frames,): what the expert would do
    taken: NDArray[np.int64]  # (frames,): what was done
    starts: NDArray[np.int64]  # (episodes + 1,)

    @property
    def num_episodes(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(episodes,): steps"""
        return np.diff(self.starts)

    @classmethod
    def open(cls, folder: Path, name: str) -> Demonstrations:
        """What `record` wrote under the name. Raises OSError, ValueError, TypeError or KeyError for what it did not."""
        told = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        summary = RecordSummary(**told | {key: tuple(told[key]) for key in ("instructions", "image_shape")})
        wanted, taken, starts = (
            np.load(folder / f"{name}-{part}.npy", allow_pickle=False) for part in ("wanted", "taken", "starts")
        )
        shape = (len(wanted), *summary.image_shape)
        images = np.memmap(folder / f"{name}-images.bin", dtype=np.uint8, mode="r", shape=shape)
        return cls(summary=summary, images=images, wanted=wanted, taken=taken, starts=starts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Episode:
    instruction: str
    images: list[NDArray[np.uint8]]
    wanted: list[int]
    taken: list[int]


def record(folder: Path, name: str, world: Expert, seeds: Sequence[int], *, stray: float) -> None:
    """Episodes of `seeds` into files of a folder, in this order; `stray` is the share of actions that are not the
    expert's. Raises ConfigError where not one comes out well, and for images that are none."""
    began, failed = time.perf_counter(), 0
    shape: tuple[int, ...] | None = None
    instructions: list[str] = []
    wanted: list[int] = []
    taken: list[int] = []
    starts = [0]
    with (folder / f"{name}-images.bin").open("wb") as images:
        for seed in seeds:
            episode = _recorded(world, seed, stray)
            if episode is None:
                failed += 1
                continue
            for image in episode.images:
                shape = shape or image.shape
                _check_image(image, shape)
                images.write(image.tobytes())
            instructions.append(episode.instruction)
            wanted += episode.wanted
            taken += episode.taken
            starts.append(len(wanted))
    if shape is None:
        raise ConfigError(
            f"an expert is learnt from, but of {len(seeds)} episodes of {world.fingerprint} it did well in 0; use more "
            "episodes, a smaller task.stray or another world"
        )
    for part, values in (("wanted", wanted), ("taken", taken), ("starts", starts)):
        np.save(folder / f"{name}-{part}.npy", np.array(values, dtype=np.int64))
    summary = RecordSummary(
        instructions=tuple(instructions),
        image_shape=(shape[0], shape[1], shape[2]),
        num_failed=failed,
        seconds=round(time.perf_counter() - began, 3),
    )
    (folder / f"{name}.json").write_text(json.dumps(asdict(summary)), encoding="utf-8")


def _recorded(world: Expert, seed: int, stray: float) -> _Episode | None:
    """The episode of a seed; None where the expert is at a loss, or runs out of time."""
    keys = derive_keys("stray", seed)
    harmless = world.harmless
    sight = world.reset(seed)
    episode = _Episode(instruction=sight.instruction, images=[], wanted=[], taken=[])
    for step in range(_LONGEST):
        wanted = world.advice()
        if wanted is None:
            return None
        if not 0 <= wanted < len(world.actions):
            raise ConfigError(
                f"actions are numbered from 0 to {len(world.actions) - 1}, but the expert of {world.fingerprint} wants "
                f"{wanted}; correct its `advice`"
            )
        drawn, other = (mix(mix(keys[:2] + np.uint64(step)) ^ keys[:2]) >> np.uint64(11)).tolist()
        taken = harmless[other % len(harmless)] if drawn < stray * 2**53 else wanted
        episode.images.append(sight.image)
        episode.wanted.append(wanted)
        episode.taken.append(taken)
        outcome = world.step(taken)
        sight = outcome.sight
        if outcome.ended:
            return episode if outcome.succeeded else None
    raise ConfigError(
        f"an episode ends, but that of seed {seed} of {world.fingerprint} has not after {_LONGEST} steps; give the "
        "world a limit"
    )


def _check_image(image: NDArray[np.uint8], shape: tuple[int, ...]) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape != shape:
        raise ConfigError(
            f"a world shows uint8 images of one shape (channels, height, width), but one is {image.dtype} "
            f"{image.shape} beside {shape}; correct its Sight"
        )
