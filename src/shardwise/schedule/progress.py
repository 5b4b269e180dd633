"""Lets all ranks work through their rows at once and notes when everything happens, or where they are stuck.

A rank takes its row in order. A transfer is asynchronous: SEND and RECV cost their rank nothing, and the
value travels once it is sent, its receive is posted, and all before it on the same link have arrived
(rendezvous, first in first out). A rank waits only ahead of an action whose inputs are not there yet.

Nobody chooses anything: every start is the largest of a few known times, so the ranks may be worked off in
any order, each as far as it gets, and no queue of events is kept. The cost is one visit an item and one an
arrival.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shardwise.errors import ScheduleError
from shardwise.schedule.actions import Action, Kind, Transfer, TransferKind
from shardwise.schedule.costs import Costs
from shardwise.schedule.graph import Edges, predecessors, successors
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.timeline import Span
from shardwise.schedule.transfers import Row

__all__ = ["run"]

_NEVER = -1.0
_SEND = TransferKind.SEND  # looked up once: the loop below meets it a million times
Times = list[float]  # [micro_batch]: seconds, or _NEVER


@dataclass(kw_only=True, slots=True)
class _Link:
    """What travels from one rank to another; the n-th send meets the n-th receive."""

    sender: int
    receiver: int
    sent: list[Transfer] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    posted_s: list[float] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # of what has arrived
    free_s: float = 0.0


@dataclass(kw_only=True, slots=True)
class _Route:
    """The way of one kind of value from one stage to another on a link."""

    link: _Link
    seconds: float
    arrived_s: Times


@dataclass(frozen=True, kw_only=True, slots=True)
class _Input:
    """One value that an action reads: when it is there, and the stage that makes it, forward or backward."""

    ready_s: Times
    stage: int
    forward: bool


class _World:
    """All ranks, what they have made, and what is under way."""

    def __init__(self, schedule: Schedule, edges: Edges, rows: tuple[Row, ...], costs: Costs) -> None:
        num_micro_batches = schedule.num_micro_batches
        self.owners = schedule.owners
        self.rows = rows
        self.costs = costs
        self.factors = costs.micro_batch_factors or (1.0,) * num_micro_batches
        self.place = [0] * schedule.num_ranks
        self.clock_s = [0.0] * schedule.num_ranks
        self.spans: list[list[Span]] = [[] for _ in rows]
        self.links: dict[tuple[int, int], _Link] = {}
        self.routes: dict[tuple[int, int], _Route] = {}
        forward_s, backward_s = ([[_NEVER] * num_micro_batches for _ in range(schedule.num_stages)] for _ in range(2))
        self.outputs = {
            Kind.F: forward_s,
            Kind.B: backward_s,
            Kind.I: backward_s,
            Kind.W: [[_NEVER] * num_micro_batches for _ in range(schedule.num_stages)],
        }
        self.inputs = self._connect(edges, schedule)
        self.work = {kind: [self._work(kind, s) for s in range(schedule.num_stages)] for kind in costs.compute_seconds}

    def _connect(self, edges: Edges, schedule: Schedule) -> dict[Kind, list[list[_Input]]]:
        stages = range(schedule.num_stages)
        below, above = predecessors(edges, len(stages)), successors(edges, len(stages))
        own_forward = [_Input(ready_s=self.outputs[Kind.F][s], stage=s, forward=True) for s in stages]
        own_backward = [_Input(ready_s=self.outputs[Kind.B][s], stage=s, forward=False) for s in stages]
        activations = [[self._value(t, s, forward=True) for t in below[s]] for s in stages]
        gradients = [[own_forward[s], *(self._value(t, s, forward=False) for t in above[s])] for s in stages]
        return {
            Kind.F: activations,
            Kind.B: gradients,
            Kind.I: gradients,
            Kind.W: [[b] for b in own_backward],
        }

    def _value(self, source: int, target: int, *, forward: bool) -> _Input:
        sender, receiver = self.owners[source], self.owners[target]
        made_s = self.outputs[Kind.F if forward else Kind.B][source]
        if sender == receiver:
            return _Input(ready_s=made_s, stage=source, forward=forward)
        link = self.links.setdefault((sender, receiver), _Link(sender=sender, receiver=receiver))
        priced = self.costs.activation_seconds if forward else self.costs.gradient_seconds
        edge = (source, target) if forward else (target, source)
        route = _Route(link=link, seconds=priced.get(edge, 0.0), arrived_s=[_NEVER] * len(made_s))
        self.routes[source, target] = route
        return _Input(ready_s=route.arrived_s, stage=source, forward=forward)

    def _work(self, kind: Kind, stage: int) -> tuple[list[Times], float, Times]:
        """What the inner loop needs to know of one kind of action on one stage: inputs, seconds, output."""
        times = [value.ready_s for value in self.inputs[kind][stage]]
        return times, self.costs.compute_seconds[kind][stage], self.outputs[kind][stage]

    def work_off(self) -> None:
        """Advances ranks until none can move."""
        waiting = list(range(len(self.rows)))[::-1]
        while waiting:
            waiting.extend(self._advance(waiting.pop()))

    def _advance(self, rank: int) -> set[int]:
        """Takes one rank as far as it gets; returns the ranks that something has arrived at."""
        row, now_s = self.rows[rank], self.clock_s[rank]
        work, factors, routes, spans = self.work, self.factors, self.routes, self.spans[rank]
        woken: set[int] = set()
        index = self.place[rank]
        while index < len(row):
            item = row[index]
            index += 1
            if isinstance(item, Action):
                m = item.micro_batch
                inputs, seconds, output = work[item.kind][item.stage]
                start_s = now_s
                for times in inputs:
                    ready_s = times[m]
                    if ready_s > start_s:
                        start_s = ready_s
                    elif ready_s < 0.0:  # not there yet: wait
                        self.place[rank], self.clock_s[rank] = index - 1, now_s
                        return woken
                output[m] = now_s = start_s + seconds * factors[m]
                spans.append(Span(rank=rank, action=item, start_s=start_s, end_s=now_s))
                continue
            route = routes[item.source, item.target]
            link = route.link
            if item.kind is _SEND:
                link.sent_s.append(now_s)
                link.sent.append(item)
            else:
                link.posted_s.append(now_s)
            if len(link.spans) < len(link.sent) and len(link.spans) < len(link.posted_s):
                self._deliver(link)
                if link.receiver != rank:
                    woken.add(link.receiver)
        self.place[rank], self.clock_s[rank] = index, now_s
        return woken

    def _deliver(self, link: _Link) -> None:
        """Lets the next value arrive, which is both sent and posted."""
        place = len(link.spans)
        transfer, m = link.sent[place], link.sent[place].micro_batch
        route = self.routes[transfer.source, transfer.target]
        start_s = max(link.sent_s[place], link.posted_s[place], link.free_s)
        link.free_s = route.arrived_s[m] = start_s + route.seconds * self.factors[m]
        link.spans.append(Span(rank=link.sender, action=transfer, start_s=start_s, end_s=link.free_s))

    def stuck(self) -> dict[int, tuple[Action, _Input]]:
        """For each rank that has not finished: the action it waits at and the first value it lacks."""
        found = {}
        for rank, row in enumerate(self.rows):
            if self.place[rank] < len(row):
                action = row[self.place[rank]]
                assert isinstance(action, Action)  # transfers never wait
                lacking = (v for v in self.inputs[action.kind][action.stage] if v.ready_s[action.micro_batch] < 0)
                found[rank] = (action, next(lacking))
        return found


def run(schedule: Schedule, edges: Edges, rows: tuple[Row, ...], costs: Costs) -> tuple[Span, ...]:
    """Works off `rows` and returns when everything ran: the actions of each rank, then the transfers of each
    link.

    Raises ScheduleError if ranks wait for each other; the message names them and their actions.
    """
    world = _World(schedule, edges, rows, costs)
    world.work_off()
    if world.stuck():
        raise ScheduleError(_describe(world))
    links = (link.spans for _, link in sorted(world.links.items()))
    return tuple(span for spans in (*world.spans, *links) for span in spans)


def _describe(world: _World) -> str:
    """Follows the waits from rank to rank until they close; that circle is the deadlock."""
    stuck = world.stuck()
    path = [min(stuck)]
    while (blocker := world.owners[stuck[path[-1]][1].stage]) in stuck and blocker not in path:
        path.append(blocker)
    circle = path[path.index(blocker) :] if blocker in path else path
    waits = "; ".join(_wait(world, rank, *stuck[rank]) for rank in circle)
    return f"ranks wait for each other and none can go on: {waits}; run one of the awaited actions earlier"


def _wait(world: _World, rank: int, action: Action, value: _Input) -> str:
    owner = world.owners[value.stage]
    for item in world.rows[owner]:
        if isinstance(item, Action) and _makes(item, value, action.micro_batch):
            where = "later in its own row" if owner == rank else f"of rank {owner}"
            return f"rank {rank} waits at {action} for {item} {where}"
    missing = f"{value.stage}{'F' if value.forward else 'B'}{action.micro_batch}"
    return f"rank {rank} waits at {action} for {missing}, which rank {owner} never runs"


def _makes(action: Action, value: _Input, micro_batch: int) -> bool:
    forward = action.kind is Kind.F
    place = (action.stage, action.micro_batch)
    return action.kind is not Kind.W and forward == value.forward and place == (value.stage, micro_batch)
