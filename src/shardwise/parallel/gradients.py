"""Sums of gradients over everyone who holds a parameter: data-parallel replicas and stages that share a weight.

A gradient is final when the last backward of every stage of this rank that holds the parameter is done; the executor
says so. Buckets are reduced as soon as they are final, in one fixed order on all ranks. Gradients arrive already
weighted, so a sum is a mean. A parameter that has a gradient nowhere keeps none.

    last backward of stage 2 ──► … w3 w2 │ w1 w0     bucket 0 = {w3, w2} travels while w1 and w0 are computed
                                         └ all-reduce

A bucket's memory is that which its group moves fastest, and is used again in the next step, unless somebody still has a
gradient in it. Products may write into it (`home`); what was computed elsewhere is copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn as nn

from shardwise.comm.collective import Collective
from shardwise.comm.point_to_point import Waitable
from shardwise.errors import DataflowError
from shardwise.parallel.precision.masters import gradient_dtype

__all__ = ["DEFAULT_BUCKET_BYTES", "Compress", "Compressed", "GradientSum"]

DEFAULT_BUCKET_BYTES = 4 * 2**20
_KEPT = 4  # buffers of a bucket: more are in use only where somebody keeps the gradients of many steps


class Compressed(Collective, Protocol):
    """A collective that knows what it has saved."""

    @property
    def saved_bytes(self) -> int: ...


Compress = Callable[[Collective, Sequence[Sequence[int]]], Compressed]  # of a group, for a bucket of tensors of shapes


@dataclasses.dataclass(frozen=True, slots=True)
class _Buffer:
    """Memory of a bucket; its storage is kept as an object so that nobody makes another one to count by."""

    flat: torch.Tensor
    storage: torch.UntypedStorage
    unused: int  # how many refer to the storage when nobody has a gradient in it

    @property
    def is_free(self) -> bool:
        return torch._C._storage_Use_Count(self.storage._cdata) <= self.unused


@dataclasses.dataclass(slots=True, eq=False)
class _Bucket:
    group: Collective
    stages: tuple[int, ...]  # that hold its parameters, on any rank
    parameters: list[nn.Parameter]
    compressed: Compressed | None = None  # what sums the gradients, where the group itself sums the flags alone
    waits_for: int = 0  # parameters whose gradient is not final
    buffers: list[_Buffer] = dataclasses.field(default_factory=list)
    spare: torch.Tensor | None = None  # for when somebody has a gradient in every buffer: sums are copied out of it
    flat: torch.Tensor | None = None  # gradients, then one flag a parameter: how many holders have a gradient at all
    works: list[Waitable] = dataclasses.field(default_factory=list)

    @property
    def size(self) -> int:
        """Elements without flags."""
        return sum(parameter.numel() for parameter in self.parameters)

    def open(self) -> torch.Tensor:
        """Memory for a step's gradients, in which nobody has one of an earlier step."""
        if self.flat is None:
            free = next((buffer for buffer in self.buffers if buffer.is_free), None)
            if free is not None:
                self.flat = free.flat
            elif len(self.buffers) < _KEPT:
                self.buffers.append(self._make())
                self.flat = self.buffers[-1].flat
            else:  # in memory of the group all the same: other ranks may have kept none, and all move it alike
                self.spare = self._make().flat if self.spare is None else self.spare
                self.flat = self.spare
        return self.flat

    def _make(self) -> _Buffer:
        flat = self.group.empty(self.size + len(self.parameters), gradient_dtype(self.parameters[0]))
        storage = flat.untyped_storage()
        return _Buffer(flat, storage, torch._C._storage_Use_Count(storage._cdata))

    def part_of(self, parameter: nn.Parameter, flat: torch.Tensor) -> torch.Tensor:
        """Where the gradient of a parameter is."""
        start = 0
        for each in self.parameters:
            if each is parameter:
                return flat[start : start + each.numel()].view(each.shape)
            start += each.numel()
        raise KeyError(parameter.shape)


class GradientSum:
    """Reduces the gradients of one rank's parameters.

    `groups` maps a parameter's name to the group of everyone who holds it; parameters without an entry have one holder.
    `compress` wraps a group for those in `compressed`, once for every bucket and with the shapes in it. `stages` are
    the stages that hold a parameter, here or elsewhere, and `own` those of this rank. In a step: `begin()`, then for
    each own stage `end()` behind its last backward (or `during()` around that, and `end()`), and `finish()` at last.
    Every rank that is in a group ends its stages in the same order, if it has the same stages.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, Collective],
        *,
        stages: Mapping[str, Sequence[int]] | None = None,
        own: Collection[int] = (0,),
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        compress: Compress | None = None,
        compressed: Collection[Collective] = (),
    ) -> None:
        shared = {name: parameters[name] for name in groups if parameters[name].requires_grad}
        held_by = {name: (0,) if stages is None else tuple(stages[name]) for name in shared}
        self._own = frozenset(own)
        self._buckets = _fill([(p, groups[name], held_by[name]) for name, p in reversed(shared.items())], bucket_bytes)
        for bucket in self._buckets:
            if compress is not None and any(bucket.group is group for group in compressed):
                bucket.compressed = compress(bucket.group, [tuple(p.shape) for p in bucket.parameters])
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._orders: dict[tuple[int, ...], list[_Bucket]] = {}
        self._queue = self._buckets  # in the order in which they are reduced
        self._next = 0
        self._open: set[int] = set()  # own stages that have not ended
        self._pending: set[int] = set()  # ids of parameters whose gradient is not final
        self._given: set[int] = set()  # ids of parameters whose home somebody has
        self._during: frozenset[int] | None = None  # the stages that are open while hooks report, without their own
        self._task: int | None = None  # of autograd, whose accumulations are final; None: any
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]

    def begin(self, order: Sequence[int]) -> None:
        """A step begins, in which own stages end in this order."""
        key = tuple(order)
        if key not in self._orders:
            self._orders[key] = sorted(self._buckets, key=lambda bucket: self._place(bucket, key))
        self._queue, self._next = self._orders[key], 0
        self._open = set(order)
        self._pending = set(self._bucket_of)
        self._given.clear()
        for bucket in self._buckets:
            bucket.waits_for = len(bucket.parameters)
            for work in bucket.works:  # what a step has left that ended in an error
                work.wait()
            bucket.works.clear()
            bucket.flat = None

    @contextlib.contextmanager
    def during(self, stage: int) -> Iterator[Callable[[torch.Tensor], None]]:
        """Around the last backward of a stage: a gradient that autograd has accumulated in it is final.

        Not one that a backward inside it has accumulated (a function that calls `backward` in its own): others may
        follow. What this gives is a hook for the roots of the outer one, which tells the two apart.
        """
        self._during = frozenset(self._open - {stage})

        def begins(gradient: torch.Tensor) -> None:
            self._task = torch._C._current_graph_task_id()

        try:
            yield begins
        finally:
            self._during = self._task = None

    def end(self, stage: int, *, but: Collection[int] = ()) -> None:
        """The gradients of a stage are final, those of the parameters with ids `but` only when `final` says so."""
        self._open.discard(stage)
        for bucket in self._buckets:
            if stage in bucket.stages and not self._open.intersection(bucket.stages):
                for parameter in bucket.parameters:
                    if id(parameter) not in but:
                        self._settle(parameter, bucket)
        self._advance()

    def final(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is final, as far as the stages go that have ended."""
        bucket = self._bucket_of.get(id(parameter))
        if bucket is not None and not self._open.intersection(bucket.stages):
            self._settle(parameter, bucket)
            self._advance()

    def finish(self) -> None:
        """Reduce what has not been reduced, wait for all, and put the sums into the parameters' `.grad`."""
        for bucket in self._queue[self._next :]:
            self._launch(bucket)
        for bucket in self._queue:
            for work in bucket.works:
                work.wait()
            _scatter(bucket)
            bucket.flat = None
            bucket.works.clear()
        self._queue, self._next = self._buckets, 0
        self._open.clear()
        self._pending.clear()

    def close(self) -> None:
        """Take the hooks out of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def home(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Where the gradient of a parameter may be computed, shaped as it is and without values: it need not be copied
        then. Given once a step; None afterwards, and where it has no such place."""
        if id(parameter) not in self._pending or id(parameter) in self._given:
            return None
        self._given.add(id(parameter))
        bucket = self._bucket_of[id(parameter)]
        return bucket.part_of(parameter, bucket.open())

    @property
    def saved_bytes(self) -> int:
        """What compression has saved so far, of bytes that would have been handed over to be summed."""
        return sum(bucket.compressed.saved_bytes for bucket in self._buckets if bucket.compressed is not None)

    def _place(self, bucket: _Bucket, order: tuple[int, ...]) -> tuple[bool, int, int, tuple[int, ...]]:
        """Where a bucket stands among those of a step. What ranks with other stages share comes last, in an order that
        does not depend on the rank; the rest as stages end."""
        if not self._own.issuperset(bucket.stages):
            return True, 0, 0, bucket.stages
        end = max((order.index(stage) for stage in bucket.stages if stage in order), default=-1)
        return False, bucket.group.size, end, bucket.stages

    def _accumulated(self, parameter: torch.Tensor) -> None:
        if self._during is None or self._task not in (None, torch._C._current_graph_task_id()):
            return
        bucket = self._bucket_of[id(parameter)]
        if not self._during.intersection(bucket.stages):
            self._settle(parameter, bucket)
            self._advance()

    def _settle(self, parameter: torch.Tensor, bucket: _Bucket) -> None:
        if id(parameter) in self._pending:
            self._pending.discard(id(parameter))
            bucket.waits_for -= 1

    def _advance(self) -> None:
        while self._next < len(self._queue) and not self._queue[self._next].waits_for:
            self._launch(self._queue[self._next])
            self._next += 1

    def _launch(self, bucket: _Bucket) -> None:
        flat, start, size = bucket.open(), 0, bucket.size
        flags = [0.0 if parameter.grad is None else 1.0 for parameter in bucket.parameters]
        flat[size:] = torch.tensor(flags, dtype=flat.dtype)
        for parameter in bucket.parameters:
            part = flat[start : start + parameter.numel()]
            if parameter.grad is None:
                part.zero_()
            elif parameter.grad.data_ptr() != part.data_ptr():
                part.copy_(parameter.grad.reshape(-1))
            parameter.grad = None
            start += parameter.numel()
        if bucket.compressed is None:
            bucket.works = [bucket.group.all_reduce(flat)]
        else:
            bucket.works = [bucket.compressed.all_reduce(flat[:size]), bucket.group.all_reduce(flat[size:])]


def _fill(parameters: Sequence[tuple[nn.Parameter, Collective, tuple[int, ...]]], bucket_bytes: int) -> list[_Bucket]:
    """Buckets of one group, one set of stages and one dtype. Each of these is filled by itself: the members of a group
    hold other parameters besides, and must still agree on the group's buckets."""
    alike: dict[tuple[int, tuple[int, ...], torch.dtype], list[nn.Parameter]] = {}
    groups = {id(group): group for _, group, _ in parameters}
    for parameter, group, stages in parameters:
        alike.setdefault((id(group), stages, gradient_dtype(parameter)), []).append(parameter)
    buckets: list[_Bucket] = []
    for (group_id, stages, _), own in alike.items():
        filled = bucket_bytes
        for parameter in own:
            if filled >= bucket_bytes:
                buckets.append(_Bucket(groups[group_id], stages, []))
                filled = 0
            buckets[-1].parameters.append(parameter)
            filled += parameter.numel() * parameter.element_size()
    return buckets


def _scatter(bucket: _Bucket) -> None:
    assert bucket.flat is not None
    counts = bucket.flat[bucket.size :].tolist()
    flat, start = bucket.flat.clone() if bucket.flat is bucket.spare else bucket.flat, 0
    for parameter, count in zip(bucket.parameters, counts, strict=True):
        if parameter.grad is not None:
            raise DataflowError(
                f"a gradient is summed over ranks when nothing more is added to it, but one of shape "
                f"{tuple(parameter.shape)} was added to afterwards; let only the step's own backwards add to `.grad`"
            )
        part = flat[start : start + parameter.numel()]
        parameter.grad = part.view(parameter.shape) if count else None
        start += parameter.numel()
