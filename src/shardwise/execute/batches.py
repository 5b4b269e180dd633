"""Splitting a batch into micro-batches: what is cut along the samples, what is shared. Refuses to guess.

Dim 0 equal to the number of samples is cut; per-sample tensors of another shape are named (`batch_dims`); the rest
is shared. A tensor whose dim 0 merely could be samples is an error with the line to add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from shardwise.errors import BatchError
from shardwise.execute.weights import Weigher, with_own_items
from shardwise.trace.objective import Batch

__all__ = ["MicroBatch", "batch_size", "own_parts", "select", "signature", "split"]

_LABELS = ("labels", "label", "targets", "target", "start_positions")


@dataclasses.dataclass(frozen=True, slots=True)
class MicroBatch:
    """One micro-batch: its place in the global batch, the samples in it, and what its loss weighs."""

    index: int  # among the micro-batches of all replicas
    samples: tuple[int, ...]  # global sample numbers
    inputs: Any
    weight: float


def batch_size(batch: Batch, batch_dims: Mapping[str, int] | None = None) -> int:
    """The number of samples: dim 0 of the labels or of the first input tensor that is not named otherwise."""
    named = batch_dims or {}
    tensors = [(name, leaf) for name, leaf in _named(batch) if isinstance(leaf, torch.Tensor) and leaf.dim() > 0]
    for name, tensor in tensors:
        if name in named:
            return int(tensor.shape[named[name]])
    for name, tensor in tensors:
        if name == "input_ids" or name == "pixel_values":
            return int(tensor.shape[0])
    if not tensors:
        raise BatchError("a batch has at least one tensor with a sample dim; this one has none")
    return int(tensors[0][1].shape[0])


def select(batch: Batch, samples: Sequence[int], *, size: int, batch_dims: Mapping[str, int] | None = None) -> Any:
    """The part of `batch` that belongs to `samples`; tensors without a sample dim are shared.

    Raises `BatchError` where a tensor's dim 0 is a multiple of the number of samples but not equal to it.
    """
    return _taken(_sample_dims(batch, size, batch_dims or {}), samples)


@dataclasses.dataclass(frozen=True, slots=True)
class _Cut:
    """The leaves of a batch and the dim along which each is cut, None where it is shared."""

    leaves: Sequence[Any]
    dims: Sequence[int | None]
    spec: TreeSpec
    names: Sequence[str] | None  # of a flat batch


def _sample_dims(batch: Batch, size: int, named: Mapping[str, int]) -> _Cut:
    leaves, spec = tree_flatten(batch)
    dims = [_sample_dim(name, leaf, size, named) for (name, _), leaf in zip(_named(batch), leaves, strict=True)]
    return _Cut(leaves, dims, spec, list(batch) if _is_flat(batch) else None)


def _taken(cut: _Cut, samples: Sequence[int]) -> Any:
    chosen: list[Any] = []
    first, count = samples[0], len(samples)
    contiguous = isinstance(samples, range) or list(samples) == list(range(first, first + count))
    for leaf, dim in zip(cut.leaves, cut.dims, strict=True):
        if dim is None:
            chosen.append(leaf)
        elif contiguous:
            chosen.append(leaf.narrow(dim, first, count))
        else:
            chosen.append(leaf.index_select(dim, torch.tensor(list(samples), device=leaf.device)))
    return tree_unflatten(chosen, cut.spec)


def _taken_apart(cut: _Cut, sizes: Sequence[int]) -> list[Any]:
    """All parts of a batch, of so many samples each, in order."""
    columns = [
        [leaf] * len(sizes) if dim is None else leaf.split(sizes, dim)
        for leaf, dim in zip(cut.leaves, cut.dims, strict=True)
    ]
    if cut.names is not None:
        return [dict(zip(cut.names, leaves, strict=True)) for leaves in zip(*columns, strict=True)]
    return [tree_unflatten(leaves, cut.spec) for leaves in zip(*columns, strict=True)]


def _sample_dim(name: str, leaf: Any, size: int, named: Mapping[str, int]) -> int | None:
    if not isinstance(leaf, torch.Tensor):
        return None
    if name in named:
        dim = named[name]
        if dim < 0:
            return None
        if leaf.dim() <= dim or leaf.shape[dim] != size:
            raise BatchError(
                f"batch_dims says that dim {dim} of {name} are the {size} samples; its shape is {tuple(leaf.shape)}"
            )
        return dim
    if leaf.dim() == 0:
        return None
    if leaf.shape[0] == size:
        return 0
    if size > 1 and leaf.shape[0] > 1 and (leaf.shape[0] % size == 0 or (leaf.dim() > 1 and leaf.shape[1] == size)):
        at = 1 if leaf.dim() > 1 and leaf.shape[1] == size else 0
        raise BatchError(
            f"a tensor is cut along its samples or shared, and {name} of shape {tuple(leaf.shape)} could be either "
            f"with {size} samples; add batch_dims = {{{name} = {at}}} if dim {at} are samples, or {{{name} = -1}} to "
            "share it"
        )
    return None


def split(
    batch: Batch,
    *,
    micro_batches: int,
    replicas: int,
    weights: Any,
    batch_dims: Mapping[str, int] | None = None,
    first_sample: int = 0,
    together: bool = False,
    shares: Sequence[int] | None = None,
) -> tuple[tuple[MicroBatch, ...], ...]:
    """The micro-batches of every replica. Samples are dealt in order; the last ones may be smaller by one sample.

    `weights(inputs) -> float` is the weight of a micro-batch's loss; `num_items_in_batch` of the global batch becomes
    that of the micro-batch (see `weights`). `together`, `shares`: as in `own_parts`. Raises `BatchError` if there are
    fewer samples than micro-batches.
    """
    size = batch_size(batch, batch_dims)
    parts = micro_batches * replicas
    if size < parts:
        raise BatchError(
            f"every micro-batch has a sample: {replicas} replicas x {micro_batches} micro-batches need {parts} "
            f"samples, the batch has {size}; use at most {max(1, size // replicas)} micro-batches"
        )
    bounds = [size * part // parts for part in range(parts + 1)]
    rows = [range(bounds[part], bounds[part + 1]) for part in range(parts)]
    cut = _sample_dims(batch, size, batch_dims or {})
    taken = _taken_apart(cut, [len(own) for own in rows])
    weighed = weights.of_parts(taken) if isinstance(weights, Weigher) else [float(weights(part)) for part in taken]
    made = [
        MicroBatch(index=part, samples=tuple(first_sample + row for row in own), inputs=inputs, weight=weight)
        for part, (own, inputs, weight) in enumerate(
            zip(rows, with_own_items(batch, taken, weighed), weighed, strict=True)
        )
    ]
    return tuple(
        tuple(made[part] for part in own_parts(r, replicas, micro_batches, together=together, shares=shares))
        for r in range(replicas)
    )


def own_parts(
    replica: int,
    replicas: int,
    num_micro_batches: int,
    *,
    together: bool = False,
    shares: Sequence[int] | None = None,
) -> range:
    """Which parts of a global batch, cut into replicas * num_micro_batches, are a replica's micro-batches, in order.

    `together`: micro-batch m of all replicas is one stretch of samples, as BatchNorm wants that sees them together.
    `shares`: how many of these parts each replica has, where they are not equal.
    """
    if shares is not None:
        first = sum(shares[:replica])
        return range(first, first + shares[replica])
    if together:
        return range(replica, replicas * num_micro_batches, replicas)
    return range(replica * num_micro_batches, (replica + 1) * num_micro_batches)


def signature(inputs: Any, training: bool) -> tuple[object, ...]:
    """What a dataflow belongs to: structure, shapes, dtypes, constants, and whether the model trains."""
    if _is_flat(inputs):
        return (tuple((name, leaf.shape, leaf.dtype, leaf.requires_grad) for name, leaf in inputs.items()), training)
    leaves, spec = tree_flatten(inputs)
    shapes = tuple(
        (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )
    return (str(spec), shapes, training)


def _is_flat(batch: Any) -> bool:
    """Whether a batch is the usual: named tensors, which need no tree."""
    return type(batch) is dict and all(type(name) is str and type(leaf) is torch.Tensor for name, leaf in batch.items())


def _named(batch: Batch) -> list[tuple[str, Any]]:
    if _is_flat(batch):
        return list(batch.items())  # type: ignore[union-attr]
    pairs, _ = tree_flatten_with_path(batch)
    return [
        (".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf) for path, leaf in pairs
    ]
