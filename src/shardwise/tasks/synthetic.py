"""Random tokens: a task without a file, for tests and for timing. There is nothing in it to learn.

Every token is a pure function of (seed, split, sample, place), equal on every machine. It knows no corpus and
no cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.mixing import UInts, derive_keys, mix
from shardwise.tasks.packing import check_sequence_length
from shardwise.tasks.task import (
    IGNORED_LABEL,
    SPLITS,
    Batch,
    Split,
    check_indices,
    label_count,
    next_token_loss,
    perplexity,
)

__all__ = ["RandomTokens"]


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """A language modelling task over random tokens.

    `ignored_fraction` of the labels, chosen at random, do not count, so that samples weigh differently; the
    last label of a sample always counts.
    """

    counts: ClassVar[str] = "tokens"  # see `Counted`

    vocabulary_size: int = 64
    sequence_length: int = 16  # tokens
    num_train: int = 256  # samples
    num_held_out: int = 32  # samples
    ignored_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocabulary_size < 1 or self.num_train < 1 or self.num_held_out < 0:
            raise ConfigError(
                "random tokens need a vocabulary, training samples and no negative number of held-out ones; "
                f"got vocabulary_size={self.vocabulary_size}, num_train={self.num_train}, "
                f"num_held_out={self.num_held_out}; use at least 1, 1 and 0"
            )
        check_sequence_length(self.sequence_length)
        if not 0 <= self.ignored_fraction <= 1:
            raise ConfigError(f"ignored_fraction lies in [0, 1]; got {self.ignored_fraction}; 0 counts all labels")

    def num_samples(self, split: Split) -> int:
        """num_train or num_held_out."""
        return self.num_train if split == "train" else self.num_held_out

    def samples(self, indices: Sequence[int], split: Split) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 (len(indices), sequence_length). ConfigError for a wrong index."""
        check_indices(indices, num_samples=self.num_samples(split), split=split)
        rows: UInts = np.array(indices, dtype=np.uint64)[:, None]  # (batch, 1)
        columns: UInts = np.arange(self.sequence_length).astype(np.uint64)  # (tokens,)
        places = rows * np.uint64(self.sequence_length) + columns  # (batch, tokens)
        keys = derive_keys("random tokens", self.seed, SPLITS.index(split))
        tokens = (_draw(places, keys[0]) % np.uint64(self.vocabulary_size)).astype(np.int64)
        uniform = (_draw(places, keys[1]) >> np.uint64(11)).astype(np.float64) / 2**53  # (batch, tokens)
        ignored = uniform < self.ignored_fraction
        ignored[:, -1] = False
        labels = np.where(ignored, IGNORED_LABEL, tokens)
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def loss(self, outputs: object, batch: Batch) -> Tensor:
        """The model's own loss, else next-token cross entropy of its logits; nats per token, scalar."""
        return next_token_loss(outputs, batch)

    def weight(self, batch: Batch) -> float:
        """Labels that a next-token loss counts: the first of each sample and ignored ones are not."""
        return label_count(batch, shifted=True)

    def metrics(self, loss: float) -> dict[str, float]:
        """Perplexity: exp(loss)."""
        return {"perplexity": perplexity(loss)}


def _draw(places: UInts, key: np.uint64) -> UInts:
    return mix(mix(places + key) ^ key)
