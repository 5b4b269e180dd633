"""Episodes cut into windows of so many steps. Every step is learnt from once, in the window that shows most before it.

window of 4     a b c d e f g        an episode of 7 steps
                A B C D              learnt: A B C D
                    c d E F          c and d are shown again, as what was before
                      d e f G        the last one ends with the episode
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Windows", "windows_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """[window]: which episode, its first step, the first that is learnt from, and the one behind its last."""

    episodes: NDArray[np.int64]
    starts: NDArray[np.int64]
    learnt_from: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.episodes)


def windows_of(lengths: Sequence[int] | NDArray[np.int64], steps: int) -> Windows:
    """The windows of episodes of these lengths, in order."""
    rows: list[tuple[int, int, int, int]] = []
    new = max(1, steps // 2)  # steps that a further window adds
    for episode, length in enumerate(map(int, lengths)):
        learnt = 0
        while learnt < length:
            end = min(length, steps if learnt == 0 else learnt + new)
            rows.append((episode, max(0, end - steps), learnt, end))
            learnt = end
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return Windows(episodes=table[:, 0], starts=table[:, 1], learnt_from=table[:, 2], ends=table[:, 3])
