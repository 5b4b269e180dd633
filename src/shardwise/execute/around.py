"""What stands around the bodies of units while a step runs, from outside to inside, whoever asked for it.

    recompute, offload ( unshard ( casts ( compile ( body ))))

Knows an order and functions from body to body; refuses to know what they do, and which stage runs a unit.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any, Protocol

__all__ = ["Around", "Body", "Order", "Wrapper"]

Body = Callable[..., Any]


class Order(enum.IntEnum):
    """Who stands outside of whom: the lowest is outermost."""

    OFFLOAD = 0
    RECOMPUTE = 1
    UNSHARD = 2
    CASTS = 3
    COMPILE = 4


class Wrapper(Protocol):
    """Gives a unit another body with the same arguments and outputs; the same one where it leaves the unit alone."""

    def __call__(self, unit: str, body: Body) -> Body: ...


class Around:
    """The wrappers of a program. Each is asked once a unit and body, when the unit is called first."""

    def __init__(self) -> None:
        self._wrappers: list[tuple[Order, Wrapper]] = []
        self._wrapped: dict[str, tuple[Body, Body]] = {}
        self._recomputed: set[str] = set()
        self.keeps = False  # inside a unit that is computed again: checkpoints in it would free what is kept once

    def __bool__(self) -> bool:
        """Whether somebody stands around units."""
        return bool(self._wrappers)

    def add(self, order: Order, wrapper: Wrapper) -> None:
        """`wrapper` is asked from now on; of two with one order the later one is inside."""
        self._wrappers.append((order, wrapper))
        self._wrappers.sort(key=lambda pair: pair[0])
        self._wrapped.clear()

    def recomputes(self, unit: str) -> bool:
        """Whether a wrapper of that order took a body of the unit, which has been wrapped."""
        return unit in self._recomputed

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        """Around a body that is computed again as a whole: the model's own checkpoints in it are plain calls."""
        before, self.keeps = self.keeps, True
        try:
            yield
        finally:
            self.keeps = before

    def wrap(self, unit: str, body: Body) -> Body:
        """The body of `unit` with all wrappers around it."""
        known = self._wrapped.get(unit)
        if known is not None and known[0] is body:
            return known[1]
        wrapped = body
        for order, wrapper in reversed(self._wrappers):
            inner, wrapped = wrapped, wrapper(unit, wrapped)
            if order is Order.RECOMPUTE and wrapped is not inner:
                self._recomputed.add(unit)
        self._wrapped[unit] = body, wrapped
        return wrapped
