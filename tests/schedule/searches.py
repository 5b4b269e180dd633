"""Random problems for a search: costs, graphs, placements and memory limits."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from schedule.strategies import graphs
from shardwise.schedule import Costs, Edges, Kind, chain
from shardwise.schedule.memory import Memory
from shardwise.schedule.problem import Problem

TENTHS = st.integers(1, 30).map(lambda x: x / 10)


class Case(NamedTuple):
    """What `search` takes."""

    costs: Costs
    num_micro_batches: int
    ranks: tuple[tuple[int, ...], ...]
    edges: Edges
    memory: Memory | None

    @property
    def problem(self) -> Problem:
        return Problem.of(
            self.costs, self.edges, num_micro_batches=self.num_micro_batches, ranks=self.ranks, memory=self.memory
        )


@st.composite
def costs_of(draw: st.DrawFn, num_stages: int, num_micro_batches: int, edges: Edges, *, free: bool) -> Costs:
    """Some stages cannot be split; a whole backward may cost less than its halves; micro-batches may differ."""
    forward, back, late, whole = [], [], [], []
    for _ in range(num_stages):
        forward.append(draw(TENTHS))
        back.append(draw(TENTHS))
        late.append(draw(TENTHS) if draw(st.booleans()) else 0.0)
        saved = draw(st.sampled_from((0.0, 0.2)))
        whole.append(max(back[-1], back[-1] + late[-1] - saved))
    lag = {} if free else {edge: draw(st.integers(0, 20)) / 20 for edge in sorted(edges)}
    factors = draw(st.sampled_from(((), (1.0,) * (num_micro_batches - 1) + (0.5,))))
    return Costs(
        compute_seconds={
            Kind.F: tuple(forward),
            Kind.I: tuple(back),
            Kind.W: tuple(late),
            Kind.B: tuple(whole),
        },
        activation_seconds=lag,
        gradient_seconds=lag,
        micro_batch_factors=factors,
    )


@st.composite
def cases(draw: st.DrawFn, *, free: bool = False, most_micro_batches: int = 5) -> Case:
    """Any graph on any ranks, or a chain with one stage a rank, with or without limits."""
    if draw(st.booleans()):
        num_stages, edges = draw(graphs(max_stages=6))
        owner = [draw(st.integers(0, num_stages - 1)) for _ in range(num_stages)]
    else:
        num_stages = draw(st.integers(1, 4))
        edges, owner = chain(num_stages), list(range(num_stages))
    ranks = tuple(tuple(s for s in range(num_stages) if owner[s] == r) for r in sorted(set(owner)))
    num_micro_batches = draw(st.integers(1, most_micro_batches))
    costs = draw(costs_of(num_stages, num_micro_batches, edges, free=free))
    activation = tuple(draw(TENTHS) for _ in range(num_stages))
    weight = tuple(x * draw(st.sampled_from((0.0, 0.5, 1.0, 1.3))) for x in activation)
    least = [sum(max(activation[s], weight[s]) for s in stages) for stages in ranks]
    limits = tuple(draw(st.sampled_from((None, x, 1.5 * x, 2 * x))) for x in least)
    memory = Memory(activation_bytes=activation, weight_bytes=weight, limit_bytes=limits)
    return Case(costs, num_micro_batches, ranks, edges, draw(st.sampled_from((None, memory))))
