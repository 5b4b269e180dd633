"""Random bits as a pure function of a key and a position, equal on every machine and every library version.

It knows integers only: no generator with a state, no seed of a process, no number drawn by numpy or torch.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["MAX_KEYS", "UInts", "derive_keys", "mix"]

UInts = NDArray[np.uint64]

MAX_KEYS = 8  # one BLAKE2b digest of 64 bytes

_MULTIPLY_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_SECOND = np.uint64(0x94D049BB133111EB)
_SHIFT_FIRST, _SHIFT_SECOND, _SHIFT_THIRD = np.uint64(30), np.uint64(27), np.uint64(31)


def derive_keys(purpose: str, *numbers: int) -> UInts:
    """MAX_KEYS independent 64-bit keys, (8,), for a purpose and any integers (negative and huge ones too)."""
    text = "\x00".join(["shardwise", purpose, *(str(int(number)) for number in numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8 * MAX_KEYS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def mix(values: UInts) -> UInts:
    """64 well-mixed bits for each value, same shape; a bijection of 64-bit integers.

    The finaliser of SplitMix64: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014, with Stafford's constants (variant 13).
    """
    mixed = (values ^ (values >> _SHIFT_FIRST)) * _MULTIPLY_FIRST
    mixed = (mixed ^ (mixed >> _SHIFT_SECOND)) * _MULTIPLY_SECOND
    return mixed ^ (mixed >> _SHIFT_THIRD)
