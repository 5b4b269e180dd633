"""A long stream of tokens seen as samples of equal length, without padding and without losing a token.

    stream      a b c d e f g h i j          sequence_length 4
    sample 0    a b c d        labels  a b c d
    sample 1    e f g h        labels  e f g h
    sample 2    g h i j        labels  - - i j

The last sample reaches back over tokens of the one before it and does not count them again: every token is
counted exactly once, every sample has the same shape, and every sample has a label that counts. It knows
arrays of integers; it refuses to know text, files and splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.task import IGNORED_LABEL

__all__ = ["PackedTokens", "check_sequence_length"]

_MIN_SEQUENCE_LENGTH = 2  # one token to read and one to predict


def check_sequence_length(sequence_length: int) -> None:
    """Raise ConfigError for a sequence in which nothing can be predicted."""
    if sequence_length < _MIN_SEQUENCE_LENGTH:
        raise ConfigError(
            f"a sequence holds a token to read and one to predict; got sequence_length={sequence_length}; "
            f"use {_MIN_SEQUENCE_LENGTH} or more"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """A stream (num_tokens,) of unsigned integers, maybe memory-mapped, seen as samples of equal length."""

    stream: NDArray[np.unsignedinteger]
    sequence_length: int

    def __post_init__(self) -> None:
        check_sequence_length(self.sequence_length)

    @property
    def num_samples(self) -> int:
        """Samples that together count every token; 0 for a stream shorter than one sequence."""
        num_tokens = len(self.stream)
        return -(-num_tokens // self.sequence_length) if num_tokens >= self.sequence_length else 0

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` and `labels` of these samples, both int64 of shape (len(indices), sequence_length).

        Labels are the tokens of the same place, as transformers' causal language models shift them
        themselves.
        """
        length = self.sequence_length
        tokens = np.empty((len(indices), length), dtype=np.int64)  # (batch, tokens)
        counted = np.ones((len(indices), length), dtype=np.bool_)  # (batch, tokens)
        for row, i in enumerate(indices):
            start = min(i * length, len(self.stream) - length)
            tokens[row] = self.stream[start : start + length]
            counted[row, : i * length - start] = False
        labels = np.where(counted, tokens, IGNORED_LABEL)  # (batch, tokens)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
