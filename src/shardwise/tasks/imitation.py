"""Learning what an expert does: image and instruction to action, and how often the policy then does what it is told.

    recorded episodes ──windows of steps──► images, instruction, previous actions ──► the expert's action at every step
    unseen seeds ──► worlds ──the last steps──► the policy ──► its best action ──► worlds … ──► success

It knows episodes, words and worlds; it refuses to know models, ranks and micro-batches.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.quantities import format_count
from shardwise.tasks.by_step import alike_indices
from shardwise.tasks.cache import content_key, filled_folder
from shardwise.tasks.demonstrations import Demonstrations, record
from shardwise.tasks.film import Frame, check_film, write_film
from shardwise.tasks.head import ModelHead
from shardwise.tasks.played import Game
from shardwise.tasks.playing import Episode, Seat, score_of
from shardwise.tasks.scored import Answers, Score
from shardwise.tasks.simulator import Expert, Pictured, Simulator, simulator_from
from shardwise.tasks.task import IGNORED_LABEL, SPLITS, Batch, Split, check_indices, class_loss, label_count, logits_of
from shardwise.tasks.windows import Windows, windows_of
from shardwise.tasks.words import Words

__all__ = ["Imitation", "ImitationOptions", "Playing", "PreparedImitation"]

_FORMAT = "demonstrations-1"  # a new number makes recordings of older versions unused
_SUMMARY_FILE = "imitation.json"
_MOST = 1_000_000_000  # episodes of a split
_FIRST_SEED: Mapping[Split, int] = {"train": 0, "held_out": _MOST}
_FIRST_PLAYED = 2 * _MOST  # no episode that is played has the seed of one that was recorded
_STEPS_TO = 2  # steps of a batch are a multiple of it: every new number of steps is traced once
_ACTIONS = "target_actions"  # of a batch: for the loss alone


@dataclass(frozen=True, kw_only=True)
class ImitationOptions:
    """Which world is learnt in, and how it is played afterwards.

    simulator            "babyai", or "package.module:factory", called with `simulator_options`; see `Expert`
    episodes             recorded of the expert, to learn from; `held_out_episodes` besides, for the loss
    stray                the share of recorded actions that are not the expert's: so it shows how to come back
    window               steps that the policy looks at: the last one and those before it
    alike                batches whose windows are sorted by length together, so that little is filled up
    play_episodes        unseen seeds that an evaluation plays, `play_together` of them at a time
    film, film_episodes  a GIF of the first played ones; empty: none
    """

    cache: str
    simulator: str
    simulator_options: dict[str, Any] = field(default_factory=dict)
    episodes: int = 1000
    held_out_episodes: int = 100
    stray: float = 0.1
    window: int = 8
    alike: int = 32
    play_episodes: int = 200
    play_together: int = 40
    film: str = ""
    film_episodes: int = 4

    def __post_init__(self) -> None:
        for name in ("episodes", "held_out_episodes", "window", "alike", "play_episodes", "play_together"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ConfigError(f"task.{name} is counted from 1, but got {getattr(self, name)}; use 1 or more")
        if not 0 <= self.stray < 1:
            raise ConfigError(f"task.stray is a share of actions in [0, 1), but got {self.stray}; use 0.1")
        if self.film_episodes < 0 or (self.film and Path(self.film).suffix != ".gif"):
            raise ConfigError(
                f"a film is a GIF of some episodes, but film={self.film!r} and film_episodes={self.film_episodes}; "
                'write film = "episodes.gif"'
            )

    @property
    def playing(self) -> Playing:
        """What the task needs to play."""
        names = ("simulator", "simulator_options", "play_episodes", "play_together", "film", "film_episodes")
        return Playing(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class Playing:
    """How an evaluation plays; see `ImitationOptions`."""

    simulator: str
    simulator_options: dict[str, Any]
    play_episodes: int
    play_together: int
    film: str = ""
    film_episodes: int = 0


@dataclass(frozen=True, kw_only=True)
class PreparedImitation:
    """What a rank needs to open recorded episodes."""

    folder: str
    window: int
    alike: int
    playing: Playing


@dataclass(frozen=True, kw_only=True)
class ImitationSummary:
    """What is known of recorded episodes of both splits."""

    fingerprint: str
    actions: tuple[str, ...]
    words: tuple[str, ...]
    longest: int  # words of an instruction


@dataclass(frozen=True, kw_only=True, eq=False)
class Imitation:
    """A task over recorded episodes; a sample is a window of an episode. Memory-mapped; pickles as its path."""

    counts: ClassVar[str] = "actions"  # see `Counted`

    prepared: PreparedImitation
    summary: ImitationSummary
    episodes: Mapping[Split, Demonstrations] = field(repr=False)
    windows: Mapping[Split, Windows] = field(repr=False)

    @staticmethod
    def prepare(options: ImitationOptions) -> PreparedImitation:
        """Record, or find what was recorded. Raises ConfigError for a world without an expert, or without pictures."""
        world = simulator_from(options.simulator, options.simulator_options)
        if not isinstance(world, Expert):
            raise ConfigError(
                f"an expert is learnt from, but {type(world).__name__} has no `advice`; give the world one, see "
                "shardwise.tasks.Expert"
            )
        if options.film and not isinstance(world, Pictured):
            raise ConfigError(f"a film needs pictures, but {type(world).__name__} has none; drop task.film")
        if options.film:
            check_film(Path(options.film))
        told = (options.episodes, options.held_out_episodes, options.stray)
        key = content_key([_FORMAT, world.fingerprint, *map(str, told)])
        folder = filled_folder(Path(options.cache) / f"demonstrations-{key}", _filler(world, options, key)).resolve()
        return PreparedImitation(
            folder=str(folder), window=options.window, alike=options.alike, playing=options.playing
        )

    @classmethod
    def open(cls, prepared: PreparedImitation) -> Imitation:
        """The task over a prepared folder. Raises ConfigError for a folder that `prepare` did not make."""
        folder = Path(prepared.folder)
        try:
            told = json.loads((folder / _SUMMARY_FILE).read_text(encoding="utf-8"))
            summary = ImitationSummary(**told | {name: tuple(told[name]) for name in ("actions", "words")})
            episodes = {split: Demonstrations.open(folder, split) for split in SPLITS}
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"episodes are opened from a folder that was prepared; {folder} holds none ({error}); prepare it first"
            ) from error
        windows = {split: windows_of(episodes[split].lengths, prepared.window) for split in SPLITS}
        return cls(prepared=prepared, summary=summary, episodes=episodes, windows=windows)

    @property
    def words(self) -> Words:
        """How instructions become numbers."""
        return Words(words=self.summary.words, longest=self.summary.longest)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.episodes["train"].summary.image_shape

    def num_samples(self, split: Split) -> int:
        """Windows of a split."""
        return len(self.windows[split])

    def about(self) -> str:
        """Episodes, and how fast they were recorded."""
        episodes = self.episodes["train"]
        told = episodes.summary
        rate = (episodes.num_episodes + told.num_failed) / max(told.seconds, 1e-9)
        failed = f", {told.num_failed} failed and left out" if told.num_failed else ""
        return (
            f"{format_count(len(episodes.wanted), 'actions')} of {format_count(episodes.num_episodes, 'episodes')}, "
            f"recorded at {rate:.0f} a second{failed}"
        )

    def head(self) -> ModelHead:
        """What a factory, or a config without values, is told of the data where the run does not say it."""
        channels, height, width = self.image_shape
        inputs = {
            "num_actions": len(self.summary.actions),
            "vocabulary_size": self.words.num_numbers,
            "num_channels": channels,
            "image_size": height if height == width else (height, width),
            "num_words": self.summary.longest,
            "num_steps": self.prepared.window,
        }
        return ModelHead(family="", inputs=inputs)

    def indices(self, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
        """Windows of like length."""
        windows = self.windows["train"]
        lengths = (windows.ends - windows.starts).tolist()
        return alike_indices(lengths, seed=seed, step=step, global_batch=global_batch, num_batches=self.prepared.alike)

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """images          uint8 (batch, steps of the longest, channels, height, width); 0 behind an episode's end
        instruction     int64 (batch, words), see `Words`
        previous        int64 (batch, steps): the action taken before each step; num_actions before the first
        target_actions  int64 (batch, steps): the expert's action; IGNORED_LABEL where it is not learnt from here
        """
        check_indices(indices, num_samples=self.num_samples(split), split=split)
        episodes, windows = self.episodes[split], self.windows[split]
        longest = max((int(windows.ends[index] - windows.starts[index]) for index in indices), default=1)
        batch = self._empty(len(indices), steps=-(-longest // _STEPS_TO) * _STEPS_TO)
        for row, index in enumerate(indices):
            episode, start, learnt = (int(v[index]) for v in (windows.episodes, windows.starts, windows.learnt_from))
            steps = int(windows.ends[index]) - start
            frame = int(episodes.starts[episode]) + start
            batch["images"][row, :steps] = episodes.images[frame : frame + steps]
            batch[_ACTIONS][row, learnt - start : steps] = episodes.wanted[frame + learnt - start : frame + steps]
            before = 0 if start else 1  # nothing was done before an episode's first step
            batch["previous"][row, before:steps] = episodes.taken[frame + before - 1 : frame + steps - 1]
        texts = [episodes.summary.instructions[windows.episodes[index]] for index in indices]
        batch["instruction"][:] = self.words.numbers(texts)
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The model's own loss, else cross entropy of its logits (batch, steps, actions); nats per action, scalar."""
        return class_loss(outputs, {"labels": batch[_ACTIONS]})

    def weight(self, batch: Batch) -> float:
        """Actions that are learnt."""
        return label_count({"labels": batch[_ACTIONS]})

    def metrics(self, loss: float) -> dict[str, float]:
        """None: figures come from `score` and `play`."""
        return {}

    def answers(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """`actions`: the best one at every step, int16 (batch, steps); -1 where it does not count."""
        best = logits_of(outputs).argmax(-1)
        counted = batch[_ACTIONS].to(best.device) != IGNORED_LABEL
        return {"actions": torch.where(counted, best, -1).to(torch.int16)}

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        """`agreement`: the share of steps of recorded episodes whose best action is the expert's."""
        right = counted = 0
        for index, best in zip(indices, answers["actions"], strict=True):
            wanted = self.samples([index], split)[_ACTIONS][0]
            learnt = wanted != IGNORED_LABEL
            right += int((best[: len(wanted)].to(wanted.dtype) == wanted)[learnt].sum())
            counted += int(learnt.sum())
        return Score(figures={"agreement": right / counted})

    def replies(self, outputs: object, batch: Batch) -> dict[str, Tensor]:
        """`actions`: the best one at every step, int16 (batch, steps)."""
        return {"actions": logits_of(outputs).argmax(-1).to(torch.int16)}

    def play(self, split: Split) -> Game:
        """Every unseen seed once: `success` and `steps`, see `score_of`."""
        playing, start = self.prepared.playing, len(self.summary.actions)
        seeds = iter(range(_FIRST_PLAYED, _FIRST_PLAYED + playing.play_episodes))
        filmed = frozenset(range(_FIRST_PLAYED, _FIRST_PLAYED + (playing.film_episodes if playing.film else 0)))
        seats = [
            Seat(world=self._world(), seeds=seeds, window=self.prepared.window, filmed=filmed)
            for _ in range(min(playing.play_together, playing.play_episodes))
        ]
        for seat in seats:
            seat.begin(start)
        played: list[Episode] = []
        films: dict[int, list[Frame]] = {}
        while any(seat.seed is not None for seat in seats):
            replies = yield self._shown(seats)
            for seat, row in zip(seats, replies["actions"].tolist(), strict=True):
                ended = seat.act(row[len(seat.images) - 1]) if seat.seed is not None else None
                if ended is not None:
                    played.append(ended)
                    films[ended.seed], seat.frames = seat.frames, []
                    seat.begin(start)
        if filmed:
            write_film(Path(playing.film), [frame for seed in sorted(filmed & films.keys()) for frame in films[seed]])
        return score_of(played)

    def _world(self) -> Simulator:
        return simulator_from(self.prepared.playing.simulator, self.prepared.playing.simulator_options)

    def _shown(self, seats: Sequence[Seat]) -> dict[str, Tensor]:
        """What the policy is shown of worlds: as `samples`, of as many steps all the time, none of which count."""
        batch = self._empty(len(seats), steps=self.prepared.window)
        for row, seat in enumerate(seats):
            batch["images"][row, : len(seat.images)] = seat.images
            batch["previous"][row, : len(seat.taken)] = seat.taken
        batch["instruction"][:] = self.words.numbers([seat.instruction for seat in seats])
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def _empty(self, rows: int, *, steps: int) -> dict[str, NDArray[Any]]:
        return {
            "images": np.zeros((rows, steps, *self.image_shape), dtype=np.uint8),
            "instruction": np.zeros((rows, self.summary.longest), dtype=np.int64),
            "previous": np.full((rows, steps), len(self.summary.actions), dtype=np.int64),
            _ACTIONS: np.full((rows, steps), IGNORED_LABEL, dtype=np.int64),
        }

    def __reduce__(self) -> tuple[Callable[[PreparedImitation], Imitation], tuple[PreparedImitation]]:
        return Imitation.open, (self.prepared,)


def _filler(world: Expert, options: ImitationOptions, key: str) -> Callable[[Path], None]:
    """A function that records both splits into an empty folder."""
    counts: Mapping[Split, int] = {"train": options.episodes, "held_out": options.held_out_episodes}

    def fill(folder: Path) -> None:
        for split, count in counts.items():
            first = _FIRST_SEED[split]
            record(folder, split, world, range(first, first + count), stray=options.stray)
        words = Words.of(Demonstrations.open(folder, "train").summary.instructions)
        summary = ImitationSummary(
            fingerprint=key, actions=tuple(world.actions), words=words.words, longest=max(1, words.longest)
        )
        (folder / _SUMMARY_FILE).write_text(json.dumps(asdict(summary), indent=1), encoding="utf-8")

    return fill
