"""A replica's share of a global batch, as micro-batches. Pure of (samples, replica): no rank asks another.

rows of the batch   0 1 2 3 │ 4 5 6 7 │ 8 9 …        micro-batch index = replica * num_micro_batches + m
replica, m             0, 0 │    0, 1 │ 1, 0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardwise.errors import ConfigError
from shardwise.execute.batches import MicroBatch, own_parts
from shardwise.tasks import Batch, Split, Task, samples_at

__all__ = ["micro_batches_of", "share"]


def micro_batches_of(rows: int, *, replicas: int, at_most: int) -> int:
    """How many micro-batches a replica makes of its part of so many rows. Raises `ConfigError` for too few rows."""
    if rows < replicas:
        raise ConfigError(
            f"a batch that is played has a row for every replica, but {rows} rows are for {replicas} replicas; yield "
            "as many, of which some do not count"
        )
    return min(at_most, rows // replicas)


def share(
    task: Task,
    indices: Sequence[int],
    *,
    split: Split = "train",
    replica: int,
    replicas: int,
    num_micro_batches: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
    step: int = 0,
    together: bool = False,
    shares: Sequence[int] | None = None,
    given: Batch | None = None,
) -> tuple[MicroBatch, ...]:
    """The micro-batches of one replica out of the global batch of samples `indices`; only they are read.

    Needs at least replicas * num_micro_batches samples; sizes differ by one sample at most. Samples are numbered by
    their row in the global batch, on which dropout depends, and not by the layout; held-out ones by their own
    numbers: which are evaluated together does not matter. `seed` and `step` are for tasks whose samples look different
    in every step. `together`, `shares`: as in `own_parts`. `given`: the samples, where the task does not have them.
    """
    parts = replicas * num_micro_batches
    made: list[MicroBatch] = []
    for index in own_parts(replica, replicas, num_micro_batches, together=together, shares=shares):
        rows = range(len(indices) * index // parts, len(indices) * (index + 1) // parts)
        if given is None:
            batch = samples_at(task, [indices[row] for row in rows], split, seed=seed, step=step, batch=indices)
        else:
            batch = {name: tensor[rows.start : rows.stop] if tensor.dim() else tensor for name, tensor in given.items()}
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        samples = tuple(rows) if split == "train" else tuple(indices[row] for row in rows)
        made.append(MicroBatch(index=index, samples=samples, inputs=inputs, weight=task.weight(batch)))
    return tuple(made)
