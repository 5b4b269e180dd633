"""Dealing a global batch: every sample once, numbered by its row on every layout."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from shardwise.tasks import Batch, RandomTokens, Split
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


def test_replicas_that_normalise_together_have_neighbours_in_the_same_micro_batch() -> None:
    first, second = (
        share(TASK, INDICES[:8], replica=replica, replicas=2, num_micro_batches=2, together=True)
        for replica in range(2)
    )
    assert [m.samples for m in first] == [(0, 1), (4, 5)]
    assert [m.samples for m in second] == [(2, 3), (6, 7)]


class Ragged(RandomTokens):
    """A sample has as many tokens as its number says, and is padded to the longest of its batch."""

    def padded(self, indices: Sequence[int], split: Split, *, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.stack([torch.arange(max(batch)) * (torch.arange(max(batch)) < i) for i in indices])}

    def weight(self, batch: Batch) -> float:
        return float(len(batch["input_ids"]))


@pytest.mark.parametrize("replicas, num_micro_batches", [(1, 1), (2, 1), (2, 3)])
def test_samples_are_padded_alike_on_every_layout(replicas, num_micro_batches) -> None:
    task = Ragged(num_train=20)
    (whole,) = share(task, INDICES, replica=0, replicas=1, num_micro_batches=1)
    for replica in range(replicas):
        for part in share(task, INDICES, replica=replica, replicas=replicas, num_micro_batches=num_micro_batches):
            assert torch.equal(part.inputs["input_ids"], whole.inputs["input_ids"][list(part.samples)])


def test_held_out_samples_keep_their_own_numbers() -> None:
    parts = share(TASK, range(5, 9), split="held_out", replica=1, replicas=2, num_micro_batches=1)
    assert [m.samples for m in parts] == [(7, 8)]


def test_replicas_with_shares_are_dealt_their_own_numbers_of_equal_parts() -> None:
    dealt = [
        share(TASK, INDICES[:8], replica=replica, replicas=2, num_micro_batches=2, shares=(3, 1)) for replica in (0, 1)
    ]
    assert [[m.samples for m in own] for own in dealt] == [[(0, 1), (2, 3), (4, 5)], [(6, 7)]]
