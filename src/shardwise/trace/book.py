"""The kernels of every node, as operations come by, and what is known of storages so that they can be told apart.

    storage is         made of
    a weight           parameters alone: a cast, a slice that was copied
    trained            the same, of parameters with gradients
    fixed              nothing that comes from the batch: weights, buffers, a table of positions

Knows storages by their numbers; refuses to know how nodes are found.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.kernels import Kernel, Phase
from shardwise.trace.kernels import Described, Operands, described

__all__ = ["Book", "Stored"]

Stored = list[tuple[torch.Tensor, int]]  # tensors and the numbers of their storages
_EMBEDDING = "aten::embedding"


class Book:
    """Kernels by node. A number of a storage stays with it while anything is booked."""

    def __init__(self, samples: int | None = None) -> None:
        self.is_buffer: Callable[[torch.Tensor], bool] = lambda tensor: False
        self._samples = samples
        self._counts: dict[int, dict[Described, int]] = {}
        self._known: set[int] = set()
        self._weights: set[int] = set()
        self._trained: set[int] = set()
        self._fixed: set[int] = set()
        self._of_weights: set[int] = set()  # autograd numbers of products with a trained weight

    def kernels(self, node: int) -> tuple[Kernel, ...]:
        """Of one node, equal ones once, in the order of the first."""
        return tuple(
            Kernel(
                kind=kind,
                phase=phase,
                dtype=dtype,
                flops=flops,
                nbytes=nbytes,
                shape=shape,
                batch_dims=dims,
                batch_bytes=None if own == nbytes else own,
                count=count,
            )
            for (kind, phase, dtype, flops, nbytes, shape, dims, own), count in self._counts.get(node, {}).items()
        )

    def nodes(self) -> Collection[int]:
        """Those with kernels."""
        return self._counts.keys()

    def forget(self, key: int) -> None:
        """A storage is gone: its number may be another's."""
        for known in (self._known, self._weights, self._trained, self._fixed):
            known.discard(key)

    def forward(
        self,
        node: int | None,
        number: int | None,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Stored,
        outputs: Stored,
        flops: int,
    ) -> None:
        """An operation of the forward, with its autograd number."""
        for tensor, key in inputs:
            if key not in self._known:
                self._given(tensor, key)
        self._make(func, inputs, outputs)
        if node is None:
            return
        operands = Operands(inputs, outputs, self._weights, self._fixed)
        self._add(node, described(func, args, kwargs, operands, flops=flops, phase=Phase.FORWARD))
        is_product = bool(flops) or func._schema.name == _EMBEDDING
        if number is not None and is_product and any(key in self._trained for _, key in inputs):
            self._of_weights.add(number)

    def backward(
        self,
        node: int,
        number: int,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: Stored,
        outputs: Stored,
        flops: int,
    ) -> bool:
        """An operation of the backward of what has this number. Whether it makes the gradient of a parameter."""
        self._make(func, inputs, outputs)
        operands = Operands(inputs, outputs, self._weights, self._fixed)
        of_weight = number in self._of_weights
        made = described(func, args, kwargs, operands, flops=flops, phase=Phase.INPUT, of_weight=of_weight)
        self._add(node, made)
        if not made or any(phase is not Phase.WEIGHT for _, phase, *_ in made):
            return False
        given = {key for _, key in inputs}
        self._fixed.update(key for _, key in outputs if key not in given)
        return True

    def _add(self, node: int, made: Sequence[Described]) -> None:
        if not made:
            return
        counts = self._counts.setdefault(node, {})
        for one in made:
            counts[one] = counts.get(one, 0) + 1

    def _given(self, tensor: torch.Tensor, key: int) -> None:
        """Seen before it was made: a parameter, a buffer, the batch."""
        self._known.add(key)
        if isinstance(tensor, nn.Parameter):
            self._weights.add(key)
            self._fixed.add(key)
            if tensor.requires_grad:
                self._trained.add(key)
        elif self.is_buffer(tensor):
            self._fixed.add(key)

    def _make(self, func: Any, inputs: Stored, outputs: Stored) -> None:
        """Storages that an operation makes, and writes."""
        fixed = all(key in self._fixed for _, key in inputs)
        for tensor, key in outputs:
            if key in self._known:
                if not fixed and func._schema.is_mutable and key not in self._weights:
                    self._fixed.discard(key)
                continue
            self._known.add(key)
            if fixed and (inputs or not self._has_rows_of_samples(tensor)):
                self._fixed.add(key)
            if inputs and all(other in self._weights for _, other in inputs):
                self._weights.add(key)
                if any(other in self._trained for _, other in inputs):
                    self._trained.add(key)

    def _has_rows_of_samples(self, tensor: torch.Tensor) -> bool:
        if not self._samples or not tensor.dim():
            return False
        if self._samples == 1 or tensor.dim() == 1:
            return tensor.dim() > 1 and tensor.shape[0] == self._samples
        return tensor.shape[0] % self._samples == 0
