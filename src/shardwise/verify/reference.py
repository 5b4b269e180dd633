"""Which reference a verification runs: the whole model on one device, or a stage of it at a time, and why.

Knows sizes; refuses to know models and ranks. The rule of "auto": streamed where weights, gradients and two copies of
the weights (as they were, and their updates) exceed the memory that is free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import psutil

from shardwise.errors import ConfigError
from shardwise.quantities import format_bytes

__all__ = ["REFERENCES", "Reference", "choose"]

REFERENCES = ("auto", "whole", "streamed")

# Of the memory, for a stage's weights; beside them come its gradients, an update, and what crosses between stages.
_STAGE_SHARE = 16
_STAGE_BYTES = 64 * 2**20  # larger stages save nothing but repeated glue


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """`streamed` with about `stage_bytes` of parameters at once, or whole; `why` in words, for a streamed one."""

    streamed: bool
    stage_bytes: int = 0
    why: str = ""

    def text(self, num_stages: int) -> str:
        """What a `Comparison` says."""
        if not self.streamed:
            return "the whole model on one device"
        stages = f"{num_stages} stage{'s' if num_stages > 1 else ''}"
        return f"the model streamed unit by unit on one device ({stages}): {self.why}"


def choose(wanted: str, *, memory_bytes: int | None, needed: Callable[[], int]) -> Reference:
    """The reference that `wanted` names. `memory_bytes` replaces what the machine has free; `needed()` are the bytes
    of the whole model with gradients and copies. Raises `ConfigError` for another name or no memory at all."""
    if wanted not in REFERENCES:
        raise ConfigError(f"reference={wanted!r} is not one of {', '.join(REFERENCES)}; use one of them")
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"memory_bytes={memory_bytes} must be 1 or more; give what the reference may use")
    if wanted == "whole":
        return Reference(streamed=False)
    free = psutil.virtual_memory().available if memory_bytes is None else memory_bytes
    stage_bytes = min(_STAGE_BYTES, max(1, free // _STAGE_SHARE))
    if wanted == "streamed":
        return Reference(streamed=True, stage_bytes=stage_bytes, why="as was asked for")
    bytes_needed = needed()
    if bytes_needed <= free:
        return Reference(streamed=False)
    numbers = f"{format_bytes(bytes_needed)} of weights, gradients and copies would not fit {format_bytes(free)} free"
    return Reference(streamed=True, stage_bytes=stage_bytes, why=numbers)
