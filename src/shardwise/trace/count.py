"""Counts while a model is recorded: flops and kernels of every dispatched operation, and bytes that autograd keeps.

Everything is booked on a node of the dataflow. Forward operations belong to the node that runs. Backward ones
belong to the node whose forward made their autograd node: autograd numbers its nodes in the order of their
making, so every node of the dataflow owns ranges of numbers. Refuses to know units and totals.

    numbers   0 1 2 3 │ 4 5 6 7 8 │ 9 10          a backward operation that runs under number 6 …
    made by   embed#0 │ layers.0#0 │ add          … is a part of the backward of layers.0#0
"""

from __future__ import annotations

import bisect
import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.nn as nn
from torch.utils.flop_counter import flop_registry

from shardwise.describe.kernels import Kernel
from shardwise.trace.below import tensors_of
from shardwise.trace.book import Book, Stored
from shardwise.trace.kept_products import is_kept
from shardwise.trace.record import Recorder

__all__ = ["Counter", "flops_of"]

_ATTENTION = "aten::_scaled_dot_product_"
_GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback"})
_EMBEDDING = "aten::embedding"
_CONVOLUTION_BACKWARD = "aten::convolution_backward"
_GROUPED_BACKWARD = "transformers::grouped_mm_fallback_backward"
_ACCUMULATES = 2**63  # autograd numbers from here on are those of the nodes that add up a parameter's gradients


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Flops of one dispatched operation, a multiply and an add as two.

    Matrix products, attention and convolutions. Everything else is 0: memory bounds it, and bytes price it.
    """
    name = func._schema.name
    if name.startswith(_ATTENTION):
        backward = name.endswith("_backward")
        return _attention(*args[1:4], matmuls=(3, 2)) if backward else _attention(*args[:3], matmuls=(1, 1))
    if name in _GROUPED:
        return _grouped(args[0], args[1])
    if name == _GROUPED_BACKWARD:
        return 2 * _grouped(args[0], args[1])
    if name == _CONVOLUTION_BACKWARD:
        return _convolution_backward(args)
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _attention(query: Any, key: Any, value: Any, *, matmuls: tuple[int, int]) -> int:
    """Products over the width of queries and over that of values. Forward 1 and 1; backward 3 and 2, as the
    scores are computed again (FlashAttention, arXiv:2205.14135, algorithm 4).

    query (..., heads, tokens, head_dim), key (..., kv_heads, kv_tokens, head_dim), value likewise.
    """
    scores = prod(query.shape[:-1]) * key.shape[-2]  # (..., heads, tokens, kv_tokens)
    return int(2 * scores * (matmuls[0] * query.shape[-1] + matmuls[1] * value.shape[-1]))


def _convolution_backward(args: Sequence[Any]) -> int:
    """As many for each gradient that is asked for as the forward takes. (torch counts too many for the weight's where
    channels are in groups.)"""
    gradient, x, weight, transposed, asked = args[0], args[1], args[2], args[7], args[10]
    forward = 2 * (x if transposed else gradient).numel() * prod(weight.shape[1:])
    return int(forward * sum(map(bool, asked[:2])))


def _grouped(a: Any, b: Any) -> int:
    """(tokens, k) x (groups, k, n), (m, tokens) x (tokens, n): each token is in one group; else batched."""
    if a.dim() == 3 and b.dim() == 2:
        return int(2 * a.shape[-2] * a.shape[-1] * b.shape[-1])
    return int(2 * prod(a.shape) * b.shape[-1])


class Counter:
    """The books of one recording. Indices of the mappings are nodes of the dataflow.

    samples: of the batch, where they are known; what is made from nothing in as many rows grows with them.
    """

    def __init__(self, *, samples: int | None = None) -> None:
        self.forward_flops: dict[int, int] = {}
        self.backward_flops: dict[int, int] = {}
        self.weight_flops: dict[int, int] = {}  # of forward products with trained parameters
        self.weight_bytes: dict[int, int] = {}  # of their other operands, each once, and of their results
        self.product_flops: dict[int, int] = {}  # of products whose results a unit keeps that computes the rest again
        self.product_bytes: dict[int, int] = {}  # of those results
        self.reached: set[int] = set()  # nodes of which some backward ran
        self._book = Book(samples)
        self._trained: set[int] = set()  # storages of parameters that have gradients
        self._weights: set[int] = set()  # storages of parameters
        self._operands: dict[int, set[int]] = {}  # storage -> nodes that have counted it in `weight_bytes`
        self._makers: dict[int, int | None] = {}  # storage -> the node that made it
        self._saved: dict[int, int] = {}  # storage -> bytes
        self._alive: list[object] = []  # storages stay, so that their addresses stay unique
        self._starts: list[int] = []  # autograd numbers at which a range of `_owners` starts
        self._owners: list[int] = []
        self._seen = 0  # autograd numbers below have an owner

    @contextlib.contextmanager
    def watching(self, recorder: Recorder) -> Iterator[None]:
        """Count what `recorder` sees inside the block."""
        self._book.is_buffer = recorder.is_buffer

        def observe(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
            if recorder.running.phase == "forward":
                self.forward(recorder.place, func, args, kwargs, out)
            else:
                self.backward(func, args, kwargs, out)

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if recorder.running.phase == "forward":
                self.keep(tensor)
            return tensor

        before, recorder.below.observer = recorder.below.observer, observe
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                yield
        finally:
            recorder.below.observer = before

    def kernels(self, node: int) -> tuple[Kernel, ...]:
        """What was run for a node, forward and backward, equal ones once; of a backward that did not get through
        nothing."""
        return self._book.kernels(node)

    def booked(self) -> Collection[int]:
        """Nodes that have kernels."""
        return self._book.nodes()

    def saved_bytes(self) -> dict[int, int]:
        """Node -> bytes of the storages it made that are kept for backward."""
        totals: dict[int, int] = {}
        for storage, nbytes in self._saved.items():
            maker = self._makers.get(storage)
            if maker is not None:
                totals[maker] = totals.get(maker, 0) + nbytes
        return totals

    def keep(self, tensor: torch.Tensor) -> None:
        """Autograd saves a tensor of the forward."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            self._saved[storage._cdata] = storage.nbytes()
            if storage._cdata not in self._makers:
                self._alive.append(storage)

    def forward(self, place: int | None, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """An operation of the forward, at a node or between nodes."""
        inputs = _stored((*args, *kwargs.values()) if kwargs else args)
        outputs = _stored((out,))
        for tensor, key in inputs:  # seen before it was made: a parameter, a buffer, the batch
            self._made(tensor, key, None, given=True)
            if isinstance(tensor, nn.Parameter):
                self._weights.add(key)
                if tensor.requires_grad:
                    self._trained.add(key)
        number = None if place is None else self._own_numbers(place)
        flops = 0 if place is None else flops_of(func, args, kwargs, out)
        self._book.forward(place, number, func, args, kwargs, inputs, outputs, flops)
        for tensor, key in outputs:
            self._made(tensor, key, place)
        if place is None:
            return
        if flops:
            self.forward_flops[place] = self.forward_flops.get(place, 0) + flops
            if is_kept(func._schema.name, has_weight=any(key in self._weights for _, key in inputs)):
                self.product_flops[place] = self.product_flops.get(place, 0) + flops
                results = sum(tensor.nbytes for tensor, _ in outputs)
                self.product_bytes[place] = self.product_bytes.get(place, 0) + results
        if flops or func._schema.name == _EMBEDDING:
            self._product(place, inputs, outputs, flops)

    def _product(self, place: int, operands: Stored, results: Stored, flops: int) -> None:
        """A product that runs at `place`: what the gradient of its parameter, if it has one, takes."""
        others = [(tensor, key) for tensor, key in operands if key not in self._trained]
        if len(others) == len(operands):
            return
        self.weight_flops[place] = self.weight_flops.get(place, 0) + flops
        for tensor, key in (*others, *results):
            if place not in (seen := self._operands.setdefault(key, set())):
                seen.add(place)
                self.weight_bytes[place] = self.weight_bytes.get(place, 0) + tensor.nbytes

    def _made(self, tensor: torch.Tensor, key: int, node: int | None, *, given: bool = False) -> None:
        """A storage that is new is from `node`, or was `given`: made by nothing that was seen."""
        if key not in self._makers:
            self._makers[key] = node
            self._hold(key, tensor.untyped_storage(), given=given)

    def _hold(self, key: int, storage: torch.UntypedStorage, *, given: bool) -> None:
        self._alive.append(storage)

    def _own_numbers(self, place: int) -> int:
        """The autograd number of the operation that runs, if it has one."""
        following = torch._C._autograd._get_sequence_nr()
        if not self._owners or self._owners[-1] != place:
            # The autograd node of an operation is made before the operation is dispatched: the newest is its
            # own, unless it has none.
            self._starts.append(max(self._seen, following - 1))
            self._owners.append(place)
        self._seen = following
        return following - 1

    def owner(self) -> tuple[int, int] | None:
        """The node whose backward runs, and the autograd number of what runs; None where nobody made it."""
        running: Any = torch._C._current_autograd_node()
        if running is None:
            return None
        number = running._sequence_nr()
        at = bisect.bisect_right(self._starts, number) - 1
        return None if at < 0 else (self._owners[at], number)

    def backward(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """An operation of the backward."""
        found = self.owner()
        if found is None:
            return
        owner, number = found
        self.reached.add(owner)
        flops = flops_of(func, args, kwargs, out)
        if flops:
            self.backward_flops[owner] = self.backward_flops.get(owner, 0) + flops
        if number >= _ACCUMULATES:  # into the gradients of parameters: what that takes depends on who sums them
            return
        inputs = _stored((*args, *kwargs.values()) if kwargs else args)
        outputs = _stored((out,))
        of_weight = self._book.backward(owner, number, func, args, kwargs, inputs, outputs, flops)
        for tensor, key in inputs:
            self._made(tensor, key, None, given=True)
        for tensor, key in outputs:
            self._made(tensor, key, None, given=of_weight)


def _stored(tree: Sequence[Any]) -> Stored:
    """Dense tensors, and the numbers of their storages. Those on meta are asked for shapes, and have no elements."""
    found = [tensor for tensor in tensors_of(tree) if tensor.layout is torch.strided]
    return [(tensor, tensor.untyped_storage()._cdata) for tensor in found if tensor.device.type != "meta"]
