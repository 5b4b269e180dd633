"""Dealing a global batch: every sample once, numbered by its row on every layout."""

from __future__ import annotations

import pytest
import torch

from shardwise.tasks import RandomTokens
from shardwise.train.shares import share

TASK = RandomTokens(num_train=20, ignored_fraction=0.5)
INDICES = (7, 3, 19, 0, 4, 11, 2, 9, 8, 1)


@pytest.mark.parametrize("replicas, num_micro_batches", [(1, 1), (2, 1), (1, 4), (2, 3), (5, 2)])
def test_every_sample_is_dealt_once_with_its_row_and_its_weight(replicas, num_micro_batches) -> None:
    dealt = [
        micro_batch
        for replica in range(replicas)
        for micro_batch in share(TASK, INDICES, replica=replica, replicas=replicas, num_micro_batches=num_micro_batches)
    ]
    whole = TASK.samples(INDICES, "train")
    assert [micro_batch.index for micro_batch in dealt] == list(range(replicas * num_micro_batches))
    assert [row for micro_batch in dealt for row in micro_batch.samples] == list(range(len(INDICES)))
    assert torch.equal(torch.cat([m.inputs["input_ids"] for m in dealt]), whole["input_ids"])
    assert sum(m.weight for m in dealt) == TASK.weight(whole)
    sizes = [len(m.samples) for m in dealt]
    assert max(sizes) - min(sizes) <= 1
