"""Keys of random draws: a stable 63-bit number for a tuple of names and numbers.

It knows how to hash. It knows neither tensors nor layouts; what belongs in a key is decided where a draw is
made.
"""

from __future__ import annotations

from hashlib import blake2b

from shardwise.errors import ConfigError

__all__ = ["Part", "key_of"]

Part = int | str | tuple["Part", ...]

_MASK = (1 << 63) - 1


def key_of(*parts: Part) -> int:
    """The 63-bit key of `parts`, equal in every process, on every machine and Python version.

    The parts are written out unambiguously (`("a", "b")`, `("ab",)` and `(("a", "b"),)` differ, so do `1` and
    `"1"`) and hashed with BLAKE2b (RFC 7693). 63 bits, because a torch seed is a signed 64-bit integer that
    is not negative. Raises ConfigError for a part that is not an int, a str or a tuple of these: its text
    might not be stable.
    """
    _check(parts)
    digest = blake2b(ascii(parts).encode("ascii"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK


def _check(parts: tuple[object, ...]) -> None:
    for part in parts:
        kind = type(part)
        if kind is int or kind is str:
            continue
        if not isinstance(part, tuple):
            raise ConfigError(f"a key is made of int, str and tuples of them, got {kind.__name__} {part!r}; convert it")
        _check(part)
