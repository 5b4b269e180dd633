"""Lets all ranks work through their rows at once and notes when everything happens, or where they are stuck.

A rank takes its row in order. A transfer is asynchronous: SEND and RECV cost their rank nothing, and the
value travels once it is sent, its receive is posted, and all before it on the same link have arrived
(rendezvous, first in first out). A rank waits only ahead of an action whose inputs are not there yet. What runs
beside the work (offload, load, collectives) goes through a queue of the rank, first in first out.

Nobody chooses anything: every start is the largest of a few known times, so the ranks may be worked off in
any order, each as far as it gets, and no queue of events is kept. The cost is one visit an item and one an
arrival. Rows are first turned into steps that hold all an item needs (`steps`), and no object is made an item.
"""

from __future__ import annotations

from functools import partial

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.spans import Lane, Lanes
from shardwise.schedule.steps import BESIDE, COMPUTE, SEND, Input, Steps
from shardwise.schedule.transfers import DEFAULT_PREFETCH, Row, planned
from shardwise.schedule.world import World

__all__ = ["Progress", "run"]


class Progress:
    """All ranks on their way through their rows; each has run the items up to `place`."""

    def __init__(self, world: World, steps: list[Steps]) -> None:
        self.world = world
        self.steps = steps
        self.place = [0] * len(steps)
        self.clock_s = [0.0] * len(steps)
        self.starts_s: list[list[float]] = [[] for _ in steps]
        self.ends_s: list[list[float]] = [[] for _ in steps]

    def work_off(self) -> Progress:
        """Advances ranks until none can move. Raises ScheduleError if they wait for each other, and names them."""
        waiting = list(range(len(self.steps)))[::-1]
        while waiting:
            waiting.extend(self._advance(waiting.pop()))
        if self._stuck():
            raise ScheduleError(self._describe())
        return self

    @property
    def seconds(self) -> float:
        """From 0 to the last end of all."""
        return max(
            [
                *self.clock_s,
                *(link.free_s for link in self.world.links.values()),
                *(queue.free_s for queue in self.world.queues.values()),
            ]
        )

    def _advance(self, rank: int) -> set[int]:
        """Takes one rank as far as it gets; returns the ranks that something has arrived at."""
        steps, now_s = self.steps[rank], self.clock_s[rank]
        codes, micro_batches, whats = steps.codes, steps.micro_batches, steps.whats
        starts_s, ends_s = self.starts_s[rank], self.ends_s[rank]
        woken: set[int] = set()
        for index in range(self.place[rank], len(codes)):
            code, m, what = codes[index], micro_batches[index], whats[index]
            if code == COMPUTE:
                inputs, seconds, output = what
                start_s = now_s
                for times in inputs:
                    ready_s = times[m]
                    if ready_s > start_s:
                        start_s = ready_s
                    elif ready_s < 0.0:  # not there yet: wait
                        self.place[rank], self.clock_s[rank] = index, now_s
                        return woken
                output[m] = now_s = start_s + seconds[m]
                starts_s.append(start_s)
                ends_s.append(now_s)
            elif code == BESIDE:
                start_s, end_s = what.enter(m, now_s)
                starts_s.append(start_s)
                ends_s.append(end_s)
            else:
                link = what.link
                if code == SEND:
                    link.sent.append(m)
                    link.routes.append(what)
                    link.sent_s.append(now_s)
                else:
                    link.posted_s.append(now_s)
                if len(link.starts_s) < len(link.sent_s) and len(link.starts_s) < len(link.posted_s):
                    link.deliver()
                    if link.receiver != rank:
                        woken.add(link.receiver)
        self.place[rank], self.clock_s[rank] = len(codes), now_s
        return woken

    def spans(self) -> Lanes:
        """The items of each rank, then the transfers of each link."""
        rows = zip(self.world.schedule.actions, self.starts_s, self.ends_s, strict=True)
        of_ranks = [
            Lane(rank=r, starts_s=starts_s, ends_s=ends_s, actions=partial(tuple, row), computes=True)
            for r, (row, starts_s, ends_s) in enumerate(rows)
        ]
        of_links = [
            Lane(
                rank=link.sender,
                starts_s=link.starts_s,
                ends_s=link.ends_s,
                actions=link.transfers,
                computes=False,
            )
            for _, link in sorted(self.world.links.items())
        ]
        return Lanes([*of_ranks, *of_links])

    # -- where ranks wait for each other ------------------------------------------------------------

    def _stuck(self) -> dict[int, tuple[Action, Input]]:
        """For each rank that has not finished: the action it waits at and the first value it lacks."""
        found = {}
        for rank, steps in enumerate(self.steps):
            if self.place[rank] < len(steps.codes):
                action = self.world.schedule.actions[rank][len(self.starts_s[rank])]
                assert isinstance(action, Action)  # nothing else waits
                inputs = self.world.inputs[action.kind][action.stage]
                found[rank] = (action, next(v for v in inputs if v.ready_s[action.micro_batch] < 0))
        return found

    def _describe(self) -> str:
        """Follows the waits from rank to rank until they close; that circle is the deadlock."""
        stuck = self._stuck()
        path = [min(stuck)]
        while (blocker := self.world.owners[stuck[path[-1]][1].stage]) in stuck and blocker not in path:
            path.append(blocker)
        circle = path[path.index(blocker) :] if blocker in path else path
        waits = "; ".join(self._wait(rank, *stuck[rank]) for rank in circle)
        return f"ranks wait for each other and none can go on: {waits}; run one of the awaited actions earlier"

    def _wait(self, rank: int, action: Action, value: Input) -> str:
        owner = self.world.owners[value.stage]
        for item in self.world.schedule.actions[owner]:
            if isinstance(item, Action) and _makes(item, value, action.micro_batch):
                where = "later in its own row" if owner == rank else f"of rank {owner}"
                return f"rank {rank} waits at {action} for {item} {where}"
        missing = f"{value.stage}{'F' if value.forward else 'B'}{action.micro_batch}"
        return f"rank {rank} waits at {action} for {missing}, which rank {owner} never runs"


def run(
    schedule: Schedule,
    edges: Edges,
    costs: Costs,
    *,
    rows: tuple[Row, ...] | None = None,
    prefetch: int = DEFAULT_PREFETCH,
) -> Progress:
    """Works off `rows`, or the transfers that `with_transfers` would add with `prefetch`, from 0 s.

    Raises ScheduleError if ranks wait for each other; the message names them and their actions.
    """
    world = World(schedule, edges, costs)
    steps = world.planned_steps(planned(schedule, edges, prefetch)) if rows is None else world.steps_of(rows)
    return Progress(world, steps).work_off()


def _makes(action: Action, value: Input, micro_batch: int) -> bool:
    kinds = (Kind.F,) if value.forward else (Kind.B, Kind.I)
    return action.kind in kinds and (action.stage, action.micro_batch) == (value.stage, micro_batch)
