"""A forward that is run twice, for recompute: what it must find as it was, and what it must leave as it is.

Buffers that a forward writes (running statistics, counters) are put back to what the first run found while the second
runs, and are then as they were before it: they are updated once. Which ones a stage writes is learned when its first
forward is watched, and one that is written later is found by its version. Knows modules and buffers; no autograd, no
order of actions.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from shardwise.errors import DataflowError
from shardwise.execute.buffers import Buffer, buffers_of

__all__ = ["Repetition"]


class Repetition:
    """The buffers of a model that stages write, by whatever tells the stages apart."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._with_buffers = [module for module in model.modules() if module._buffers]
        self._written: dict[object, list[tuple[nn.Module, str]]] = {}

    @contextlib.contextmanager
    def first(self, stage: object) -> Iterator[list[Buffer]]:
        """Around the first run; the list holds, behind it, the buffers that it wrote, with their values before."""
        known = self._written.get(stage)
        if known is not None:  # batch norms write without telling torch, and not while they are evaluated
            known += [pair for pair in self._statistics() if not any(_same(pair, other) for other in known)]
        stamps = _stamps(self._with_buffers)
        before = buffers_of(self._model) if known is None else [_now(module, name) for module, name in known]
        found: list[Buffer] = []
        yield found
        changed = [each for each in stamps if each.is_changed()]
        if known is None:
            names = {(id(each.module), each.name) for each in changed}
            names |= {(id(module), name) for module, name in self._statistics()}
            found += [buffer for buffer in before if (id(buffer.module), buffer.name) in names]
            self._written[stage] = [(buffer.module, buffer.name) for buffer in found]
            return
        found += before
        names = {(id(module), name) for module, name in known}
        later = [each.as_it_was() for each in changed if (id(each.module), each.name) not in names]
        found += later
        known += [(buffer.module, buffer.name) for buffer in later]

    def _statistics(self) -> list[tuple[nn.Module, str]]:
        """Buffers of batch norms that a forward writes, though their count of writes stays as it was."""
        norms = [m for m in self._with_buffers if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
        return [(norm, name) for norm in norms for name, own in norm._buffers.items() if own is not None]

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


def _same(one: tuple[nn.Module, str], other: tuple[nn.Module, str]) -> bool:
    return one[0] is other[0] and one[1] == other[1]


@dataclasses.dataclass(frozen=True, slots=True)
class _Stamp:
    """A buffer without its value: which tensor, written how often."""

    module: nn.Module
    name: str
    tensor: torch.Tensor
    version: int

    def is_changed(self) -> bool:
        return self.module._buffers.get(self.name) is not self.tensor or self.tensor._version != self.version

    def as_it_was(self) -> Buffer:
        """Raises `DataflowError` where its value is gone."""
        if self.tensor._version != self.version:
            raise DataflowError(
                f"a forward that is run again writes the buffers that it wrote the first time, but "
                f"{type(self.module).__name__} wrote into {self.name} for the first time in a later step; use a "
                "schedule without recompute"
            )
        return Buffer(self.module, self.name, self.tensor, self.tensor)


def _stamps(modules: Sequence[nn.Module]) -> list[_Stamp]:
    return [
        _Stamp(module, name, buffer, buffer._version)
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _now(module: nn.Module, name: str) -> Buffer:
    tensor = module._buffers[name]
    assert tensor is not None
    return Buffer(module, name, tensor, tensor.detach().clone())
