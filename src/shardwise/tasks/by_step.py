"""What a task may decide by the step: which samples it trains on, and how they look.

A task that says nothing is given a permutation an epoch (`sample_indices`), and its samples are the same in every
epoch. Both protocols are pure functions of (seed, step): no rank asks another, and a resumed run needs no state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from shardwise.tasks.sampler import permute, sample_indices
from shardwise.tasks.task import Split, Task

__all__ = ["Augmented", "Ordered", "Padded", "alike_indices", "indices_at", "samples_at"]


@runtime_checkable
class Ordered(Protocol):
    """A task that chooses the samples of a step itself: those of equal length together, rare ones more often."""

    def indices(self, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
        """Numbers of the training samples at `step`, (global_batch,), in batch order."""
        ...


@runtime_checkable
class Augmented(Protocol):
    """A task whose training samples look different in every step."""

    def augmented(self, indices: Sequence[int], *, seed: int, step: int) -> dict[str, Tensor]:
        """Like `Task.samples` of the training split; a sample depends on (seed, step, its own number) alone."""
        ...


@runtime_checkable
class Padded(Protocol):
    """A task whose samples are padded to the longest: that of the whole batch, or its random numbers would differ by
    layout, as a mask of dropout is drawn for a padded sample."""

    def padded(self, indices: Sequence[int], split: Split, *, batch: Sequence[int]) -> dict[str, Tensor]:
        """Like `Task.samples` of `indices`, with the lengths that all samples of `batch` together have."""
        ...


def indices_at(task: Task, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
    """Numbers of the global batch's training samples at `step`, counted from 0, in batch order."""
    if isinstance(task, Ordered):
        return task.indices(seed=seed, step=step, global_batch=global_batch)
    return sample_indices(seed=seed, step=step, global_batch=global_batch, num_samples=task.num_samples("train"))


def samples_at(
    task: Task, indices: Sequence[int], split: Split, *, seed: int, step: int, batch: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Samples as a step sees them, a part of those of its `batch`, all if not given; held-out ones always look the
    same."""
    if split == "train" and isinstance(task, Augmented):
        return task.augmented(indices, seed=seed, step=step)
    if isinstance(task, Padded):
        return task.padded(indices, split, batch=indices if batch is None else batch)
    return task.samples(indices, split)


def alike_indices(
    sizes: Sequence[int], *, seed: int, step: int, global_batch: int, num_batches: int = 32
) -> tuple[int, ...]:
    """Numbers of the samples at `step`, those of like `sizes` together; every sample once an epoch, as without it.

    The samples of `num_batches` steps are drawn as always, sorted by size, and dealt to these steps in a random order:

        drawn for steps 0..3   7 2 9 4 │ 1 8 3 3 │ 6 2 5 9 │ 1 4 8 2        sizes of the samples
        sorted, dealt          1 1 2 2 │ 6 7 8 8 │ 2 3 3 4 │ 4 5 9 9
    """
    num_batches = max(1, min(num_batches, len(sizes) // global_batch))  # else a sample meets itself
    pool, number = divmod(step, num_batches)
    drawn = sample_indices(seed=seed, step=pool, global_batch=global_batch * num_batches, num_samples=len(sizes))
    alike = sorted(drawn, key=lambda index: sizes[index])
    place = int(permute(np.array([number], dtype=np.uint64), seed=seed, epoch=-1 - pool, num_samples=num_batches)[0])
    return tuple(alike[place * global_batch : (place + 1) * global_batch])
