"""An expert's episodes are recorded, learnt from in windows, and played on unseen seeds: the same every time."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from corridor import Corridor
from shardwise.errors import ConfigError
from shardwise.tasks import (
    IGNORED_LABEL,
    Described,
    Headed,
    Imitation,
    Ordered,
    Played,
    Score,
    Scored,
    prepare_task,
    task_from,
)
from shardwise.tasks.demonstrations import Demonstrations, record

WINDOW = 4


def task(folder: Path, **more: object) -> Imitation:
    told = {"cache": str(folder), "simulator": "corridor:Corridor", "episodes": 24, "held_out_episodes": 6, **more}
    made = task_from("imitation", prepare_task("imitation", {"window": WINDOW, "stray": 0.3, **told}))
    assert isinstance(made, Imitation)
    return made


def recorded(folder: Path, seeds: range = range(24), *, stray: float = 0.3, **options: int) -> Demonstrations:
    folder.mkdir()
    record(folder, "train", Corridor(**options), seeds, stray=stray)
    return Demonstrations.open(folder, "train")


def test_an_episode_depends_on_its_seed_and_the_share_of_strayed_actions_alone(tmp_path: Path) -> None:
    all_of_them, three = recorded(tmp_path / "a"), recorded(tmp_path / "b", range(5, 8))
    first, last = all_of_them.starts[5], all_of_them.starts[8]
    for part in ("images", "wanted", "taken"):
        assert np.array_equal(getattr(all_of_them, part)[first:last], getattr(three, part))
    assert all_of_them.summary.instructions[5:8] == three.summary.instructions


def test_what_is_recorded_is_what_the_expert_wants_and_some_actions_stray(tmp_path: Path) -> None:
    found = recorded(tmp_path / "a")
    ends = np.repeat([text == "Go to the right end" for text in found.summary.instructions], found.lengths)
    assert np.array_equal(found.wanted, ends)
    share = (found.taken != found.wanted).mean()  # of strayed actions half are the expert's by chance
    assert 0.05 < share < 0.3
    assert np.array_equal(recorded(tmp_path / "b", stray=0.0).taken, recorded(tmp_path / "c", stray=0.0).wanted)


def test_episodes_in_which_the_expert_is_lost_are_left_out(tmp_path: Path) -> None:
    found = recorded(tmp_path / "a", lost=10)
    assert found.summary.num_failed == 10
    assert found.num_episodes == 14
    with pytest.raises(ConfigError, match="of 24 episodes of corridor 8 24 it did well in 0; use more episodes"):
        recorded(tmp_path / "b", lost=24)


def test_a_sample_shows_a_window_what_was_done_before_it_and_what_is_learnt(tmp_path: Path) -> None:
    made = task(tmp_path)
    episodes, windows = made.episodes["train"], made.windows["train"]
    index = int(np.argmax(windows.starts > 0))  # one that does not begin with its episode
    frame = int(episodes.starts[windows.episodes[index]] + windows.starts[index])
    sample = {name: tensor[0] for name, tensor in made.samples([index], "train").items()}
    assert np.array_equal(sample["images"], episodes.images[frame : frame + WINDOW])
    assert sample["previous"].tolist() == episodes.taken[frame - 1 : frame - 1 + WINDOW].tolist()
    kept = int(windows.learnt_from[index] - windows.starts[index])
    assert sample["target_actions"].tolist() == [
        *[IGNORED_LABEL] * kept,
        *episodes.wanted[frame + kept : frame + WINDOW],
    ]
    first = made.samples([0], "train")
    assert int(first["previous"][0, 0]) == len(Corridor.actions)


def test_a_batch_is_as_long_as_its_longest_window_and_every_action_is_learnt_once_an_epoch(tmp_path: Path) -> None:
    made = task(tmp_path)
    total = sum(made.weight(made.samples([i], "train")) for i in range(made.num_samples("train")))
    assert total == len(made.episodes["train"].wanted)
    lengths = made.windows["train"].ends - made.windows["train"].starts
    short = [int(i) for i in np.flatnonzero(lengths <= 2)[:3]]
    assert made.samples(short, "train")["images"].shape == (3, 2, 1, 8, 8)
    steps = made.num_samples("train") // 4
    drawn = sorted(i for step in range(steps) for i in made.indices(seed=0, step=step, global_batch=4))
    assert len(set(drawn)) == len(drawn)


def test_it_tells_of_its_episodes(tmp_path: Path) -> None:
    told = task(tmp_path, simulator_options={"lost": 4}).about()
    assert re.fullmatch(r"\d+ actions of 20 episodes, recorded at \d+ a second, 4 failed and left out", told), told


def test_it_is_a_task_that_is_scored_played_ordered_and_told_of(tmp_path: Path) -> None:
    made = task(tmp_path)
    assert all(isinstance(made, protocol) for protocol in (Scored, Played, Ordered, Headed, Described))
    assert made.head().inputs == {
        "num_actions": 3,
        "vocabulary_size": 8,  # end go left right the to, one that fills, one that is not known
        "num_channels": 1,
        "image_size": 8,
        "num_words": 5,
        "num_steps": WINDOW,
    }
    again = pickle.loads(pickle.dumps(made))
    assert torch.equal(again.samples([3], "train")["images"], made.samples([3], "train")["images"])


def played(made: Imitation, policy: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> tuple[Score, list[dict]]:
    """The score of a policy that gives logits (batch, steps, actions), and what it was shown."""
    game = made.play("held_out")
    shown = [dict(next(game))]
    try:
        while True:
            shown.append(dict(game.send(made.replies(policy(shown[-1]), shown[-1]))))
    except StopIteration as end:
        return end.value, shown


def obedient(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Goes where it is told: the third word is left or right, which are told apart by their numbers."""
    right = batch["instruction"][:, 3] == batch["instruction"][:, 3].max()
    logits = torch.nn.functional.one_hot(right.long(), 3).float()
    return logits[:, None].expand(-1, WINDOW, -1)


def test_a_policy_that_does_what_it_is_told_always_succeeds_and_one_that_gives_up_never(tmp_path: Path) -> None:
    made = task(tmp_path, play_episodes=12, play_together=5, film=str(tmp_path / "film.gif"), film_episodes=2)
    score, shown = played(made, obedient)
    assert score.figures["success"] == 1
    assert score.figures["steps"] == pytest.approx(np.mean([1 + s // 2 % 6 if s % 2 == 0 else 6 - s // 2 % 6
                                                            for s in range(2_000_000_000, 2_000_000_012)]))  # fmt: skip
    assert {tuple(batch["images"].shape) for batch in shown} == {(5, WINDOW, 1, 8, 8)}
    assert set(shown[0]) == set(made.samples([0], "train"))
    assert all((batch["target_actions"] == IGNORED_LABEL).all() for batch in shown)
    assert (tmp_path / "film.gif").read_bytes().startswith(b"GIF89a")
    lost, _ = played(made, lambda batch: torch.eye(3)[2].expand(5, WINDOW, 3))
    assert lost.figures == {"success": 0, "steps": 0}
    assert lost.report.count("not after 1 steps") == 12


def test_a_policy_is_shown_its_last_steps_and_is_heard_at_the_last_of_them(tmp_path: Path) -> None:
    made = task(tmp_path, play_episodes=1, play_together=1)

    def there_and_back(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Left at even steps of the window, right at odd ones: what is heard tells the step."""
        return torch.nn.functional.one_hot(torch.arange(WINDOW) % 2, 3).float()[None]

    _, shown = played(made, there_and_back)
    assert shown[0]["previous"].tolist() == [[3, 3, 3, 3]]
    assert shown[3]["previous"].tolist() == [[3, 0, 1, 0]]
    assert shown[5]["previous"].tolist() == [[1, 0, 1, 1]]  # of the full window the last step is heard: right


def test_agreement_is_the_share_of_steps_at_which_policy_and_expert_want_the_same(tmp_path: Path) -> None:
    made = task(tmp_path)
    indices = range(made.num_samples("held_out"))
    answers = []
    for i in indices:
        batch = made.samples([i], "held_out")
        wrong = (batch["target_actions"] + (1 if i == 0 else 0)).clamp(min=0)
        logits = torch.nn.functional.one_hot(wrong, 3).float()
        answers.append(made.answers(logits, batch)["actions"][0])
    steps = made.episodes["held_out"].wanted
    first = made.weight(made.samples([0], "held_out"))
    score = made.score({"actions": answers}, indices, "held_out")
    assert score.figures["agreement"] == pytest.approx(1 - first / len(steps))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"simulator": "babyay"}, "a simulator is one of babyai or package.module:factory, but got 'babyay'"),
        ({"simulator": "corridor:Nothing"}, "a simulator 'corridor:Nothing' names a module and a function in it"),
        ({"simulator": "corridor:WithoutExpert"}, "an expert is learnt from, but WithoutExpert has no `advice`"),
        ({"simulator_options": {"place": 3}}, "simulator_options are what corridor:Corridor is called with, but"),
        ({"stray": 1.0}, r"task.stray is a share of actions in \[0, 1\), but got 1.0"),
        ({"window": 0}, "task.window is counted from 1, but got 0"),
        ({"film": "film.mp4"}, "a film is a GIF of some episodes, but film='film.mp4'"),
        ({"film": "/dev/null/film.gif"}, "a film is written to /dev/null/film.gif, but"),
        (
            {"simulator": "corridor:Confused"},
            "actions are numbered from 0 to 2, but the expert of corridor 8 0 wants 7",
        ),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task(tmp_path, **options)
