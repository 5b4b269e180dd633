"""Random schedules, right by construction: any order that the dependencies allow, on any ownership."""

from __future__ import annotations

from hypothesis import strategies as st

from shardwise.schedule import Action, Edges, Kind, Schedule

Node = tuple[Kind, int, int]


@st.composite
def graphs(draw: st.DrawFn, *, max_stages: int = 5) -> tuple[int, Edges]:
    """A number of stages and any set of edges that run upwards."""
    num_stages = draw(st.integers(1, max_stages))
    possible = [(s, t) for t in range(num_stages) for s in range(t)]
    chosen = draw(st.lists(st.sampled_from(possible), unique=True)) if possible else []
    return num_stages, frozenset(chosen)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Schedule, Edges]:
    """A schedule with whole and split backwards and several stages a rank, and the graph that it is for."""
    num_stages, edges = draw(graphs())
    num_micro_batches = draw(st.integers(1, 4))
    owner = [draw(st.integers(0, num_stages - 1)) for _ in range(num_stages)]
    ranks = sorted(set(owner))
    split = {m for m in range(num_micro_batches) if draw(st.booleans())}
    needs = _dependencies(num_stages, num_micro_batches, edges, split)
    rows: dict[int, list[Action]] = {r: [] for r in ranks}
    while needs:
        kind, stage, m = node = draw(st.sampled_from([n for n, before in needs.items() if not before & needs.keys()]))
        del needs[node]
        rows[owner[stage]].append(Action(kind=kind, stage=stage, micro_batch=m))
    schedule = Schedule(
        name="random",
        num_stages=num_stages,
        num_micro_batches=num_micro_batches,
        ranks=tuple(tuple(s for s in range(num_stages) if owner[s] == r) for r in ranks),
        actions=tuple(tuple(rows[r]) for r in ranks),
    )
    return schedule, edges


def _dependencies(num_stages: int, num_micro_batches: int, edges: Edges, split: set[int]) -> dict[Node, set[Node]]:
    needs: dict[Node, set[Node]] = {}
    for m in range(num_micro_batches):
        back = Kind.I if m in split else Kind.B
        for s in range(num_stages):
            needs[Kind.F, s, m] = {(Kind.F, t, m) for t in range(num_stages) if (t, s) in edges}
            above = {(back, t, m) for t in range(num_stages) if (s, t) in edges}
            needs[back, s, m] = {(Kind.F, s, m), *above}
            if m in split:
                needs[Kind.W, s, m] = {(Kind.I, s, m)}
    return needs
