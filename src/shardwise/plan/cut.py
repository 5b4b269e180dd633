"""The cut of a dataflow into stages: what each stage computes, receives and sends, in the fewest bytes.

Every unit call runs on one stage, which is given. Glue is computed wherever it is needed; what crosses between
stages is chosen per stage as a minimum vertex cut (Ford and Fulkerson 1956; scipy's Dinic) between what other
stages' calls make and what this stage needs. Knows no tensors and no schedule.

    stage 0 : x1 = x0 + f1          x0, f1, f2 made by calls of the stages 0, 0, 1
    stage 1 : x2 = x1 + f2          stage 2 needs x2; {x0, f1, f2} would be three tensors, {x2} is one:
    stage 2 : g(x2)                 stage 1 computes the sum, which makes x1 a need of stage 1, and so on
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from shardwise.describe.flow import Dataflow, Node, NodeKind
from shardwise.errors import LayoutError

__all__ = ["Cut", "StageCut", "cut_stages"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StageCut:
    """What one stage does. Value and node indices refer to the dataflow."""

    stage: int
    calls: tuple[int, ...]  # nodes: unit calls that run here
    computes: frozenset[int]  # nodes: calls and glue operations that run here for real
    receives: tuple[tuple[int, int], ...]  # (value, from stage), in order of the value
    sends: tuple[tuple[int, int], ...]  # (value, to stage), in order of the value
    last_node: int  # the forward is left once this node has run
    parameters: frozenset[str]  # parameters read here


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """All stages of one dataflow, and the bytes on every edge of the stage graph."""

    stages: tuple[StageCut, ...]
    edges: tuple[tuple[int, int], ...]  # (from stage, to stage)
    edge_bytes: Mapping[tuple[int, int], int]  # forward bytes of a micro-batch
    loss_stage: int
    order: tuple[int, ...]  # stages, each after those it receives from


def cut_stages(flow: Dataflow, stage_of_call: Mapping[int, int], num_stages: int, *, idle: bool = False) -> Cut:
    """Cut `flow` where `stage_of_call` (call node -> stage) says; with `idle` a stage may have no call at all.

    Raises `LayoutError` if a call has no stage, if stages depend on each other in a circle, or if Python code between
    the units looks at a value that only a later stage has.
    """
    _check_assignment(flow, stage_of_call, num_stages, idle)
    above = _stages_above(flow, stage_of_call)
    order = _topological(flow, stage_of_call, above, num_stages)
    position = {stage: place for place, stage in enumerate(order)}
    owner = [max(_members(mask), key=position.__getitem__, default=-1) for mask in above]
    loss_stage = max((owner[value] for value in flow.results), key=lambda s: position.get(s, -1), default=-1)
    if loss_stage < 0:
        loss_stage = order[-1]
    wanted: list[set[int]] = [set() for _ in range(num_stages)]
    wanted[loss_stage].update(flow.results)
    ends = _last_nodes(flow, stage_of_call, num_stages, loss_stage)
    cuts: dict[int, StageCut] = {}
    sends: list[set[tuple[int, int]]] = [set() for _ in range(num_stages)]
    for stage in reversed(order):
        computes, receives = _cut_one(flow, stage_of_call, stage, wanted[stage], ends[stage], above, owner, position)
        for value, source in receives:
            wanted[source].add(value)
            sends[source].add((value, stage))
        here = frozenset(computes) | {node for node, at in stage_of_call.items() if at == stage}
        last = max([*here, *(flow.values[value].node for value, _ in receives)], default=0)
        cuts[stage] = StageCut(
            stage=stage,
            calls=tuple(sorted(node for node, at in stage_of_call.items() if at == stage)),
            computes=here,
            receives=tuple(sorted(receives)),
            sends=(),
            last_node=len(flow.nodes) if stage == loss_stage else last,
            parameters=frozenset(name for node in here for name in flow.nodes[node].parameters),
        )
    stages = tuple(dataclasses.replace(cuts[s], sends=tuple(sorted(sends[s]))) for s in range(num_stages))
    edge_bytes: dict[tuple[int, int], int] = {}
    for stage_cut in stages:
        for value, source in stage_cut.receives:
            edge = (source, stage_cut.stage)
            edge_bytes[edge] = edge_bytes.get(edge, 0) + flow.values[value].nbytes
    return Cut(
        stages=stages, edges=tuple(sorted(edge_bytes)), edge_bytes=edge_bytes, loss_stage=loss_stage, order=tuple(order)
    )


def _check_assignment(flow: Dataflow, stage_of_call: Mapping[int, int], num_stages: int, may_idle: bool) -> None:
    for node in flow.calls:
        stage = stage_of_call.get(node.index)
        if stage is None or not 0 <= stage < num_stages:
            raise LayoutError(
                f"every unit call runs on exactly one of the {num_stages} stages: {node.label} has stage {stage}; "
                f"give it one of 0..{num_stages - 1}"
            )
    idle = sorted(set(range(num_stages)) - set(stage_of_call.values()))
    if idle and not may_idle:
        raise LayoutError(
            f"every stage has a unit call: stages {idle} of {num_stages} have none of the {len(flow.calls)} calls; "
            f"use at most {len(flow.calls)} stages"
        )


def _stages_above(flow: Dataflow, stage_of_call: Mapping[int, int]) -> list[int]:
    """For every value, a bit mask of the stages whose calls it comes from through glue alone."""
    above = [0] * len(flow.values)
    for node in flow.nodes:
        if node.kind is NodeKind.CALL:
            mask = 1 << stage_of_call[node.index]
        else:
            mask = 0
            for read in node.reads:
                mask |= above[read]
        for value in node.makes:
            above[value] = mask
    return above


def _members(mask: int) -> list[int]:
    return [stage for stage in range(mask.bit_length()) if mask >> stage & 1]


def _topological(flow: Dataflow, stage_of_call: Mapping[int, int], above: Sequence[int], num_stages: int) -> list[int]:
    """Stages in an order in which each comes after those it reads from; the lowest number first."""
    before = [0] * num_stages
    witness: dict[tuple[int, int], str] = {}
    for node in flow.calls:
        stage = stage_of_call[node.index]
        for read in node.reads:
            for source in _members(above[read] & ~(1 << stage)):
                before[stage] |= 1 << source
                witness.setdefault((source, stage), f"{node.label} reads {flow.nodes[flow.values[read].node].label}")
    order: list[int] = []
    done = 0
    while len(order) < num_stages:
        ready = [s for s in range(num_stages) if not done >> s & 1 and not before[s] & ~done]
        if not ready:
            stuck = [s for s in range(num_stages) if not done >> s & 1]
            why = "; ".join(
                f"stage {b} needs stage {a} ({text})"
                for (a, b), text in sorted(witness.items())
                if a in stuck and b in stuck
            )
            raise LayoutError(f"stages must not depend on each other in a circle: {why}; give these calls one stage")
        order.append(ready[0])
        done |= 1 << ready[0]
    return order


def _last_nodes(flow: Dataflow, stage_of_call: Mapping[int, int], num_stages: int, loss_stage: int) -> list[int]:
    """The last call of every stage; Python's looks at values up to there are needed by the stage."""
    last = [max((n for n, at in stage_of_call.items() if at == stage), default=0) for stage in range(num_stages)]
    last[loss_stage] = len(flow.nodes)
    return last


def _cut_one(
    flow: Dataflow,
    stage_of_call: Mapping[int, int],
    stage: int,
    wanted: set[int],
    end: int,
    above: Sequence[int],
    owner: Sequence[int],
    position: Mapping[int, int],
) -> tuple[set[int], set[tuple[int, int]]]:
    """Glue nodes that `stage` computes, and (value, from stage) that it receives."""
    looks = [n for n in flow.nodes[: end + 1] if n.kind is NodeKind.READ]
    needs = set(wanted)
    for node in (*(n for n in flow.calls if stage_of_call[n.index] == stage), *looks):
        needs.update(node.reads)
    own = 1 << stage

    def foreign(value: int) -> bool:
        return bool(above[value] & ~own)

    kept = (value for node in flow.nodes if node.keeps_state for value in node.makes)  # maybe nobody reads it
    needs.update(value for value in kept if not foreign(value))

    # The part of the dataflow behind the needs, back to the calls: values that depend on foreign calls.
    region: set[int] = set()
    glue: set[int] = {node.index for node in looks}
    stack = list(needs)
    seen = set(stack)
    while stack:
        value = stack.pop()
        node = flow.nodes[flow.values[value].node]
        if foreign(value):
            region.add(value)
        if node.kind is NodeKind.CALL:
            continue
        glue.add(node.index)
        for read in node.reads:
            if read not in seen:
                seen.add(read)
                stack.append(read)
    crossing = _minimum_cut(flow, region, needs & region, stage, stage_of_call, above, owner, position)
    # What is computed: glue behind the needs that is not behind a received value.
    computes = {node.index for node in looks}
    stack = [value for value in needs if value not in crossing]
    seen = set(stack)
    while stack:
        node = flow.nodes[flow.values[stack.pop()].node]
        if node.kind is NodeKind.CALL:
            continue
        computes.add(node.index)
        for read in node.reads:
            if read not in seen and read not in crossing:
                seen.add(read)
                stack.append(read)
    return computes, {(value, owner[value]) for value in crossing}


def _minimum_cut(
    flow: Dataflow,
    region: set[int],
    needs: set[int],
    stage: int,
    stage_of_call: Mapping[int, int],
    above: Sequence[int],
    owner: Sequence[int],
    position: Mapping[int, int],
) -> set[int]:
    """The values of least traffic that separate foreign calls from the needs; the latest such cut."""
    if not region:
        return set()
    values = sorted(region)
    place = {value: index for index, value in enumerate(values)}
    source, sink = 2 * len(values), 2 * len(values) + 1
    # A value is split into in -> out; the capacity is its traffic. 2^30 stands for "never".
    never = 2**30
    scale = max(1.0, sum(flow.values[value].traffic_bytes for value in values) / 2**28)
    rows: list[int] = []
    columns: list[int] = []
    capacities: list[int] = []

    def connect(a: int, b: int, capacity: int) -> None:
        rows.append(a)
        columns.append(b)
        capacities.append(capacity)

    for value in values:
        about = flow.values[value]
        node = flow.nodes[about.node]
        receivable = about.crossable and not above[value] >> stage & 1 and position[owner[value]] < position[stage]
        inlet, outlet = 2 * place[value], 2 * place[value] + 1
        connect(inlet, outlet, int(about.traffic_bytes / scale) + 1 if receivable else never)
        if node.kind is NodeKind.CALL:
            connect(source, inlet, never)
        else:
            for read in set(node.reads) & region:
                connect(2 * place[read] + 1, inlet, never)
        if value in needs:
            connect(outlet, sink, never)
    graph = csr_array((np.array(capacities, dtype=np.int32), (rows, columns)), shape=(sink + 1, sink + 1))
    result = maximum_flow(graph, source, sink, method="dinic")
    if result.flow_value >= never:
        raise LayoutError(_uncuttable(flow, values, needs, stage, above))
    reaches = _reaching(graph - result.flow, sink)
    return {value for value in values if 2 * place[value] + 1 in reaches and 2 * place[value] not in reaches}


def _reaching(residual: csr_array, sink: int) -> set[int]:
    """Nodes from which the sink can be reached with capacity left: the sink's side of the latest minimum cut."""
    backward = residual.T.tocsr()
    reaches = {sink}
    stack = [sink]
    while stack:
        node = stack.pop()
        start, stop = backward.indptr[node], backward.indptr[node + 1]
        for index in range(start, stop):
            neighbour = int(backward.indices[index])
            if backward.data[index] > 0 and neighbour not in reaches:
                reaches.add(neighbour)
                stack.append(neighbour)
    return reaches


def _uncuttable(flow: Dataflow, values: Sequence[int], needs: set[int], stage: int, above: Sequence[int]) -> str:
    readers: dict[int, Node] = {}
    for node in flow.nodes:
        for read in node.reads:
            readers.setdefault(read, node)
    stuck = [v for v in values if v in needs and not flow.values[v].crossable]
    blocked = stuck or [v for v in values if v in needs and above[v]]
    value = blocked[0] if blocked else next(iter(needs))
    reader = readers.get(value)
    made = flow.nodes[flow.values[value].node].label
    from_stages = _members(above[value] & ~(1 << stage))
    return (
        f"stage {stage} cannot get what {reader.label if reader else 'the loss'} reads: {made} comes from stages "
        f"{from_stages} and no value on the way can be sent to stage {stage}; put these calls on one stage, or name "
        "the enclosing module as a unit"
    )
