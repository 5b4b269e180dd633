"""Packing counts every token once and gives every sample the same shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.tasks.packing import PackedTokens
from shardwise.tasks.task import IGNORED_LABEL, label_count


def packed(num_tokens: int, sequence_length: int) -> PackedTokens:
    stream = np.arange(num_tokens, dtype=np.uint16)
    return PackedTokens(stream=stream, sequence_length=sequence_length)


def test_the_last_sample_reaches_back_and_counts_nothing_twice() -> None:
    #   stream   0 1 2 3 | 4 5 6 7 | 8 9
    found = packed(10, 4).batch([0, 1, 2])
    assert found["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert found["labels"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [-100, -100, 8, 9]]


@settings(max_examples=100)
@given(num_tokens=st.integers(0, 300), sequence_length=st.integers(2, 40))
def test_every_token_is_a_label_exactly_once(num_tokens: int, sequence_length: int) -> None:
    samples = packed(num_tokens, sequence_length)
    if num_tokens < sequence_length:
        assert samples.num_samples == 0
        return
    found = samples.batch(range(samples.num_samples))
    labels = found["labels"]
    counted = labels != IGNORED_LABEL
    assert labels[counted].tolist() == list(range(num_tokens))
    assert (found["input_ids"][counted] == labels[counted]).all()
    assert all(label_count({"labels": row[None]}, shifted=True) >= 1 for row in labels)


def test_batches_are_int64_and_follow_the_order_asked_for() -> None:
    found = packed(10, 4).batch([2, 0, 2])
    assert found["input_ids"][:, 0].tolist() == [6, 0, 6]
    assert {str(tensor.dtype) for tensor in found.values()} == {"torch.int64"}
    assert packed(10, 4).batch([])["input_ids"].shape == (0, 4)


def test_a_sequence_of_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_length=1"):
        packed(10, 1)
