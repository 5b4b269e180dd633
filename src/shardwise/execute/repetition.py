"""A forward that is run twice, for recompute: what it must find as it was, and what it must leave as it is.

Buffers that a forward writes (running statistics, counters) are put back to what the first run found while the second
runs, and are then as they were before it: they are updated once. Which ones a stage writes is learned when its first
forward is watched. Knows modules and buffers; no autograd, no order of actions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from shardwise.execute.buffers import Buffer, buffers_of

__all__ = ["Repetition"]


class Repetition:
    """The buffers of a model that stages write, by whatever tells the stages apart."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: dict[object, list[tuple[nn.Module, str]]] = {}

    @contextlib.contextmanager
    def first(self, stage: object) -> Iterator[list[Buffer]]:
        """Around the first run; the list holds, behind it, the buffers that it wrote, with their values before."""
        known = self._written.get(stage)
        before = buffers_of(self._model) if known is None else [_now(module, name) for module, name in known]
        found: list[Buffer] = []
        yield found
        found += before if known is not None else [buffer for buffer in before if buffer.is_written()]
        self._written.setdefault(stage, [(buffer.module, buffer.name) for buffer in found])

    @contextlib.contextmanager
    def again(self, found: Sequence[Buffer]) -> Iterator[None]:
        """Around the second run: `found` have the values that the first run found, and afterwards those of now."""
        now: list[tuple[Buffer, torch.Tensor | None]] = []
        for buffer in found:  # another tensor in its place: graphs of other micro-batches may have saved this one
            now.append((buffer, buffer.module._buffers[buffer.name]))
            buffer.module._buffers[buffer.name] = buffer.value
        try:
            yield
        finally:
            for buffer, tensor in reversed(now):
                buffer.module._buffers[buffer.name] = tensor


def _now(module: nn.Module, name: str) -> Buffer:
    tensor = module._buffers[name]
    assert tensor is not None
    return Buffer(module, name, tensor, tensor.detach().clone())
