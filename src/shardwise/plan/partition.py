"""Which stage runs which unit call: balanced in the order of the calls, or given by hand and checked.

Calls in a row of their execution never need a later stage, so any such cut can run. Knows profiles, dataflows
and layouts; what crosses in detail is the business of the cut.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

from shardwise.describe.flow import Dataflow
from shardwise.describe.profile import ModelProfile
from shardwise.errors import LayoutError
from shardwise.layout import Layout, StageRule, compress, expand
from shardwise.plan.balance import balanced_ends, evened_ends
from shardwise.plan.work import work_of
from shardwise.schedule import GENERATORS, placement

__all__ = ["call_weights", "place"]


def place(model: ModelProfile | Dataflow, layout: Layout, weights: Mapping[int, float] | None = None) -> dict[int, int]:
    """Node of every unit call -> stage, as `layout.stages` says.

    `weights` (node of a call -> weight) replace what the layout balances by; a bare dataflow needs them
    unless stages are balanced by depth or given by hand. Raises `LayoutError` where there are fewer calls
    with parameters than stages, or where stages given by hand do not name every call once.
    """
    flow = model.flow if isinstance(model, ModelProfile) else model
    if not isinstance(layout.stages, StageRule):
        return _by_hand(flow, layout.stages)
    if weights is None:
        weights = _weights(model, layout.stages)
    calls = sum(bool(node.parameters) for node in flow.calls)
    if calls < layout.num_stages:
        raise LayoutError(_too_few(calls, layout))
    firsts = _first_calls(flow)  # of groups of calls that stay together
    groups = list(itertools.pairwise((*firsts, len(flow.calls))))
    has_parameters = [any(node.parameters for node in flow.calls[a:b]) for a, b in groups]
    if sum(has_parameters) < layout.num_stages:
        raise LayoutError(_too_close(flow, groups, sum(has_parameters), layout))
    row = [sum(float(weights[node.index]) for node in flow.calls[a:b]) for a, b in groups]
    every = _traffic(flow)
    traffic = [every[first] for first in firsts]
    ends = balanced_ends(row, traffic, has_parameters, layout.num_stages)
    if layout.num_stages > layout.pp > 1 and layout.schedule in GENERATORS:
        ends = evened_ends(ends, row, traffic, has_parameters, _owners(layout))
    starts = [0, *ends[:-1]]
    return {
        node.index: stage
        for stage, (start, end) in enumerate(zip(starts, ends, strict=True))
        for a, b in groups[start:end]
        for node in flow.calls[a:b]
    }


def _first_calls(flow: Dataflow) -> list[int]:
    """Places among the calls in front of which a stage may begin: not between a call that leaves something where it
    cannot be sent from (in an object that it was given, such as a cache) and a call that finds it there."""
    place_of = {node.index: place for place, node in enumerate(flow.calls)}
    together = [0] * (len(flow.calls) + 1)  # differences of how many such pairs lie around the front of a call
    for place, node in enumerate(flow.calls):
        for read in node.reads:
            about = flow.values[read]
            if not about.crossable and about.node in place_of:
                together[place_of[about.node] + 1] += 1
                together[place + 1] -= 1
    return [place for place, around in enumerate(accumulate(together[:-1])) if not around]


def _owners(layout: Layout) -> list[int]:
    """[stage]: the place of the pipeline that owns it."""
    ranks = placement(layout.schedule, num_ranks=layout.pp, chunks=layout.chunks)
    owner = {stage: position for position, stages in enumerate(ranks) for stage in stages}
    return [owner[stage] for stage in range(layout.num_stages)]


def _too_few(calls: int, layout: Layout) -> str:
    pp, num_stages = layout.pp, layout.num_stages
    if num_stages == pp:
        return (
            f"every stage has a unit call with parameters, but pp={pp} and the model has {calls}; use "
            f"pp={max(1, calls)} or less, or name smaller units"
        )
    return (
        f"every stage has a unit call with parameters, but the schedule {layout.schedule} makes {num_stages // pp} "
        f"stages of each of pp={pp} ranks, {num_stages} in all, and the model has {calls} calls; use fewer stages (a "
        "smaller pp, fewer chunks, or a schedule of one stage a rank such as 1f1b), or name smaller units"
    )


def _too_close(flow: Dataflow, groups: Sequence[tuple[int, int]], count: int, layout: Layout) -> str:
    start, end = max(groups, key=lambda group: group[1] - group[0])
    return (
        f"every stage has a unit call with parameters, but there are {layout.num_stages} stages, and calls that hand "
        f"each other what cannot be sent stay together, such as those from {flow.calls[start].label} to "
        f"{flow.calls[end - 1].label}: {count} groups; use {count} stages or fewer, or name smaller units"
    )


def _weights(model: ModelProfile | Dataflow, rule: StageRule) -> Mapping[int, float]:
    if isinstance(model, ModelProfile):
        return call_weights(model, rule)
    if rule is StageRule.DEPTH:
        return {node.index: 1.0 for node in model.calls}
    raise LayoutError(f"a dataflow knows no {rule}, so stages={rule} needs more than that; pass a profile, or weights")


def call_weights(profile: ModelProfile, rule: StageRule) -> dict[int, float]:
    """Node of every unit call -> what `rule` balances: work forward and backward, parameters, or 1.

    Glue that costs something is added to the call before it. A unit called several times spreads its
    parameters evenly over its calls.
    """
    match rule:
        case StageRule.DEPTH:
            return {call.node: 1.0 for call in profile.calls}
        case StageRule.PARAMETERS:
            times = Counter(call.unit for call in profile.calls)
            held = {unit.name: unit.num_parameters for unit in profile.units}
            return {call.node: held[call.unit] / times[call.unit] for call in profile.calls}
        case StageRule.COST:
            return _costs(profile)


def _costs(profile: ModelProfile) -> dict[int, float]:
    work = work_of(profile)
    costs = {call.node: work.total(call.node) for call in profile.calls}
    for part in profile.glue:
        before = [node for node in costs if node < part.node]
        if before:
            costs[before[-1]] += work.total(part.node)
    return costs


def _traffic(flow: Dataflow) -> list[float]:
    """What a cut in front of every call costs: bytes made from earlier calls that are read from there on."""
    from_call = [False] * len(flow.values)
    last_read = [-1] * len(flow.values)
    calls = {node.index for node in flow.calls}
    for node in flow.nodes:
        depends = node.index in calls or any(from_call[read] for read in node.reads)
        for value in node.makes:
            from_call[value] = depends
        for read in node.reads:
            last_read[read] = node.index
    for value in flow.results:
        last_read[value] = len(flow.nodes)
    steps = [0.0] * (len(flow.nodes) + 2)  # what is alive in front of a node, as differences
    for about in flow.values:
        if from_call[about.index] and last_read[about.index] > about.node:
            steps[about.node + 1] += about.traffic_bytes
            steps[last_read[about.index] + 1] -= about.traffic_bytes
    alive = list(accumulate(steps))
    return [alive[node.index] for node in flow.calls]


def _by_hand(flow: Dataflow, stages: Sequence[Sequence[str]]) -> dict[int, int]:
    node_of = {node.label: node.index for node in flow.calls}
    placed: dict[str, tuple[int, str]] = {}  # call -> (stage, the words that put it there)
    for stage, texts in enumerate(stages):
        for text in texts:
            for call in expand(text, tuple(node_of)):
                if call in placed:
                    other, words = placed[call]
                    raise LayoutError(
                        f"every unit call stands on one stage, but {call} is named by {words!r} on stage "
                        f"{other} and by {text!r} on stage {stage}; drop one of them"
                    )
                placed[call] = (stage, text)
    missing = [call for call in node_of if call not in placed]
    if missing:
        names = compress(_plain(missing, tuple(node_of)))
        raise LayoutError(
            f"every unit stands on a stage, but {len(missing)} of {len(node_of)} calls do not: "
            f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}; add them to a stage"
        )
    return {node_of[call]: stage for call, (stage, _) in placed.items()}


def _plain(calls: Sequence[str], all_calls: Sequence[str]) -> list[str]:
    """Calls by the name of their unit, where it is called once."""
    times = Counter(call.rpartition("#")[0] for call in all_calls)
    return [unit if times[unit := call.rpartition("#")[0]] == 1 else call for call in calls]
