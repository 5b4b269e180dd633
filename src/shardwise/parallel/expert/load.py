"""How many rows every expert was given: counted where they are sent from, once a forward. Knows layers by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["Loads"]


class Loads:
    """Rows of this rank's tokens for each expert, and behind them those that no expert takes (dropped), by layer."""

    def __init__(self) -> None:
        self._rows: dict[str, torch.Tensor] = {}
        self._counts = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around a forward that is run a second time: it counts once."""
        self._counts = False
        try:
            yield
        finally:
            self._counts = True

    def declare(self, layer: str, num_experts: int) -> None:
        """A layer that will be counted."""
        self._rows[layer] = torch.zeros(num_experts + 1, dtype=torch.int64)

    def add(self, layer: str, rows: torch.Tensor) -> None:
        """`rows` (experts + 1) of one forward; a forward that is computed again in a backward counts once."""
        if self._counts and torch._C._current_graph_task_id() == -1:
            self._rows[layer] += rows.to("cpu")

    def take(self) -> dict[str, torch.Tensor]:
        """What was counted since the last time, by layer: (experts + 1), int64, the last are dropped."""
        taken = self._rows
        self._rows = {layer: torch.zeros_like(rows) for layer, rows in taken.items()}
        return taken
