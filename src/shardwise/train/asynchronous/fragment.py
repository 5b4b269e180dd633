"""A fragment of what this rank trains, as one flat tensor in the host's memory, and what its rule keeps of it.

    states   w (6, 4) │ b (6) │ …        flat   0 … 23 │ 24 … 29 │ …

Knows states and flat tensors; refuses to know rounds and who else holds a fragment.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch

from shardwise.parallel.states import State
from shardwise.train.asynchronous.rule import Kept, Rule

__all__ = ["Fragment", "fragments_of"]


class Fragment:
    """The elements of `states`. `kept` is the rule's, from `begin` on."""

    def __init__(self, states: Mapping[str, State]) -> None:
        self.names = tuple(states)
        self._tensors = [states[name].parameter for name in self.names]
        self.num_elements = sum(tensor.numel() for tensor in self._tensors)
        self.shapes = [tuple(tensor.shape) for tensor in self._tensors]
        self.dtype = functools.reduce(torch.promote_types, (t.dtype for t in self._tensors), torch.float32)
        self.kept: Kept = {}
        self.tokens = 0.0  # that this worker has trained on since the last exchange
        self.steps = 0  # since then
        self._aside: torch.Tensor | None = None  # this worker's values, while the states show others

    def begin(self, rule: Rule) -> None:
        """Training begins with the values that the states have."""
        self.kept = rule.begin(self.read())

    def read(self) -> torch.Tensor:
        """A copy of the values, (num_elements,)."""
        flat = torch.empty(self.num_elements, dtype=self.dtype)
        for tensor, part in zip(self._tensors, self._parts(flat), strict=True):
            part.copy_(tensor.detach())
        return flat

    def value(self) -> torch.Tensor:
        """This worker's values, whatever the states show."""
        return self.read() if self._aside is None else self._aside

    @contextlib.contextmanager
    def showing(self, flat: torch.Tensor) -> Iterator[None]:
        """Inside, the states have the values of `flat`."""
        self._aside = self.read()
        self.write(flat)
        try:
            yield
        finally:
            self.write(self._aside)
            self._aside = None

    def write(self, flat: torch.Tensor) -> None:
        """The values, from a flat tensor."""
        with torch.no_grad():
            for tensor, part in zip(self._tensors, self._parts(flat), strict=True):
                tensor.copy_(part)

    def views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """A flat tensor as one of each state's shape, by name."""
        return dict(zip(self.names, self._parts(flat), strict=True))

    def _parts(self, flat: torch.Tensor) -> Iterator[torch.Tensor]:
        sizes = [tensor.numel() for tensor in self._tensors]
        parts = torch.split(flat, sizes) if sizes else ()
        return (part.view(tensor.shape) for tensor, part in zip(self._tensors, parts, strict=True))


def fragments_of(states: Mapping[str, State], num: int) -> list[Fragment]:
    """`states` in their order as `num` fragments of about as many elements. One may be empty where there are few."""
    total = sum(state.parameter.numel() for state in states.values())
    dealt: list[dict[str, State]] = [{} for _ in range(num)]
    before = 0
    for name, state in states.items():
        size = state.parameter.numel()
        dealt[min(num - 1, (before + size // 2) * num // max(1, total))][name] = state
        before += size
    return [Fragment(each) for each in dealt]
