"""Which samples a step trains on: a pure function of (seed, step), so a resumed run needs no sampler state.

It knows numbers only: no data, no rank, no layout. A rank takes its share of the global batch from what is
returned.

    position   0 1 2 3 4 | 5 6 7 8 9 | ...      step * global_batch + i
    epoch      0         | 1         | ...      position // num_samples
    sample     3 0 4 1 2 | 1 4 2 0 3 | ...      a permutation keyed by (seed, epoch)

The permutation is evaluated one position at a time, never written out, so a step over 10**9 samples costs the
same as a step over a thousand: a Feistel network over a power of four of at least num_samples values, applied
again while its result is not a sample ("cycle walking").

Sources: Luby and Rackoff, "How to Construct Pseudorandom Permutations from Pseudorandom Functions", SIAM J.
Comput. 1988; Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, method 2 (cycle
walking).
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from shardwise.errors import ConfigError
from shardwise.tasks.mixing import MAX_KEYS, UInts, derive_keys, mix

__all__ = ["MAX_SAMPLES", "permute", "sample_indices"]

MAX_SAMPLES = 2**62  # two halves of 31 bits leave the arithmetic far from overflow

_NUM_ROUNDS = MAX_KEYS  # 4 suffice for a pseudorandom permutation of large domains; small ones need more
_MIN_HALF_BITS = 3  # a network of fewer bits reaches too few permutations


def sample_indices(*, seed: int, step: int, global_batch: int, num_samples: int) -> tuple[int, ...]:
    """Numbers of the global batch's samples at `step` (counted from 0), in batch order.

    Every epoch of num_samples positions visits every sample exactly once; an epoch may begin inside a batch,
    and a batch may be larger than an epoch. Raises ConfigError for numbers out of range.
    """
    _check(step=step, global_batch=global_batch, num_samples=num_samples)
    first = step * global_batch
    indices: list[int] = []
    for epoch, positions in groupby(range(first, first + global_batch), key=lambda p: p // num_samples):
        offsets = np.fromiter((p - epoch * num_samples for p in positions), dtype=np.uint64)
        indices += permute(offsets, seed=seed, epoch=epoch, num_samples=num_samples).tolist()
    return tuple(indices)


def permute(offsets: NDArray[np.uint64], *, seed: int, epoch: int, num_samples: int) -> UInts:
    """Samples at places `offsets` (each below num_samples) of the permutation keyed by (seed, epoch); same
    shape.

    A place is sent round the network until it lands below num_samples. The network is a bijection, so
    following its cycle from a valid place comes back to a valid one, and two places never meet: a permutation
    of the samples. The network has at most 4 times as many values as there are samples (64 at least): 4 turns
    on average, or fewer.
    """
    keys = derive_keys("sampler", seed, epoch)
    half_bits = max(_MIN_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
    found = offsets.astype(np.uint64)
    outside = np.ones(found.shape, dtype=np.bool_)
    while outside.any():
        found[outside] = _feistel(found[outside], keys=keys, half_bits=half_bits)
        outside = found >= np.uint64(num_samples)
    return found


def _feistel(values: UInts, *, keys: UInts, half_bits: int) -> UInts:
    """A keyed bijection of 2 * half_bits bits; each round: (left, right) -> (right, left ^ f(right))."""
    bits = np.uint64(half_bits)
    mask = np.uint64(2**half_bits - 1)
    left, right = values >> bits, values & mask
    for key in keys[:_NUM_ROUNDS]:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << bits) | right


def _check(*, step: int, global_batch: int, num_samples: int) -> None:
    if step < 0:
        raise ConfigError(f"steps are counted from 0; got step={step}; give 0 or more")
    if global_batch < 1:
        raise ConfigError(f"a global batch holds at least 1 sample; got {global_batch}; give 1 or more")
    if num_samples < 1:
        raise ConfigError(f"sampling needs at least 1 sample; got {num_samples}; give a larger corpus")
    if num_samples > MAX_SAMPLES:
        raise ConfigError(f"the sampler numbers up to 2**62 samples; got {num_samples}; make samples longer")
