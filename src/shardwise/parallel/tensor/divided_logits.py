"""Logits of which every rank has its columns, to the model's own code a whole tensor: joined when somebody reads them.

    head ──► DividedLogits ──float, view, slice, / cap, tanh──► DividedLogits ──F.cross_entropy──► loss      no gather
                   └──argmax, sort, a send, whatever else──► joined once, then as always

What is not in the tables below joins the parts, so the answer is always that of whole logits; what is, works on the
parts alone. Every rank runs the same forward and loss, and so joins at the same places; logits that were put away and
are read when the step is over are an error. Knows functions of torch; no models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.describe.tensor import Slice
from shardwise.errors import DataflowError
from shardwise.parallel.tensor.collectives import TensorGroup, gather_from
from shardwise.parallel.tensor.cross_entropy import vocab_parallel_cross_entropy
from shardwise.parallel.tensor.slices import cut, spread

__all__ = ["DividedLogits", "Reads", "whole_of"]


class Reads:
    """Whether somebody may read divided logits whole now: while a step runs, whose code every rank runs alike.

    A rank that reads alone meets, in the place of the others' parts, what they send next: an error on all, not a wait.
    Where nothing follows, an evaluation, the ranks meet at the end of the step.
    """

    __slots__ = ("allowed", "last")

    def __init__(self) -> None:
        self.allowed = False
        self.last: tuple[TensorGroup, torch.device] | None = None  # of logits behind which these ranks exchange nothing

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Inside the block reads join the parts. Collective."""
        self.allowed = True
        try:
            yield
            if self.last is not None:
                group, device = self.last
                group.all_reduce(torch.zeros(1, device=device))
        finally:
            self.allowed, self.last = False, None


class DividedLogits(torch.Tensor):
    """A tensor (..., V) without storage, of which `local` (..., V / ranks) is here, with its graph."""

    local: torch.Tensor
    part: Slice  # along dim -1
    group: TensorGroup
    reads: Reads | None  # None: at any time, where every rank does it
    joined: torch.Tensor | None  # once somebody has read it whole
    viewed: bool  # others see the same elements

    @staticmethod
    def __new__(cls, local: torch.Tensor, part: Slice, group: TensorGroup, reads: Reads | None = None) -> DividedLogits:
        made: DividedLogits = torch.Tensor._make_wrapper_subclass(
            cls,
            (*local.shape[:-1], part.size),
            dtype=local.dtype,
            device=local.device,
            requires_grad=local.requires_grad,
        )
        made.local, made.part, made.group, made.reads = local, part, group, reads
        made.joined, made.viewed = None, False
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"DividedLogits(shape={tuple(self.shape)}, shard {self.group.rank} of {self.group.size})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in _QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **named)
        with torch._C.DisableTorchFunctionSubclass():
            known = _divided(func, args, named)
        if known is not NotImplemented:
            return known
        if _writes(func):
            _refuse_write_through_views(func, args, named)
        whole_args, whole_named = tree_map(whole_of, (tuple(args), named))
        return func(*whole_args, **whole_named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise DataflowError(
            f"logits that are divided among shards are read by {func} where torch asks no one; call "
            "shardwise.parallel.tensor.divided_logits.whole_of before"
        )


def whole_of(leaf: Any) -> Any:
    """The whole tensor of divided logits (collective, once), anything else as it is.

    Raises `DataflowError` outside of a step: what one shard reads there the others need not; it would wait for them.
    """
    if not isinstance(leaf, DividedLogits):
        return leaf
    if leaf.joined is None:
        if leaf.reads is not None and not leaf.reads.allowed:
            raise DataflowError(
                f"logits {tuple(leaf.shape)} that are divided among {leaf.group.size} shards are read after their "
                "step, where the other shards may not read them; compute what you need of them in the model's forward "
                "or loss, which every shard runs"
            )
        leaf.joined = gather_from(leaf.local, leaf.part, leaf.group)
    return leaf.joined


# -- what works on parts ------------------------------------------------------------------------


def _divided(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The answer of a function that needs no other rank's logits; NotImplemented where it does."""
    if func is F.cross_entropy:
        return _cross_entropy(*args, **kwargs)
    first = args[0] if args else None
    if not isinstance(first, DividedLogits) or first.joined is not None:
        return NotImplemented
    others = tree_flatten((args[1:], kwargs))[0]
    if func in _ELEMENTWISE:
        return _elementwise(first, func, args[1:], kwargs, others)
    if any(isinstance(leaf, torch.Tensor) for leaf in others):
        return NotImplemented
    if func in _SAME:
        return _again(first, func(first.local, *args[1:], **kwargs), view=False)
    if func in _SHAPES:
        return _reshaped(first, func, args[1:], kwargs)
    if func is torch.Tensor.__getitem__:
        return _indexed(first, args[1])
    return NotImplemented


def _again(source: DividedLogits, local: torch.Tensor, *, view: bool) -> DividedLogits:
    made = DividedLogits(local, source.part, source.group, source.reads)
    made.viewed = source.viewed = source.viewed or view
    return source if local is source.local else made


def _elementwise(
    source: DividedLogits, func: Any, rest: Sequence[Any], kwargs: Mapping[str, Any], others: Sequence[Any]
) -> Any:
    """With numbers, and with tensors whose last dim is the vocabulary's (a bias that is no parameter) or 1."""
    tensors = [leaf for leaf in others if isinstance(leaf, torch.Tensor)]
    if "out" in kwargs or any(isinstance(leaf, DividedLogits) or leaf.requires_grad for leaf in tensors):
        return NotImplemented
    if any(leaf.dim() > source.dim() or leaf.shape[-1:] not in ((), (1,), (source.part.size,)) for leaf in tensors):
        return NotImplemented

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.shape[-1:] != (source.part.size,):
            return leaf
        return cut(leaf, source.part, source.group.rank)

    own_rest, own_kwargs = tree_map(own, (tuple(rest), dict(kwargs)))
    return _again(source, func(source.local, *own_rest, **own_kwargs), view=False)


def _reshaped(source: DividedLogits, func: Any, rest: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A view of the other dims: the last one stays the vocabulary's."""
    if kwargs or any(isinstance(argument, torch.dtype) for argument in rest):
        return NotImplemented
    whole = func(torch.empty(source.shape, device="meta"), *rest)
    if whole.shape[-1:] != source.shape[-1:]:  # otherwise rows stay rows: a reshape keeps the order of elements
        return NotImplemented
    return _again(source, source.local.reshape(*whole.shape[:-1], source.local.shape[-1]), view=True)


def _indexed(source: DividedLogits, index: Any) -> Any:
    """Slices and numbers in front of the vocabulary's dim."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, slice) or type(part) is int for part in parts):
        return NotImplemented
    named = [part for part in parts if part is not Ellipsis]
    reaches_last = len(named) >= source.dim() or (Ellipsis in parts and parts[-1] is not Ellipsis)
    if len(named) > source.dim() or (reaches_last and not _is_everything(named[-1])):
        return NotImplemented
    return _again(source, source.local[index], view=True)


def _is_everything(index: Any) -> bool:
    return isinstance(index, slice) and index.start is None and index.stop is None and index.step is None


def _cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, DividedLogits) or isinstance(target, DividedLogits) or input.joined is not None:
        return NotImplemented
    if weight is not None or size_average is not None or reduce is not None:
        return NotImplemented
    plain = input.dim() <= 2 and target.dim() == input.dim() - 1 and not target.is_floating_point()
    if not plain or input.part != spread(-1, input.part.size, input.group.size):
        return NotImplemented
    autocast = torch.is_autocast_enabled(input.local.device.type)  # which casts for this function
    return vocab_parallel_cross_entropy(
        input.local.float() if autocast else input.local,
        target,
        vocabulary=input.part.size,
        group=input.group,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("__")) or name in _IN_PLACE


def _refuse_write_through_views(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if any(isinstance(leaf, DividedLogits) and leaf.viewed for leaf in tree_flatten((args, dict(kwargs)))[0]):
        raise DataflowError(
            f"{func.__name__} writes into logits that are divided among shards and have been viewed: the views would "
            "not see it; write into a copy (logits.clone())"
        )


def _methods(names: str) -> frozenset[Callable[..., Any]]:
    return frozenset(getattr(torch.Tensor, name) for name in names.split())


def _properties(names: str) -> frozenset[Callable[..., Any]]:
    return frozenset(getattr(torch.Tensor, name).__get__ for name in names.split())


_QUERIES = _methods("size dim ndimension numel nelement is_floating_point is_complex __len__ __hash__") | _properties(
    "shape dtype device ndim requires_grad is_leaf layout is_cuda is_meta is_sparse is_nested is_quantized _version"
)
_SAME = _methods("float double half bfloat16 to contiguous clone") | {torch.clone}
_ELEMENTWISE = _methods("add sub mul div true_divide tanh __add__ __radd__ __sub__ __mul__ __rmul__ __truediv__") | {
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.tanh,
}
_SHAPES = _methods("view reshape flatten squeeze unsqueeze") | {
    torch.reshape,
    torch.flatten,
    torch.squeeze,
    torch.unsqueeze,
}
_IN_PLACE = frozenset({"__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__", "__ipow__", "__ifloordiv__"})
