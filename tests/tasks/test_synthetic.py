"""Random tokens are a function of (seed, split, sample), equal on every machine."""

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.tasks import IGNORED_LABEL, RandomTokens


def test_samples_do_not_depend_on_the_batch_they_come_in() -> None:
    task = RandomTokens(ignored_fraction=0.5)
    together = task.samples([4, 9, 4], "train")
    for row, i in enumerate([4, 9, 4]):
        for name, alone in task.samples([i], "train").items():
            assert torch.equal(together[name][row : row + 1], alone)


def test_seed_split_and_sample_change_the_tokens() -> None:
    task, other = RandomTokens(seed=0), RandomTokens(seed=1)
    tokens = task.samples([0], "train")["input_ids"]
    assert not torch.equal(tokens, other.samples([0], "train")["input_ids"])
    assert not torch.equal(tokens, task.samples([0], "held_out")["input_ids"])
    assert not torch.equal(tokens, task.samples([1], "train")["input_ids"])


def test_the_tokens_are_the_same_on_every_machine_and_version() -> None:
    found = RandomTokens(seed=3, sequence_length=6).samples([2], "train")["input_ids"]
    assert found.tolist() == [[62, 24, 47, 14, 52, 27]]


def test_tokens_are_uniform_over_the_vocabulary() -> None:
    task = RandomTokens(vocabulary_size=7, num_train=2000)
    tokens = task.samples(range(2000), "train")["input_ids"]
    assert tokens.shape == (2000, 16)
    counts = torch.bincount(tokens.flatten(), minlength=7).double()
    assert len(counts) == 7
    assert counts.min() / counts.max() > 0.9


@pytest.mark.parametrize("fraction, expected", [(0.0, 15.0), (0.5, 8.0), (1.0, 1.0)])
def test_ignored_labels_make_samples_weigh_differently_but_never_nothing(fraction: float, expected: float) -> None:
    task = RandomTokens(ignored_fraction=fraction)
    weights = [task.weight(task.samples([i], "train")) for i in range(256)]
    assert sum(weights) / 256 == pytest.approx(expected, abs=0.5)  # 4 standard errors of the mean
    assert min(weights) >= 1
    assert (len(set(weights)) > 3) == (fraction == 0.5)
    labels = task.samples([0], "train")["labels"]
    counted = labels != IGNORED_LABEL
    assert torch.equal(labels[counted], task.samples([0], "train")["input_ids"][counted])


@pytest.mark.parametrize(
    "options", [{"vocabulary_size": 0}, {"num_train": 0}, {"num_held_out": -1}, {"sequence_length": 1}]
)
def test_sizes_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        RandomTokens(**options)


def test_a_fraction_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="ignored_fraction"):
        RandomTokens(ignored_fraction=1.5)


def test_an_absent_split_has_no_samples() -> None:
    task = RandomTokens(num_held_out=0)
    assert task.num_samples("held_out") == 0
    with pytest.raises(ConfigError, match="held_out has 0 samples"):
        task.samples([0], "held_out")
