"""Sums of gradients over everyone who holds a parameter: data-parallel replicas and stages that share a weight.

A gradient is final when the last backward of every stage of this rank that holds the parameter is done; the executor
says so. Buckets are reduced as soon as they are final, in one fixed order on all ranks. Gradients arrive already
weighted, so a sum is a mean. A parameter that has a gradient nowhere keeps none.

    last backward of stage 2 ──► … w3 w2 │ w1 w0     bucket 0 = {w3, w2} travels while w1 and w0 are computed
                                         └ all-reduce
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.errors import DataflowError

__all__ = ["DEFAULT_BUCKET_BYTES", "GradientSum"]

DEFAULT_BUCKET_BYTES = 4 * 2**20


@dataclasses.dataclass(slots=True, eq=False)
class _Bucket:
    group: dist.ProcessGroup
    stages: tuple[int, ...]  # that hold its parameters, on any rank
    parameters: list[nn.Parameter]
    waits_for: int = 0  # parameters whose gradient is not final
    flat: torch.Tensor | None = None
    work: dist.Work | None = None


class GradientSum:
    """Reduces the gradients of one rank's parameters.

    `groups` maps a parameter's name to the process group of everyone who holds it; parameters without an entry have
    one holder. `stages` are the stages that hold it, here or elsewhere, and `own` those of this rank. In a step:
    `begin()`, then for each own stage `end()` behind its last backward (or `during()` around that, and `end()`), and
    `finish()` at last. Every rank that is in a group ends its stages in the same order, if it has the same stages.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Mapping[str, dist.ProcessGroup],
        *,
        stages: Mapping[str, Sequence[int]] | None = None,
        own: Collection[int] = (0,),
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    ) -> None:
        shared = {name: parameters[name] for name in groups if parameters[name].requires_grad}
        held_by = {name: (0,) if stages is None else tuple(stages[name]) for name in shared}
        self._own = frozenset(own)
        self._buckets = _fill([(p, groups[name], held_by[name]) for name, p in reversed(shared.items())], bucket_bytes)
        self._bucket_of = {id(p): bucket for bucket in self._buckets for p in bucket.parameters}
        self._orders: dict[tuple[int, ...], list[_Bucket]] = {}
        self._queue = self._buckets  # in the order in which they are reduced
        self._next = 0
        self._open: set[int] = set()  # own stages that have not ended
        self._pending: set[int] = set()  # ids of parameters whose gradient is not final
        self._during: frozenset[int] | None = None  # the stages that are open while hooks report, without their own
        self._task: int | None = None  # of autograd, whose accumulations are final; None: any
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for bucket in self._buckets
            for parameter in bucket.parameters
        ]
        self._reduced_bytes: dict[int, int] = {}

    def begin(self, order: Sequence[int]) -> None:
        """A step begins, in which own stages end in this order."""
        key = tuple(order)
        if key not in self._orders:
            self._orders[key] = sorted(self._buckets, key=lambda bucket: self._place(bucket, key))
        self._queue, self._next = self._orders[key], 0
        self._open = set(order)
        self._pending = set(self._bucket_of)
        for bucket in self._buckets:
            bucket.waits_for = len(bucket.parameters)

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
            assert bucket.flat is not None
            if bucket.work is not None:
                bucket.work.wait()
            _scatter(bucket)
            bucket.flat, bucket.work = None, None
        self._queue, self._next = self._buckets, 0
        self._open.clear()
        self._pending.clear()

    def close(self) -> None:
        """Take the hooks out of the parameters."""
        for hook in self._hooks:
            hook.remove()

    def reduced_bytes(self, group: dist.ProcessGroup) -> int:
        """Bytes that this rank has handed over to be summed over a group, so far."""
        return self._reduced_bytes.get(id(group), 0)

    def _place(self, bucket: _Bucket, order: tuple[int, ...]) -> tuple[bool, int, int, tuple[int, ...]]:
        """Where a bucket stands among those of a step. What ranks with other stages share comes last, in an order that
        does not depend on the rank; the rest as stages end."""
        if not self._own.issuperset(bucket.stages):
            return True, 0, 0, bucket.stages
        end = max((order.index(stage) for stage in bucket.stages if stage in order), default=-1)
        return False, bucket.group.size(), end, bucket.stages

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
        first = bucket.parameters[0]
        size = sum(parameter.numel() for parameter in bucket.parameters)
        # gradients, then one flag a parameter: how many holders have a gradient at all
        flat = torch.empty(size + len(bucket.parameters), dtype=first.dtype, device=first.device)
        start = 0
        for place, parameter in enumerate(bucket.parameters):
            part = flat[start : start + parameter.numel()]
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad.reshape(-1))
            flat[size + place] = 0.0 if parameter.grad is None else 1.0
            parameter.grad = None
            start += parameter.numel()
        bucket.flat = flat
        bucket.work = dist.all_reduce(flat, group=bucket.group, async_op=True)
        self._reduced_bytes[id(bucket.group)] = self.reduced_bytes(bucket.group) + flat.nbytes


def _fill(
    parameters: Sequence[tuple[nn.Parameter, dist.ProcessGroup, tuple[int, ...]]], bucket_bytes: int
) -> list[_Bucket]:
    """Buckets of one group, one set of stages and one dtype. Each of these is filled by itself: the members of a group
    hold other parameters besides, and must still agree on the group's buckets."""
    alike: dict[tuple[int, tuple[int, ...], torch.dtype], list[nn.Parameter]] = {}
    groups = {id(group): group for _, group, _ in parameters}
    for parameter, group, stages in parameters:
        alike.setdefault((id(group), stages, parameter.dtype), []).append(parameter)
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
    size = bucket.flat.numel() - len(bucket.parameters)
    counts = bucket.flat[size:].tolist()
    start = 0
    for parameter, count in zip(bucket.parameters, counts, strict=True):
        if parameter.grad is not None:
            raise DataflowError(
                f"a gradient is summed over ranks when nothing more is added to it, but one of shape "
                f"{tuple(parameter.shape)} was added to afterwards; let only the step's own backwards add to `.grad`"
            )
        part = bucket.flat[start : start + parameter.numel()]
        parameter.grad = part.view(parameter.shape) if count else None
        start += parameter.numel()
