"""Buffers as they were before a forward, for a forward that is run twice. Knows modules; runs nothing."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn as nn

__all__ = ["Buffer", "buffers_of"]


@dataclasses.dataclass(slots=True)
class Buffer:
    """A module's buffer, and a copy of its value."""

    module: nn.Module
    name: str
    tensor: torch.Tensor
    value: torch.Tensor

    def is_written(self) -> bool:
        """Whether it has another value now, or the module another tensor in its place."""
        now = self.module._buffers[self.name]
        return now is not self.tensor or not torch.equal(self.tensor, self.value)

    def restore(self) -> None:
        """Put tensor and value back."""
        self.tensor.copy_(self.value)
        self.module._buffers[self.name] = self.tensor


def buffers_of(model: nn.Module) -> list[Buffer]:
    """All buffers of a model, as they are now."""
    return [
        Buffer(module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
