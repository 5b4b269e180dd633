"""What a task decides by the step: samples of like size together, each once an epoch, and samples that change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from shardwise.tasks import RandomTokens, alike_indices, indices_at, sample_indices, samples_at


@dataclass(frozen=True, kw_only=True)
class Shifted(RandomTokens):
    """Chooses samples backwards, and adds the step to every token."""

    def indices(self, *, seed: int, step: int, global_batch: int) -> tuple[int, ...]:
        return tuple(range(global_batch))[::-1]

    def augmented(self, indices: Sequence[int], *, seed: int, step: int) -> dict[str, Tensor]:
        batch = self.samples(indices, "train")
        return {**batch, "input_ids": batch["input_ids"] + step}


def test_a_task_without_an_order_is_given_the_samplers() -> None:
    task = RandomTokens(num_train=40)
    wanted = sample_indices(seed=3, step=5, global_batch=8, num_samples=40)
    assert indices_at(task, seed=3, step=5, global_batch=8) == wanted
    assert torch.equal(
        samples_at(task, wanted, "train", seed=3, step=5)["labels"], task.samples(wanted, "train")["labels"]
    )


def test_a_task_with_an_order_is_asked_for_it_and_its_training_samples_change_by_the_step() -> None:
    task = Shifted()
    assert indices_at(task, seed=0, step=9, global_batch=4) == (3, 2, 1, 0)
    plain = task.samples([1], "train")["input_ids"]
    assert torch.equal(samples_at(task, [1], "train", seed=0, step=2)["input_ids"], plain + 2)
    held_out = task.samples([1], "held_out")["input_ids"]
    assert torch.equal(samples_at(task, [1], "held_out", seed=0, step=2)["input_ids"], held_out)


SIZES = [(7 * sample) % 31 for sample in range(64)]


@pytest.mark.parametrize("num_batches", [1, 4, 8])
def test_samples_of_like_size_come_together_and_all_of_them_once_an_epoch(num_batches: int) -> None:
    steps = [alike_indices(SIZES, seed=2, step=s, global_batch=8, num_batches=num_batches) for s in range(8)]
    assert all(len(step) == 8 for step in steps)
    assert Counter(i for step in steps for i in step) == Counter(range(64))
    spread = sum(max(SIZES[i] for i in step) - min(SIZES[i] for i in step) for step in steps)
    drawn = [sample_indices(seed=2, step=s, global_batch=8, num_samples=64) for s in range(8)]
    alone = sum(max(SIZES[i] for i in step) - min(SIZES[i] for i in step) for step in drawn)
    assert spread <= alone if num_batches == 1 else spread < alone / 2


def test_the_batches_of_a_pool_come_in_no_order_of_size() -> None:
    def totals(seed: int) -> list[int]:
        steps = [alike_indices(SIZES, seed=seed, step=s, global_batch=8, num_batches=8) for s in range(8)]
        return [sum(SIZES[i] for i in step) for step in steps]

    assert totals(2) != sorted(totals(2))
    assert totals(2) != totals(3)
