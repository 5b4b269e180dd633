"""Streams of random numbers that no layout changes: the key of a draw, and the generators that follow it.

It knows seed, step, place, call and samples. It knows nothing of the functions that draw, nor of ranks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from shardwise.errors import ConfigError
from shardwise.trace.keys import Part, key_of

__all__ = ["Generators", "Scope", "Stream", "python_streams"]


@dataclass(frozen=True, kw_only=True)
class Scope:
    """Where in a run a draw happens. Equal scopes draw equal numbers, on every layout.

    `samples` are the global numbers of the samples of this micro-batch, in the order of its dim 0;
    `micro_batch` is the number of the micro-batch in the global batch; `place` is the name of a unit, or
    "glue"; `call` counts the calls of the unit in one forward. Raises ConfigError when a number is negative
    or a sample stands twice.
    """

    seed: int
    step: int
    micro_batch: int
    samples: tuple[int, ...]
    place: str
    call: int = 0

    def __post_init__(self) -> None:
        numbers = (self.seed, self.step, self.micro_batch, self.call, *self.samples)
        if min(numbers) < 0:
            raise ConfigError(f"seed, step, micro_batch, call and samples count from 0; got {self}; use n >= 0")
        if len(set(self.samples)) < len(self.samples):
            raise ConfigError(f"each sample of a micro-batch has its own number; got {self.samples}; number them apart")

    def shared_key(self, *index: Part) -> int:
        """The key of a draw without a sample dim: the same on every stage of the micro-batch."""
        return key_of("shared", self.seed, self.step, self.place, self.call, index, self.micro_batch)

    def sample_key(self, sample: int, *index: Part) -> int:
        """The key of one sample's part of a draw: the same in whatever micro-batch the sample comes."""
        return key_of("sample", self.seed, self.step, self.place, self.call, index, sample)


class Generators:
    """One `torch.Generator` a device, seeded again for each draw. Threads must not share one.

    The CPU generator uses 32 bits of a seed: of a million draws some hundred share their stream with
    another draw of another place, step or sample.
    """

    def __init__(self) -> None:
        self._held: dict[torch.device, torch.Generator] = {}

    def seeded(self, device: torch.device, key: int) -> torch.Generator:
        """The generator of `device`, at the start of the stream of `key`; the next call ends that stream."""
        generator = self._held.get(device)
        if generator is None:
            generator = self._held[device] = torch.Generator(device)
        return generator.manual_seed(key)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The numbers of one draw: `index` is its place among the draws of the scope."""

    scope: Scope
    index: tuple[int, ...]
    generators: Generators

    def num_rows(self, size: int) -> int:
        """Rows of dim 0 that belong to one sample, or 0 where a dim of `size` is not made of the samples."""
        num_samples = len(self.scope.samples)
        return size // num_samples if num_samples and size % num_samples == 0 else 0

    def shared(self, device: torch.device) -> torch.Generator:
        return self.generators.seeded(device, self.scope.shared_key(*self.index))

    def per_sample(self, device: torch.device) -> Iterator[torch.Generator]:
        """One generator a sample, in order; each is to be used before the next is asked for."""
        for sample in self.scope.samples:
            yield self.generators.seeded(device, self.scope.sample_key(sample, *self.index))

    def keep_mask(self, mask: torch.Tensor, probability: float) -> torch.Tensor:
        """Fills contiguous `mask` with 1 (with `probability`) and 0; per sample where dim 0 allows it."""
        num_rows = self.num_rows(mask.shape[0]) if mask.dim() else 0
        if num_rows == 0:
            return mask.bernoulli_(probability, generator=self.shared(mask.device))
        for b, generator in enumerate(self.per_sample(mask.device)):
            mask.narrow(0, b * num_rows, num_rows).bernoulli_(probability, generator=generator)
        return mask


@contextmanager
def python_streams(key: int) -> Iterator[None]:
    """Inside, `random`, `numpy.random` and torch's default CPU generator start from `key`;
    afterwards they are as they were.

    Process-wide, like these three themselves: not for two threads at a time. 0.1 ms a use.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    torch_state = torch.default_generator.get_state()
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
