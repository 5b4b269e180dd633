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

from shardwise.errors import DataflowError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.engine import Engine
from shardwise.execute.flows import Flow, Flows
from shardwise.execute.late_updates import Computed, Finished, LateUpdates
from shardwise.execute.moments import Moments
from shardwise.execute.place import Place
from shardwise.execute.step_state import UnderWay, Work
from shardwise.parallel.tensor.divided import Divided
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.pipedream_2bw import windows
from shardwise.schedule.transfers import Row
from shardwise.trace.randomness import Scope

__all__ = ["Stream"]


@dataclasses.dataclass(kw_only=True, slots=True)
class _Step:
    """A step of which something is under way."""

    number: int
    slot: int
    micro_batches: Sequence[MicroBatch]
    flows: Sequence[Flow]
    total: torch.Tensor  # the weight of its global batch
    counting: dist.Work | None

    @property
    def numbers(self) -> range:
        """Of its micro-batches."""
        count = len(self.micro_batches)
        return range(self.slot * count, (self.slot + 1) * count)


class Stream:
    """The steps of one rank. Every rank calls `step` for every step, with its replica's micro-batches.

    `group` are all ranks, in a group of its own.
    """

    def __init__(
        self,
        *,
        place: Place,
        engine: Engine,
        flows: Flows,
        updates: LateUpdates,
        divided: Divided | None,
        edges: frozenset[tuple[int, int]],
        seed: int,
        sent_bytes: Callable[[], Mapping[str, int]],
        group: dist.ProcessGroup | None,
    ) -> None:
        self.place = place
        self._engine = engine
        self._flows = flows
        self._updates = updates
        self._divided = divided
        self._edges = edges
        self._seed = seed
        self._sent_bytes = sent_bytes
        self._group = group
        self._rows: dict[tuple[int, frozenset[tuple[int, int]], bool, bool, int], Row] = {}
        self._works: list[Work] = []  # of two slots
        self._under_way = UnderWay()
        self._current: _Step | None = None  # the step whose first forwards have been run

    @property
    def older(self) -> Mapping[str, torch.Tensor]:
        """The weights that the next step is computed with, by name; the parameters have the newest.

        To be read or written between two steps, when nothing is under way.
        """
        return self._updates.older

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
        if step.number != number:
            raise DataflowError(
                f"steps follow one another, but step {step.number} is under way and {number} was asked for"
            )
        ahead = None if following is None else self._begun(number + 1, 1 - step.slot, following)
        weight = self._settled(step)
        row = self._row(step, ahead, first=first)
        exchange_at = None if first else 2 * (len(step.micro_batches) - self.place.pp)
        guide = _Guide(self._updates, step, exchange_at=exchange_at)
        with contextlib.nullcontext() if self._divided is None else self._divided.step():
            losses, moments = self._engine.run(
                row, self._works, under_way=self._under_way, before_action=guide.before_action
            )
        updates = self._updates
        updates.apply()  # the last stage runs no forward of the next step in this window
        updates.put_aside(self._computed(step, weight, losses, moments, time.perf_counter() - start_s))
        if ahead is None:
            updates.exchange()
            updates.apply()
        self._current = ahead
        return updates.finished()

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
        for m, mb in zip(step.numbers, step.micro_batches, strict=True):
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

    def _computed(
        self, step: _Step, weight: float, losses: Mapping[int, torch.Tensor], moments: Moments, seconds: float
    ) -> Computed:
        loss = 0.0
        for m in step.numbers:
            if m in losses and self._works[m].factor:  # a mean over no label is 0 / 0
                loss += float(losses[m]) * self._works[m].factor
        for flow in step.flows:
            flow.met += 1
        return Computed(
            step=step.number,
            loss=loss / self.place.tp,
            weight=weight,
            seconds=seconds,
            moments=moments,
            sent_bytes=self._sent_bytes(),
        )


class _Guide:
    """Goes along with the actions of a window: which weights each one sees, and what happens between them."""

    def __init__(self, updates: LateUpdates, step: _Step, *, exchange_at: int | None) -> None:
        self._updates = updates
        self._step = step.number
        self._own = step.numbers
        self._exchange_at = exchange_at
        self._place = 0

    def before_action(self, action: Action) -> None:
        if self._place == self._exchange_at:
            self._updates.exchange()
        self._place += 1
        if action.micro_batch in self._own:
            self._updates.versions.show(self._step - 1)
            return
        assert action.kind is Kind.F  # no backward of a step runs in the window before its own
        self._updates.apply()
        self._updates.versions.show(self._step)
