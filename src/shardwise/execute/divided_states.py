"""The state of training, divided among replicas: buckets of a rank's parameters, whole when needed, reduced when ready.

    zero=1   optimizer state            reduced once a step; parameters are whole all the time
    zero=2   and gradients              reduced once a step, or behind every backward
    zero=3   and parameters             whole for a unit's turn, or for a stage's part of a step

Knows the program's side: which actions run, what is asked for behind a step. Refuses to know optimizers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.comm.collective import Collective
from shardwise.comm.shared_collective import SharedMemoryCollective
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.sharded.bucket import Bucket
from shardwise.parallel.sharded.calls import UnitCalls
from shardwise.parallel.sharded.gradients import GradientParts
from shardwise.parallel.sharded.residency import Residency
from shardwise.parallel.states import State
from shardwise.schedule.actions import Action, Kind

__all__ = ["DividedStates", "Sums"]


class Sums:
    """Gradients of divided parameters, and of those that every replica holds: told of a step as one.

    See `parallel.gradients.GradientSum`, whose `parts` are reduced ahead of.
    """

    def __init__(self, parts: GradientParts, whole: GradientSum | None) -> None:
        self._parts = parts
        self._whole = whole

    def begin(self, order: Sequence[int]) -> None:
        """A step begins, in which own stages end in this order."""
        self._parts.begin(order)
        if self._whole is not None:
            self._whole.begin(order)

    @contextlib.contextmanager
    def during(self, stage: int) -> Iterator[Callable[[torch.Tensor], None]]:
        """Around the last backward of a stage."""
        with self._parts.during(stage) as begins:
            if self._whole is None:
                yield begins
                return
            with self._whole.during(stage) as begins:
                yield begins

    def end(self, stage: int, *, but: Collection[int] = ()) -> None:
        """The gradients of a stage are final, but those of the parameters with these ids."""
        self._parts.end(stage, but=but)
        if self._whole is not None:
            self._whole.end(stage, but=but)

    def final(self, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is final."""
        self._parts.final(parameter)
        if self._whole is not None:
            self._whole.final(parameter)

    def home(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Where the gradient of a parameter may be computed."""
        found = self._parts.home(parameter)
        return self._whole.home(parameter) if found is None and self._whole is not None else found

    def finish(self) -> None:
        """All sums are made."""
        self._parts.finish()
        if self._whole is not None:
            self._whole.finish()

    def close(self) -> None:
        """Take the hooks out of the parameters."""
        if self._whole is not None:
            self._whole.close()


class DividedStates:
    """The buckets of one rank. `buckets_of[unit]` are those that a unit reads; what no unit reads alone is whole for a
    step. `by_step`: what is freed is whole between a stage's U and H. `rest[i]`: who holds
    the same part of bucket i. `each`: gradients are reduced behind every backward; `keeps`: their memory stays."""

    def __init__(
        self,
        buckets: Sequence[Bucket],
        buckets_of: Mapping[str, Sequence[Bucket]],
        rest: Sequence[Collective | None],
        *,
        own: Sequence[int],
        by_step: bool,
        each: bool,
        keeps: bool,
    ) -> None:
        self.buckets = tuple(buckets)
        self.by_step = by_step
        self._of = {name: bucket for bucket in buckets for name in bucket.plan.names}
        self._residency = Residency(buckets)
        trained = any(bucket.trained for bucket in buckets)
        self.parts = GradientParts(buckets, rest, own=own, each=each, keeps=keeps) if trained else None
        self.calls = UnitCalls(buckets_of, self._residency, self.parts)
        self._outside = [bucket for bucket in buckets if not bucket.plan.units]
        self._unsharded: set[int] = set()
        self.meet()

    def __contains__(self, name: str) -> bool:
        return name in self._of

    @property
    def states(self) -> dict[str, State]:
        """The parts that an optimizer updates, by the name of the parameter."""
        return {name: state for bucket in self.buckets if bucket.trained for name, state in bucket.states.items()}

    def held(self, name: str) -> State | None:
        """This rank's part of a parameter, trained or not; None where it has none of it."""
        return self._of[name].states.get(name)

    # -- a step ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[Action], None]]:
        """Around the actions of a step, or of an evaluation; gives who is told of each before it runs. Collective."""
        self._residency.hold(self._outside)
        try:
            yield self._before
            self.calls.finish()
            if not torch.is_grad_enabled():  # behind a step, the sums of gradients are a meeting
                self.meet()
        finally:
            self.calls.forget()
            for stage in list(self._unsharded):
                self.reshard(stage)
            self._residency.let_go(self._outside)
            self._residency.rest()

    def unshard(self, stage: int) -> None:
        """Make the parameters of a stage whole until `reshard`. Collective."""
        if stage not in self._unsharded:
            self._unsharded.add(stage)
            self._residency.hold(self._of_stage(stage))

    def reshard(self, stage: int) -> None:
        """Keep of a stage's parameters the own parts alone."""
        if stage in self._unsharded:
            self._unsharded.discard(stage)
            self._residency.let_go(self._of_stage(stage))

    def _of_stage(self, stage: int) -> list[Bucket]:
        return [bucket for bucket in self.buckets if stage in bucket.stages and bucket.plan.units]

    def _before(self, action: Action) -> None:
        if action.kind in (Kind.F, Kind.C):
            self.calls.forward(action.stage, action.micro_batch)
        elif action.kind in (Kind.B, Kind.I):
            self.calls.backward(action.stage, action.micro_batch, whole=action.kind is Kind.B)
        elif action.kind is Kind.W:
            self.calls.weights(action.stage)

    def put_aside(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Gradients of earlier steps, taken from the states."""
        found: list[tuple[nn.Parameter, torch.Tensor]] = []
        for state in self.states.values():
            if state.parameter.grad is not None:
                found.append((state.parameter, state.parameter.grad))
                state.parameter.grad = None
        if found and self.parts is not None:
            self.parts.forget_memory()
        return found

    def refresh(self) -> None:
        """An optimizer has written into `states`. Collective."""
        for bucket in self.buckets:
            if bucket.trained:
                bucket.refresh()
        for bucket in self.buckets:
            bucket.wait()
        self.meet()

    def meet(self) -> None:
        """Where ranks read each other's parts in place: all have written what is to be read, and read what is to be
        written. Collective."""
        group = self.buckets[0].group
        if isinstance(group, SharedMemoryCollective) and any(bucket.is_common for bucket in self.buckets):
            group.barrier()

    # -- all of it ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters are whole inside. Collective."""
        self._residency.hold(self.buckets)
        try:
            yield
        finally:
            self._residency.let_go(self.buckets)

    def values(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The whole values of the parameters, a bucket at a time. Collective."""
        for bucket in self.buckets:
            self._residency.hold([bucket])
            flat = bucket.flat.detach()
            if bucket.own.dtype != flat.dtype:
                flat = torch.empty(bucket.plan.numel, dtype=bucket.own.dtype, device=flat.device)
                bucket.group.all_gather(bucket.own.detach(), flat).wait()
            for name, start, parameter in zip(bucket.plan.names, bucket.plan.starts, bucket.parameters, strict=True):
                yield name, flat[start : start + parameter.numel()].view(parameter.shape)
            self._residency.let_go([bucket])

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The whole gradients of this rank's parameters, which all ranks of the group have parts of. Collective."""
        for bucket in self.buckets:
            if not bucket.trained:
                yield from ((name, None) for name in bucket.plan.names)
                continue
            grads = [state.parameter.grad for state in bucket.states.values() if state.parameter.grad is not None]
            dtype = grads[0].dtype if grads else bucket.own.dtype
            own = torch.zeros(bucket.plan.numel // bucket.group.size, dtype=dtype, device=bucket.flat.device)
            present = torch.zeros(len(bucket.plan.names) * bucket.group.size, device=bucket.flat.device)
            for place, name in enumerate(bucket.plan.names):
                state, run = bucket.states.get(name), bucket.runs.get(name)
                if state is not None and run is not None and state.parameter.grad is not None:
                    own[run.at : run.at + run.numel].copy_(state.parameter.grad)
                    present[place] = 1.0
            flat = torch.empty(bucket.plan.numel, dtype=dtype, device=bucket.flat.device)
            bucket.group.all_gather(own, flat).wait()
            bucket.group.all_reduce(present).wait()
            for name, start, parameter, has in zip(
                bucket.plan.names, bucket.plan.starts, bucket.parameters, present.tolist(), strict=False
            ):
                gradient = flat[start : start + parameter.numel()].view(parameter.shape)
                yield name, gradient if has else None
