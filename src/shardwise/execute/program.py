"""A model laid out on ranks, seen from one of them: one call for a step, whatever the layout.

Made by `build.build`; holds what is live (parameters, groups, hooks). Knows no optimizer, no data source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.traffic import Traffic
from shardwise.errors import LayoutError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.compiled import Compiled
from shardwise.execute.continuous import Stream
from shardwise.execute.divided_states import DividedStates, Sums
from shardwise.execute.engine import Engine
from shardwise.execute.expert_ranks import ExpertCounts, ExpertStep
from shardwise.execute.flows import Flows
from shardwise.execute.held import Held
from shardwise.execute.late_updates import LateUpdates, Update
from shardwise.execute.mean_loss import MeanLoss
from shardwise.execute.moments import Moments
from shardwise.execute.place import Place
from shardwise.execute.split_proof import SplitProof
from shardwise.execute.stage_forward import Seen
from shardwise.execute.step_state import Work
from shardwise.parallel.batch_statistics import BatchStatistics, SynchronisedStatistics
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.precision.numerics import Numerics
from shardwise.parallel.tensor.divided import Divided
from shardwise.plan.cut import Cut
from shardwise.plan.sources import ScheduleSource
from shardwise.schedule.actions import Action, StageAction, StageKind
from shardwise.schedule.check import check
from shardwise.schedule.passes.shard import with_sharding
from shardwise.schedule.schedule import Schedule, forward_only
from shardwise.schedule.transfers import Row, with_transfers
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import Tape

__all__ = ["Place", "Program", "StepResult"]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step tells: the mean loss over the global batch and its weight, the same on every rank."""

    loss: float
    weight: float
    moments: Moments
    experts: ExpertStep | None = None  # what the experts did, where they are divided
    sent_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by this rank; see `comm.traffic`
    edges: frozenset[tuple[int, int]] = frozenset()  # between which stages something crossed
    sums_s: float = 0.0  # for which this rank waited for sums of gradients, behind its last action


class Program(Held):
    """One rank's share of a model under a layout. Use `build` to make one and `close()` to take it apart."""

    def __init__(
        self,
        model: nn.Module,
        *,
        place: Place,
        flows: Flows,
        engine: Engine,
        schedule: ScheduleSource,
        holders: Mapping[str, tuple[int, ...]],
        gradients: GradientSum | None,
        divided_states: DividedStates | None = None,
        edges: frozenset[tuple[int, int]],
        seed: int,
        tape: Tape,
        cut: Cut,
        stack: contextlib.ExitStack,
        divided: Divided | None = None,
        experts: DividedExperts | None = None,
        context: DealtContext | None = None,
        everyone: SameHostGroup | None = None,
        traffic: Traffic | None = None,
        split_proofs: Sequence[SplitProof] = (),
        numerics: Numerics | None = None,
        compiled: Compiled | None = None,
        statistics: BatchStatistics | None = None,
    ) -> None:
        super().__init__(
            model,
            place=place,
            holders=holders,
            device=engine.device,
            divided=divided,
            experts=experts,
            divided_states=divided_states,
            numerics=numerics or Numerics(model),
        )
        self.compiled = compiled
        self._statistics = statistics  # of BatchNorm, on several replicas
        self.split_proofs = tuple(split_proofs)  # which units split their backward, where the schedule does
        self._traffic = traffic or Traffic()
        self._everyone = everyone
        self.context = context  # the units on own tokens of sequences, where these are divided
        self._expert_counts = (
            None if experts is None else ExpertCounts(experts, shard=place.shard, device=engine.device)
        )
        self.tape = tape
        self.cut = cut
        self.seed = seed
        self._flows = flows
        self._engine = engine
        self._schedule = schedule
        parts = None if divided_states is None else divided_states.parts
        self._gradients = gradients if parts is None else Sums(parts, gradients)
        self._edges = edges
        self._rows: dict[tuple[int, frozenset[tuple[int, int]], bool], Row] = {}
        self._stack = stack
        self._world = place.world_size
        self._trained = tuple(parameter for parameter in self.parameters.values() if parameter.requires_grad)
        self._frozen = {name: p for name, p in self.parameters.items() if not p.requires_grad}

    @property
    def random(self) -> bool:
        """Whether a step that has been run drew random numbers."""
        return self._flows.random

    @property
    def engine(self) -> Engine:
        """Who runs forwards, for those that are no steps: `generation`."""
        return self._engine

    @property
    def flows(self) -> Flows:
        """The tapes and cuts of what has been met."""
        return self._flows

    # -- steps ----------------------------------------------------------------------------------

    def meet(self, micro_batches: Sequence[MicroBatch], *, step: int) -> None:
        """Trace what a step with these micro-batches meets; in that step nobody checks any more what arrives."""
        for micro_batch in micro_batches:
            self._flows.flow_of(micro_batch, self._scope(micro_batch, step)).met += 1

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        before_action: Callable[[Action], None] | None = None,
    ) -> StepResult:
        """Forward and backward of this replica's micro-batches; gradients of the mean loss are in `.grad` afterwards,
        added to what was there before. `before_action` is told of each action before it runs.

        Every rank calls it with its replica's micro-batches. Raises `DataflowError`, `TransferError`, and `LayoutError`
        for a parameter that was frozen when the model was laid out on several ranks and is not any more.
        """
        thawed = [name for name, parameter in self._frozen.items() if parameter.requires_grad]
        if thawed and self._world > 1:
            raise LayoutError(
                f"who sums a gradient is settled when a model is laid out, but {len(thawed)} parameters such as "
                f"{thawed[0]} were frozen then and now ask for a gradient; lay the model out again"
            )
        return self._run(micro_batches, step=step, backward=True, before_action=before_action)

    def evaluate(self, micro_batches: Sequence[MicroBatch], *, step: int = 0, seen: Seen | None = None) -> StepResult:
        """The mean loss without gradients. The caller has set `model.eval()`. On ranks that compute the loss `seen` is
        shown every micro-batch of theirs with its outputs, whose tensors are whole."""
        with torch.no_grad(), self._engine.showing(seen):
            return self._run(micro_batches, step=step, backward=False)

    def _scope(self, mb: MicroBatch, step: int) -> Scope:
        return Scope(seed=self.seed, step=step, micro_batch=mb.index, samples=mb.samples, place="glue", call=0)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        step: int,
        backward: bool,
        before_action: Callable[[Action], None] | None = None,
    ) -> StepResult:
        total, pending = self._total_weight(micro_batches)
        scopes = [self._scope(mb, step) for mb in micro_batches]
        flows = [self._flows.flow_of(mb, scope) for mb, scope in zip(micro_batches, scopes, strict=True)]
        if pending is not None:
            pending.wait()
        weight = float(total.item())
        scale = self.numerics.scale if backward else 1.0
        works = [
            Work(
                mb,
                flow,
                scale * mb.weight / weight if weight else 0.0,
                scope,
                headers=flow.met == 0 and len(flow.cut.stages) > 1,
            )
            for mb, flow, scope in zip(micro_batches, flows, scopes, strict=True)
        ]
        edges = self._edges.union(*(flow.cut.edges for flow in flows))
        row = self._row(len(micro_batches), edges, backward)
        factors = [work.factor / scale for work in works]
        mean = MeanLoss(
            factors,
            device=self._device,
            alone=self._world == 1,
            shards=self.place.tp * self.place.cp,
            group=self._everyone,
            positions={self.place.owner_of[flow.cut.loss_stage] for flow in flows},
        )
        before = self._summed_before() if backward else []
        with contextlib.ExitStack() as around:
            around.enter_context(self.numerics.running())
            if self.divided is not None:
                around.enter_context(self.divided.step())
            if self._statistics is not None and backward:
                around.enter_context(self._statistics.step())
            told = None if self._divided_states is None else around.enter_context(self._divided_states.step())
            _, moments = self._engine.run(
                row,
                works,
                gradients=self._gradients if backward else None,
                after_last_forward=mean.start,
                before_action=_both(told, before_action),
            )
        computed_s = time.perf_counter()
        if self._gradients is not None and backward:
            self._gradients.finish()
        if self.divided is not None and self.divided.shares and backward:
            self.divided.sum_shared(self.parameters)
        if backward:
            self.numerics.settle(self.parameters)
            if self._divided_states is not None:
                self.numerics.settle({name: state.parameter for name, state in self._divided_states.states.items()})
            self.numerics.masters.collect()
        for parameter, gradient in before:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        sums_s = time.perf_counter() - computed_s
        for flow in flows:
            flow.met += 1
        loss = mean.wait()  # behind everything that the step sends
        experts = None if self._expert_counts is None else self._expert_counts.read()
        return StepResult(loss, weight, moments, experts, self._traffic.read(), edges, sums_s)

    def _summed_before(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Gradients of earlier steps, put aside where this one's are summed over ranks, or scaled: theirs have been."""
        sums = self._gradients is not None or (self.divided is not None and self.divided.shares)
        if not sums and self.numerics.scale == 1.0:
            return []
        before = [(p, p.grad) for p in self._trained if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        return before if self._divided_states is None else [*before, *self._divided_states.put_aside()]

    def _total_weight(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, Any]:
        total = torch.tensor(sum(mb.weight for mb in micro_batches), dtype=torch.float64, device=self._device)
        if self.place.dp == 1:  # every rank has the same micro-batches
            return total, None
        # Every rank of a replica counts the same micro-batches: the sum over the world is too large.
        total /= self.place.pp * self.place.cp * self.place.tp
        return total, dist.all_reduce(total, async_op=True)

    def _row(self, num_micro_batches: int, edges: frozenset[tuple[int, int]], backward: bool) -> Row:
        key = (num_micro_batches, edges, backward)
        if key not in self._rows:
            schedule = self._schedule(num_micro_batches)
            if not backward:
                schedule = forward_only(schedule)
            if self._divided_states is not None and self._divided_states.by_step:
                schedule = with_sharding(schedule) if not _gathers(schedule) else schedule
            check(schedule, edges)
            self._rows[key] = with_transfers(schedule, edges)[self.place.position]
        return self._rows[key]

    def schedule_of(self, num_micro_batches: int) -> Schedule:
        """The schedule of a step of so many micro-batches a replica."""
        return self._schedule(num_micro_batches)

    def row(self, num_micro_batches: int) -> Row:
        """What this rank does in a step, in order, with its transfers."""
        return self._row(num_micro_batches, self._edges, True)

    def stream(self, *, first_step: int, update: Update, tell: Callable[[], float] = lambda: 0.0) -> Stream:
        """The steps from `first_step` on without a flush between them, instead of `step`. Collective.

        `update(step, norm)` applies `.grad` to the parameters, `tell()` is a number that every rank is told. Raises
        LayoutError where experts are divided.
        """
        if self.experts is not None:
            raise LayoutError(
                f"steps without a flush do not count what experts do, but ep={self.place.ep}; use another schedule, or "
                "ep=1"
            )
        if self.place.fsdp > 1:
            raise LayoutError(
                f"steps without a flush update parameters that every replica holds, but fsdp={self.place.fsdp} divides "
                "their state; use another schedule, or dp in its place"
            )
        if isinstance(self._statistics, SynchronisedStatistics):
            raise LayoutError(
                "steps without a flush are computed by replicas at different times, which share no statistics; use "
                'another schedule, or leave batch_norm = "synchronised" out'
            )
        precision = self.numerics.precision
        if precision.compute != "float32" or precision.deterministic:
            raise LayoutError(
                f"steps without a flush compute in the model's own dtype, but precision is {precision.label}; use "
                "another schedule, or leave precision out"
            )
        group = None
        if self._world > 1:  # of its own: nothing else stands between two of its sums
            group = dist.new_group()
            assert isinstance(group, dist.ProcessGroup)
            self._stack.callback(dist.destroy_process_group, group)
        updates = LateUpdates(
            place=self.place,
            parameters=self.parameters,
            gradients=self._gradients if isinstance(self._gradients, GradientSum) else None,
            divided=self.divided,
            squares=self._own_squares,
            group=group,
            device=self._device,
            first_step=first_step,
            update=update,
            tell=tell,
        )
        return Stream(
            place=self.place,
            engine=self._engine,
            flows=self._flows,
            updates=updates,
            divided=self.divided,
            edges=self._edges,
            seed=self.seed,
            sent_bytes=self._traffic.read,
            group=group,
        )

    def on_close(self, callback: Callable[[], object]) -> None:
        """Ask for `callback` when the program is taken apart, the last one first."""
        self._stack.callback(callback)

    def close(self) -> None:
        """Take hooks and substitutions out of the model. Parameters whose state is divided stay where they are: in
        memory that ranks of a host share, or, with zero=3, without any; to go on with them, copy `values()` before."""
        if self._gradients is not None:
            self._gradients.close()
        self._stack.close()
        self.numerics.close()


def _both(
    first: Callable[[Action], None] | None, second: Callable[[Action], None] | None
) -> Callable[[Action], None] | None:
    if first is None or second is None:
        return first or second

    def told(action: Action) -> None:
        first(action)
        second(action)

    return told


def _gathers(schedule: Schedule) -> bool:
    """Whether the schedule says itself when stages are gathered."""
    return any(isinstance(each, StageAction) and each.kind is StageKind.U for row in schedule.actions for each in row)
