"""Gradients reduced bucket by bucket to the ranks that keep them: each rank gets the sum of its own part.

    backward of u2 │ u1 │ u0        bucket of u2 is reduced when the backward has gone past u2, and so on: in one
              └ reduce-scatter      fixed order on all ranks, at moments that the units' order alone determines
                 └ part r on rank r ─ at the end of the step ─ all-reduce over the ranks that hold the same part

Once a step, where a stage's gradients are final, or behind every backward (`each`), so that no more than two buckets'
whole gradients are there at a time. A parameter that has a gradient nowhere keeps none; gradients that come when their
bucket has gone (a backward inside a backward) are reduced at the end of the step. Knows buckets and groups; refuses to
know units and autograd.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.nn as nn

from shardwise.comm.collective import Collective
from shardwise.comm.point_to_point import Waitable
from shardwise.parallel.precision.masters import gradient_dtype
from shardwise.parallel.sharded.bucket import Bucket

__all__ = ["GradientParts"]

_UNDER_WAY = 2  # buckets whose whole gradients are there at a time, computed or on their way


@dataclasses.dataclass(slots=True, eq=False)
class _Reduced:
    """The gradient of a bucket in a step."""

    bucket: Bucket
    part: torch.Tensor | None = None  # the sum of what has been reduced, of this rank's elements
    waits_for: set[int] = dataclasses.field(default_factory=set)  # ids of parameters whose gradient is not final
    ready: bool = False
    kept: torch.Tensor | None = None  # the memory of the part, from step to step
    storage: torch.UntypedStorage | None = None  # of it, as an object so that nobody makes another one to count by
    unused: int = 0  # how many refer to the storage when nobody has a gradient in it
    memory: torch.Tensor | None = None  # where the whole gradient is put together, without values at first
    given: set[int] = dataclasses.field(default_factory=set)  # ids of parameters whose place in it somebody has

    def taken(self, numel: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for the part, in which nobody has a gradient of an earlier step."""
        if self.kept is None or self.storage is None or _num_users(self.storage) > self.unused:
            self.kept = like.new_empty(numel)
            self.storage = self.kept.untyped_storage()
            self.unused = _num_users(self.storage)
        return self.kept


@dataclasses.dataclass(slots=True)
class _UnderWay:
    reduced: _Reduced
    work: Waitable
    out: torch.Tensor
    memory: torch.Tensor


class GradientParts:
    """Reduces the gradients of `buckets`, which are in the order of the forward, over their group, and then over
    `rest[i]`, the ranks that hold the same part of bucket i; None where there are none.

    In a step: `begin()`; for each own stage `during()` around its last backward and `end()` behind it, or `final()`
    for what `end` left open; `finish()` at last. `past()` tells that a backward has no more to add to some buckets,
    `reduce_stage()`, with `each`, that a backward of a stage has ended.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        rest: Sequence[Collective | None],
        *,
        own: Collection[int] = (0,),
        each: bool = False,
        keeps: bool = False,
    ) -> None:
        self.each = each
        self._keeps = keeps
        self._all = [_Reduced(bucket) for bucket in reversed(buckets) if bucket.trained]
        self._rest = {id(bucket): group for bucket, group in zip(buckets, rest, strict=True)}
        self._own = frozenset(own)
        self._of = {id(reduced.bucket): reduced for reduced in self._all}
        self._of_parameter = {id(p): reduced for reduced in self._all for p in reduced.bucket.parameters}
        self._numbers = {id(p): n for n, p in enumerate(p for reduced in self._all for p in reduced.bucket.parameters)}
        self._starts = {
            id(p): start for e in self._all for p, start in zip(e.bucket.parameters, e.bucket.plan.starts, strict=True)
        }
        self._has = [False] * len(self._numbers)  # whether a parameter has had a gradient in this step
        self._queue: list[_Reduced] = []
        self._next = 0
        self._open: set[int] = set()
        self._last: int | None = None  # the stage whose last backward runs
        self._under_way: collections.deque[_UnderWay] = collections.deque()
        # memory of whole gradients, kept from step to step
        self._free: dict[object, list[torch.Tensor]] = collections.defaultdict(list)
        self._made: collections.Counter[object] = collections.Counter()
        self._most: dict[torch.dtype, int] = {}
        for reduced in self._all:
            dtype = _dtype(reduced.bucket)
            self._most[dtype] = max(reduced.bucket.plan.numel, self._most.get(dtype, 0))

    # -- what a step tells ----------------------------------------------------------------------

    def begin(self, order: Sequence[int]) -> None:
        """A step begins, in which own stages end in this order."""
        self._open = set(order)
        self._drain()  # what a step has left that ended in an error
        for reduced in self._all:
            reduced.waits_for, reduced.ready = set(), False
            reduced.part = None
            reduced.given.clear()
        self._has = [False] * len(self._has)
        self._queue = [] if self.each else sorted(self._all, key=lambda reduced: self._place(reduced, order))
        self._next = 0

    @contextlib.contextmanager
    def during(self, stage: int) -> Iterator[Callable[[torch.Tensor], None]]:
        """Around the last backward of a stage."""
        self._last = stage
        try:
            yield lambda gradient: None
        finally:
            self._last = None

    def begin_backward(self, stage: int) -> None:
        """A whole backward of a stage begins."""
        if self.each:
            self._queue = self._of_stage(stage)

    def open(self, buckets: Collection[Bucket]) -> None:
        """The backward under way is about to compute the gradients of these: `home` has a place for them."""
        if not self.each and self._last is None:
            return
        for bucket in buckets:
            reduced = self._of.get(id(bucket))
            if reduced is None or reduced.memory is not None:
                continue
            if self.each or not self._open.intersection(bucket.stages) - {self._last}:
                reduced.memory = self._taken(bucket)

    def home(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Where the first gradient of a parameter may be computed, shaped as it is: it need not be copied then."""
        reduced = self._of_parameter.get(id(parameter))
        if reduced is None or parameter.grad is not None or id(parameter) in reduced.given:
            return None
        if reduced.memory is None:
            if not self._keeps:
                return None
            reduced.memory = self._taken(reduced.bucket)
        reduced.given.add(id(parameter))
        start = self._starts[id(parameter)]
        return reduced.memory[start : start + parameter.numel()].view(parameter.shape)

    def past(self, buckets: Collection[Bucket]) -> None:
        """The backward under way adds nothing more to these."""
        if not self.each and self._last is None:
            return
        for bucket in buckets:
            reduced = self._of.get(id(bucket))
            if reduced is not None and (self.each or not self._open.intersection(bucket.stages) - {self._last}):
                reduced.ready = True
        self._advance()

    def reduce_stage(self, stage: int) -> None:
        """A backward of a stage has ended, with its weight gradients."""
        if not self.each:
            return
        for reduced in (self._queue or self._of_stage(stage))[self._next :]:
            self._launch(reduced)
        self._queue, self._next = [], 0

    def end(self, stage: int, *, but: Collection[int] = ()) -> None:
        """The gradients of a stage are final, those of the parameters with ids `but` only when `final` says so."""
        self._open.discard(stage)
        if self.each:
            return
        for reduced in self._all:
            if stage in reduced.bucket.stages and not self._open.intersection(reduced.bucket.stages):
                reduced.waits_for = {id(p) for p in reduced.bucket.parameters if id(p) in but}
                reduced.ready = not reduced.waits_for
        self._advance()

    def final(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is final, as far as the stages go that have ended."""
        reduced = self._of_parameter.get(id(parameter))
        if reduced is None or self.each or self._open.intersection(reduced.bucket.stages):
            return
        reduced.waits_for.discard(id(parameter))
        reduced.ready = not reduced.waits_for
        self._advance()

    def finish(self) -> None:
        """Reduce what has not been reduced, wait for all, and give every state its gradient."""
        for reduced in self._queue[self._next :]:
            self._launch(reduced)
        self._queue, self._next = [], 0
        self._drain()
        present = self._agreed()
        present = self._over_rest(present)
        for reduced in self._all:
            self._give(reduced, present)
        self._has = [False] * len(self._has)

    def forget_memory(self) -> None:
        """The gradients of the last step are still needed: the next ones stand elsewhere."""
        for reduced in self._all:
            reduced.kept = None

    # -- one reduction --------------------------------------------------------------------------

    def _place(self, reduced: _Reduced, order: Sequence[int]) -> tuple[bool, int, tuple[int, ...]]:
        """Where a bucket stands among those of a step: as stages end; what other ranks hold too, last."""
        stages = reduced.bucket.stages
        if not self._own.issuperset(stages):
            return True, 0, stages
        return False, max((order.index(stage) for stage in stages if stage in order), default=-1), ()

    def _of_stage(self, stage: int) -> list[_Reduced]:
        found = [reduced for reduced in self._all if stage in reduced.bucket.stages]
        for reduced in found:
            reduced.ready = False
        self._next = 0
        return found

    def _advance(self) -> None:
        while self._next < len(self._queue) and self._queue[self._next].ready:
            self._launch(self._queue[self._next])
            self._next += 1

    def _launch(self, reduced: _Reduced) -> None:
        bucket = reduced.bucket
        memory, reduced.memory = reduced.memory, None
        if memory is None:
            memory = self._taken(bucket)
        reduced.given.clear()
        flat = memory[: bucket.plan.numel]
        for start, size, parameter in zip(bucket.plan.starts, bucket.plan.sizes, bucket.parameters, strict=True):
            own, gradient = flat[start : start + size], parameter.grad
            if gradient is None:
                own.zero_()
                continue
            if gradient.data_ptr() != own.data_ptr():
                own.copy_(gradient.reshape(-1))
            self._has[self._numbers[id(parameter)]] = True
            parameter.grad = None
        part = bucket.plan.numel // bucket.group.size
        if reduced.part is None:
            reduced.part = out = reduced.taken(part, flat)
        else:
            out = flat[bucket.group.rank * part : (bucket.group.rank + 1) * part]
        self._under_way.append(_UnderWay(reduced, bucket.sums.reduce_scatter(flat, out), out, memory))

    def _settle(self, under_way: _UnderWay) -> None:
        under_way.work.wait()
        part = under_way.reduced.part
        assert part is not None
        if under_way.out is not part:
            part.add_(under_way.out)
        self._free[self._kind(under_way.reduced.bucket)].append(under_way.memory)

    def _drain(self) -> None:
        while self._under_way:
            self._settle(self._under_way.popleft())

    def _taken(self, bucket: Bucket) -> torch.Tensor:
        """Memory for the whole gradient of a bucket, or more, without values: used again, if need be when what is on
        its way in it has arrived."""
        kind = self._kind(bucket)
        free = self._free[kind]
        while not free and self._under_way and self._made[kind] >= _UNDER_WAY:
            self._settle(self._under_way.popleft())
        if free:
            return free.pop()
        self._made[kind] += 1
        dtype = _dtype(bucket)
        return bucket.group.empty(bucket.plan.numel if self._keeps else self._most[dtype], dtype)

    def _kind(self, bucket: Bucket) -> object:
        """Buckets of one kind use each other's memory."""
        return id(bucket) if self._keeps else _dtype(bucket)

    # -- the end of a step ----------------------------------------------------------------------

    def _agreed(self) -> list[bool]:
        """Which parameters have a gradient on a rank of their group, after late gradients have been reduced."""
        group = self._all[0].bucket.group
        late = [any(p.grad is not None for p in reduced.bucket.parameters) for reduced in self._all]
        has = [
            self._has[self._numbers[id(p)]] or p.grad is not None
            for reduced in self._all
            for p in reduced.bucket.parameters
        ]
        told = self._summed([*has, *late], group)
        for reduced, is_late in zip(self._all, told[len(has) :], strict=True):
            if is_late:
                self._launch(reduced)
        self._drain()
        return told[: len(has)]

    def _summed(self, flags: Sequence[bool], group: Collective) -> list[bool]:
        size = -(-len(flags) // group.size) * group.size
        own = torch.tensor([*map(float, flags), *[0.0] * (size - len(flags))], device=self._all[0].bucket.flat.device)
        group.all_reduce(own).wait()
        return [number > 0 for number in own[: len(flags)].tolist()]

    def _over_rest(self, present: list[bool]) -> list[bool]:
        """Sum over those who hold the same parts, and with them who has a gradient at all."""
        works: list[Waitable] = []
        flags: dict[int, tuple[Collective, list[int]]] = {}
        for reduced in self._all:
            group = self._rest[id(reduced.bucket)]
            if group is None or reduced.part is None:
                continue
            works.append(group.all_reduce(reduced.part))
            numbers = flags.setdefault(id(group), (group, []))[1]
            numbers += [self._numbers[id(parameter)] for parameter in reduced.bucket.parameters]
        for work in works:
            work.wait()
        for group, numbers in flags.values():
            for number, has in zip(numbers, self._summed([present[n] for n in numbers], group), strict=True):
                present[number] = has
        return present

    def _give(self, reduced: _Reduced, present: Sequence[bool]) -> None:
        part, reduced.part = reduced.part, None
        names = zip(reduced.bucket.plan.names, reduced.bucket.parameters, strict=True)
        for name, parameter in names:
            state = reduced.bucket.states.get(name)
            if state is None or part is None or not present[self._numbers[id(parameter)]]:
                continue
            run, own = reduced.bucket.runs[name], state.parameter
            own.grad = part[run.at : run.at + run.numel]


def _num_users(storage: torch.UntypedStorage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _dtype(bucket: Bucket) -> torch.dtype:
    return gradient_dtype(bucket.parameters[0])
