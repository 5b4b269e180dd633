"""Episodes are cut into windows; every step is learnt from once, in the window that shows most before it."""

from __future__ import annotations

import pytest

from shardwise.tasks.windows import windows_of


def drawn(length: int, steps: int) -> list[str]:
    """A letter a step, a line a window; capitals are learnt."""
    windows = windows_of([length], steps)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        "".join(letters[t].upper() if t >= windows.learnt_from[w] else letters[t]
                for t in range(windows.starts[w], windows.ends[w]))
        for w in range(len(windows))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "length, steps, picture",
    [
        (7, 4, "ABCD cdEF defG"),
        (4, 4, "ABCD"),
        (2, 4, "AB"),
        (3, 1, "A B C"),
        (5, 2, "AB bC cD dE"),
        (6, 3, "ABC bcD cdE deF"),
    ],
)
def test_windows_of_an_episode(length: int, steps: int, picture: str) -> None:
    assert drawn(length, steps) == picture.split()


def test_episodes_follow_each_other_and_every_step_is_learnt_once() -> None:
    lengths = [5, 1, 13, 8]
    windows = windows_of(lengths, 6)
    learnt = [
        (int(e), t)
        for e, a, b in zip(windows.episodes, windows.learnt_from, windows.ends, strict=True)
        for t in range(a, b)
    ]
    assert learnt == [(e, t) for e, length in enumerate(lengths) for t in range(length)]
    assert (windows.ends - windows.starts).max() == 6
