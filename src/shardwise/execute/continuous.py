"""Steps without a flush between them, with two versions of the weights (see `schedule.pipedream_2bw`), on one rank.

    window t      0F6 0B4 0F7 0B5 0F0 0B6 0F1 0B7 │ window t+1
                       │            └ ahead of the first forward of step t+1: update t-1, which makes W(t)
                       └ all gradients of step t-1 are summed; their norm and loss travel
                                                  └ gradients of step t are put aside, replicas begin to sum them

Nothing here makes a rank wait for another one of its pipeline: what an update needs of the others is asked for
m - p pairs of actions after they have it, and waited for where W(t) is read first. So a step is finished, and told,
while the next one runs. Refuses to know optimizers, and when to drain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.errors import DataflowError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.engine import Engine, UnderWay, Work
from shardwise.execute.flows import Flow, Flows
from shardwise.execute.moments import Moments
from shardwise.execute.place import Place
from shardwise.execute.weight_versions import WeightVersions
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.tensor.divided import Divided
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.pipedream_2bw import windows
from shardwise.schedule.transfers import Row
from shardwise.trace.randomness import Scope

__all__ = ["Finished", "Stream", "Update"]

Update = Callable[[int, float], None]  # (step, norm of its gradients): `.grad` -> parameters, both in place
Gradients = list[torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """A step whose update has been made. Loss, weight, norm and `told` are the same on every rank."""

    step: int
    loss: float  # mean over the global batch, with the weights that the step was computed with
    weight: float
    norm: float
    told: tuple[float, ...]  # the number that each rank gave
    seconds: float  # of its window
    moments: Moments
    sent_bytes: Mapping[str, int]


@dataclasses.dataclass(kw_only=True, slots=True)
class _Step:
    """A step of which something is under way."""

    number: int
    slot: int
    micro_batches: Sequence[MicroBatch]
    flows: Sequence[Flow]
    total: torch.Tensor  # the weight of its global batch
    counting: dist.Work | None


@dataclasses.dataclass(kw_only=True, slots=True)
class _Behind:
    """A step whose backwards are done here, and whose update is not."""

    number: int
    weight: float
    loss: float  # this rank's part of it
    gradients: Gradients
    seconds: float
    moments: Moments
    sent_bytes: Mapping[str, int]
    numbers: torch.Tensor | None = None  # squares of gradients, loss, and what each rank tells
    travelling: dist.Work | None = None


class Stream:
    """The steps of one rank from `first_step` on. Every rank calls `step` for every step, with its replica's batches.

    `squares()` are those of this rank's gradients, their sum over all ranks that of the global batch; `sum_gradients`
    sums what replicas do not. `tell()` is a number that all ranks are told.
    """

    def __init__(
        self,
        *,
        place: Place,
        engine: Engine,
        flows: Flows,
        parameters: Mapping[str, nn.Parameter],
        gradients: GradientSum | None,
        divided: Divided | None,
        edges: frozenset[tuple[int, int]],
        seed: int,
        squares: Callable[[], torch.Tensor],
        sent_bytes: Callable[[], Mapping[str, int]],
        group: dist.ProcessGroup | None,
        first_step: int,
        update: Update,
        tell: Callable[[], float],
    ) -> None:
        self.place = place
        self._engine = engine
        self._flows = flows
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._trained = tuple(self._parameters.values())
        self._sums = gradients
        self._divided = divided
        self._edges = edges
        self._seed = seed
        self._squares = squares
        self._sent_bytes = sent_bytes
        self._group = group
        self._update = update
        self._tell = tell
        self._versions = WeightVersions(self._trained, newest=first_step)
        self._rows: dict[tuple[int, frozenset[tuple[int, int]], bool, bool, int], Row] = {}
        self._works: list[Work] = []  # of two slots
        self._under_way = UnderWay()
        self._current: _Step | None = None  # the step whose first forwards have been run
        self._behind: _Behind | None = None
        self._finished: list[Finished] = []

    @property
    def older(self) -> Mapping[str, torch.Tensor]:
        """The weights that the next step is computed with, by name; the parameters have those of its update.

        To be read or written between two steps, when nothing is under way.
        """
        values = self._versions.older()
        return {name: values[id(parameter)] for name, parameter in self._parameters.items()}

    def step(
        self, number: int, micro_batches: Sequence[MicroBatch], following: Sequence[MicroBatch] | None
    ) -> list[Finished]:
        """The window of step `number`: `following` are the micro-batches of the next step, None to drain.

        Returns the steps that have been finished: the one before and, where the pipeline is drained, this one too; then
        the parameters have the newest weights. Raises what `Engine.run` raises, and ScheduleError for too few
        micro-batches.
        """
        start_s = time.perf_counter()
        first = self._current is None
        step = self._begun(number, 0, micro_batches) if self._current is None else self._current
        ahead = None if following is None else self._begun(number + 1, 1 - step.slot, following)
        weight = self._settled(step)
        row = self._row(step, ahead, first=first)
        guide = _Guide(self, step, exchange_at=None if first else 2 * (len(step.micro_batches) - self.place.pp))
        with contextlib.nullcontext() if self._divided is None else self._divided.step():
            losses, moments = self._engine.run(
                row, self._works, under_way=self._under_way, before_action=guide.before_action
            )
        self._apply()  # the last stage runs no forward of the next step in this window
        self._put_aside(step, weight, losses, moments, time.perf_counter() - start_s)
        if ahead is None:
            self._exchange()
            self._apply()
        self._current = ahead
        finished, self._finished = self._finished, []
        return finished

    # -- a step begins ------------------------------------------------------------------------------

    def _begun(self, number: int, slot: int, micro_batches: Sequence[MicroBatch]) -> _Step:
        """Its micro-batches in their slot; what they weigh is asked for, not waited for."""
        count = len(micro_batches)
        starts = self._current is None and slot == 0
        if not starts and 2 * count != len(self._works):
            raise DataflowError(
                f"steps that are not drained in between have equally many micro-batches, but step {number} has {count} "
                f"and the one before {len(self._works) // 2}; drain the pipeline ahead of it"
            )
        scopes = [
            Scope(seed=self._seed, step=number, micro_batch=mb.index, samples=mb.samples, place="glue", call=0)
            for mb in micro_batches
        ]
        flows = [self._flows.flow_of(mb, scope) for mb, scope in zip(micro_batches, scopes, strict=True)]
        works = [
            Work(mb, flow, 0.0, scope, headers=flow.met == 0 and len(flow.cut.stages) > 1)
            for mb, flow, scope in zip(micro_batches, flows, scopes, strict=True)
        ]
        if starts:
            self._works = works * 2
        self._works[slot * count : (slot + 1) * count] = works
        total = torch.tensor(sum(mb.weight for mb in micro_batches), dtype=torch.float64, device=self._engine.device)
        counting = None
        if self.place.dp > 1:  # every rank of a replica counts the same micro-batches
            total /= self.place.pp * self.place.tp
            counting = dist.all_reduce(total, group=self._group, async_op=True)
        return _Step(number=number, slot=slot, micro_batches=micro_batches, flows=flows, total=total, counting=counting)

    def _settled(self, step: _Step) -> float:
        """The weight of the global batch; the factors of its losses are right from here on."""
        if step.counting is not None:
            step.counting.wait()
        weight = float(step.total.item())
        for m, mb in enumerate(step.micro_batches, step.slot * len(step.micro_batches)):
            self._works[m] = dataclasses.replace(self._works[m], factor=mb.weight / weight if weight else 0.0)
        return weight

    def _row(self, step: _Step, ahead: _Step | None, *, first: bool) -> Row:
        """The window of this rank; rows are made once."""
        for flow in (*step.flows, *(ahead.flows if ahead is not None else ())):
            self._edges = self._edges.union(flow.cut.edges)
        count, last = len(step.micro_batches), ahead is None
        key = count, self._edges, first, last, step.slot
        if key not in self._rows:
            made = windows(num_ranks=self.place.pp, num_micro_batches=count, edges=self._edges)
            self._rows[key] = made.row(self.place.position, first=first, last=last, slot=step.slot)
        return self._rows[key]

    # -- a step ends --------------------------------------------------------------------------------

    def _put_aside(
        self, step: _Step, weight: float, losses: Mapping[int, torch.Tensor], moments: Moments, seconds: float
    ) -> None:
        """All gradients of a step are here: those of the next one are summed apart from them."""
        loss = 0.0
        for m in range(step.slot * len(step.micro_batches), (step.slot + 1) * len(step.micro_batches)):
            if m in losses and self._works[m].factor:  # a mean over no label is 0 / 0
                loss += float(losses[m]) * self._works[m].factor
        for flow in step.flows:
            flow.met += 1
        if self._sums is not None:  # what replicas and other stages hold too is taken from the parameters, and travels
            self._sums.begin(self.place.stages)
            for stage in self.place.stages:
                self._sums.end(stage)
        self._behind = _Behind(
            number=step.number,
            weight=weight,
            loss=loss / self.place.tp,
            gradients=self._replaced([None] * len(self._trained)),
            seconds=seconds,
            moments=moments,
            sent_bytes=self._sent_bytes(),
        )

    def _exchange(self) -> None:
        """Sum the gradients of the step behind; its norm and loss, and what ranks tell, travel from here on."""
        behind = self._behind
        assert behind is not None
        of_next = self._replaced(behind.gradients)
        if self._sums is not None:
            self._sums.finish()
        if self._divided is not None and self._divided.shares:
            self._divided.sum_shared(self._parameters)
        world = self.place.world_size
        numbers = torch.zeros(2 + world, dtype=torch.float64, device=self._engine.device)
        numbers[0] = self._squares() / self.place.dp
        numbers[1] = behind.loss
        numbers[2 + self.place.rank] = self._tell()
        behind.numbers = numbers
        if world > 1:
            behind.travelling = dist.all_reduce(numbers, group=self._group, async_op=True)
        behind.gradients = self._replaced(of_next)

    def _apply(self) -> None:
        """The update of the step behind, if there is one: from the newest weights, with its gradients."""
        behind, self._behind = self._behind, None
        if behind is None:
            return
        assert behind.numbers is not None
        if behind.travelling is not None:
            behind.travelling.wait()
        squares, loss, *told = behind.numbers.tolist()
        norm = squares**0.5
        of_next = self._replaced(behind.gradients)
        with self._versions.renewing():
            self._update(behind.number, norm)
        self._replaced(of_next)
        self._finished.append(
            Finished(
                step=behind.number,
                loss=loss,
                weight=behind.weight,
                norm=norm,
                told=tuple(told),
                seconds=behind.seconds,
                moments=behind.moments,
                sent_bytes=behind.sent_bytes,
            )
        )

    def _replaced(self, gradients: Gradients) -> Gradients:
        """Gives the parameters other gradients; returns those that they had."""
        had: Gradients = []
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            had.append(parameter.grad)
            parameter.grad = gradient
        return had


class _Guide:
    """Goes along with the actions of a window: which weights each one sees, and what happens between them."""

    def __init__(self, stream: Stream, step: _Step, *, exchange_at: int | None) -> None:
        self._stream = stream
        self._number = step.number
        self._own = range(step.slot * len(step.micro_batches), (step.slot + 1) * len(step.micro_batches))
        self._exchange_at = exchange_at
        self._place = 0

    def before_action(self, action: Action) -> None:
        if self._place == self._exchange_at:
            self._stream._exchange()
        self._place += 1
        if action.micro_batch in self._own:
            self._stream._versions.show(self._number - 1)
            return
        assert action.kind is Kind.F  # no backward of a step runs in the window before its own
        self._stream._apply()
        self._stream._versions.show(self._number)
