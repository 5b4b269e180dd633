"""The forward of a whole model that no tape is needed for: units get what stands around them, glue is left alone.

Knows unit calls and a model's own checkpointing; no stages, no values that cross.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, noop_context_fn

from shardwise.execute.around import Around
from shardwise.trace.checkpointing import Contexts

__all__ = ["WholeRun"]


class WholeRun:
    """Asked about every unit call of one forward (`trace.install.Watcher`)."""

    def __init__(self, around: Around) -> None:
        self.inside = False
        self.mode: TorchFunctionMode | None = None
        self._around = around
        self._recomputes = False  # the unit that is called next is checkpointed by the model

    def call(
        self, unit: str, module: nn.Module, body: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        """Run the unit with all that stands around it."""
        if self.inside:
            return body(*args, **kwargs)
        body = self._around.wrap(unit, body)
        if self._recomputes and not self._around.recomputes(unit):
            body = functools.partial(checkpoint, body, use_reentrant=False)
        self.inside = True
        try:
            return body(*args, **kwargs)
        finally:
            self.inside = False

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """Checkpointing around a unit is done inside it."""
        if self.inside:
            yield noop_context_fn
            return
        self._recomputes = torch.is_grad_enabled()
        try:
            yield None
        finally:
            self._recomputes = False
