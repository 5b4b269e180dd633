"""Forwards of modules that were put in place of others, and are taken back. Knows nothing of what they do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn as nn

__all__ = ["Forward", "Forwards"]

Forward = Callable[..., Any]


class Forwards:
    """The forwards that one owner has wrapped. While `on` is False the bodies below run as if nothing were there."""

    def __init__(self) -> None:
        self.on = True
        self._put: list[tuple[nn.Module, Forward | None, Forward]] = []  # module, own forward before, ours

    def wrap(self, module: nn.Module, instead: Forward) -> None:
        """`instead` runs in place of the module's forward, which it was made of; the latest one runs first."""
        before, body = module.__dict__.get("forward"), module.forward

        @functools.wraps(body)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return instead(*args, **kwargs) if self.on else body(*args, **kwargs)

        module.__dict__["forward"] = forward
        self._put.append((module, before, forward))

    def close(self) -> None:
        """Forwards as they were. One that somebody else has wrapped since stays, and is off."""
        self.on = False
        for module, before, ours in reversed(self._put):
            if module.__dict__.get("forward") is not ours:
                continue
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
        self._put.clear()
