"""The profile of one rank from its run: calls with what they did there, glue as far as it did something else.

A run tells the glue by segments between unit calls. Where a segment did what it does in the whole model, its nodes keep
their numbers; else what belongs to the batch alone stays, and the rest is booked on the node that moved the most.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from shardwise.describe.flow import Dataflow, NodeKind
from shardwise.describe.kernels import Exchange, Kernel, Phase
from shardwise.describe.profile import CallProfile, GlueProfile, ModelProfile
from shardwise.parallel.rank_run import RankRun, segment
from shardwise.trace.kernels import mirrored

__all__ = ["rank_profile"]

_Counts = collections.Counter[Kernel]


def rank_profile(whole: ModelProfile, run: RankRun, local_bytes: Mapping[int, int]) -> ModelProfile:
    """`whole` with what `run` has found. Its parameters are the rank's already; `local_bytes`: of values that cross in
    part."""
    flow = dataclasses.replace(
        whole.flow,
        values=tuple(
            dataclasses.replace(value, nbytes=local_bytes.get(value.index, value.nbytes)) for value in whole.flow.values
        ),
    )
    of_glue = _exchanges_of_glue(flow, run)
    calls = tuple(_call(call, flow, run, of_glue.get(call.node, ())) for call in whole.calls)
    return dataclasses.replace(whole, flow=flow, calls=calls, glue=_glue(whole, run))


def _call(call: CallProfile, flow: Dataflow, run: RankRun, more: Sequence[Exchange]) -> CallProfile:
    source = run.source(call.node)
    kernels, exchanges = run.kernels(call.node), run.exchanges(call.node)
    counter = run.counter
    backward = counter.backward_flops.get(source, 0)
    if call.backward_flops and source not in counter.reached:  # the backward did not get through, here as in the whole
        backward = 2 * counter.forward_flops.get(source, 0)
        kernels = (*kernels, *mirrored(kernels))
        exchanges = (*exchanges, *(dataclasses.replace(each, phase=Phase.INPUT) for each in exchanges))
    return dataclasses.replace(
        call,
        forward_flops=counter.forward_flops.get(source, 0),
        backward_flops=backward,
        saved_bytes=run.saved.get(call.node, 0),
        output_bytes=sum(flow.values[value].nbytes for value in flow.nodes[call.node].makes),
        weight_flops=min(backward, counter.weight_flops.get(source, 0)),
        weight_bytes=counter.weight_bytes.get(source, 0),
        product_flops=counter.product_flops.get(source, 0),
        product_bytes=counter.product_bytes.get(source, 0),
        transient_bytes=max(run.transient_bytes(call.node)),
        kernels=kernels,
        exchanges=(*exchanges, *more),
    )


def _exchanges_of_glue(flow: Dataflow, run: RankRun) -> dict[int, tuple[Exchange, ...]]:
    """Those of a segment of glue belong to the call before it."""
    nodes = [node.index for node in flow.calls]
    found: dict[int, tuple[Exchange, ...]] = {}
    for done in range(len(nodes) + 1):
        exchanges = run.exchanges(segment(done))
        if exchanges:
            before = nodes[max(0, done - 1)]
            found[before] = (*found.get(before, ()), *exchanges)
    return found


# -- glue ---------------------------------------------------------------------------------------------


def _glue(whole: ModelProfile, run: RankRun) -> tuple[GlueProfile, ...]:
    calls = [node.index for node in whole.flow.calls]
    behind = _behind_calls(whole.flow)
    known = {part.node: part for part in whole.glue}
    bounds = [-1, *calls, len(whole.flow.nodes)]
    made: list[GlueProfile] = []
    for done, (start, end) in enumerate(itertools.pairwise(bounds)):
        nodes = [index for index in range(start + 1, end) if whole.flow.nodes[index].kind is not NodeKind.CALL]
        own = [known[node] for node in nodes if node in known]
        made += _segment(own, nodes, run, done, behind)
    return tuple(made)


def _segment(
    parts: Sequence[GlueProfile], nodes: Sequence[int], run: RankRun, done: int, behind: frozenset[int]
) -> list[GlueProfile]:
    place = segment(done)
    found = _counted(run.kernels(place))
    transient = max(run.transient_bytes(place))
    dependent = [part for part in parts if part.node in behind]
    carrier = max(dependent or parts, key=_moved, default=None)
    if carrier is None:
        if not found or not nodes:
            return []
        carrier = GlueProfile(node=nodes[-1], forward_flops=0, backward_flops=0, saved_bytes=0)
    if found == _counted(kernel for part in parts for kernel in part.kernels):
        return [dataclasses.replace(p, transient_bytes=transient if p is carrier else 0) for p in parts]
    stays = [part for part in parts if part.node not in behind and part is not carrier]
    left = found - _counted(kernel for part in stays for kernel in part.kernels)
    saved = run.saved.get(place, 0) - sum(part.saved_bytes for part in stays)
    kernels = tuple(dataclasses.replace(kernel, count=num) for kernel, num in left.items())
    rest = dataclasses.replace(
        carrier,
        kernels=kernels,
        forward_flops=_flops(kernels, forward=True),
        backward_flops=_flops(kernels, forward=False),
        saved_bytes=max(0, saved),
        transient_bytes=transient,
    )
    return sorted([*stays, rest], key=lambda part: part.node)


def _behind_calls(flow: Dataflow) -> frozenset[int]:
    """Nodes that need what a unit call has made."""
    values: set[int] = set()
    found: set[int] = set()
    for node in flow.nodes:
        if node.kind is NodeKind.CALL or any(read in values for read in node.reads):
            found.add(node.index)
            values.update(node.makes)
    return frozenset(found)


def _counted(kernels: Iterable[Kernel]) -> _Counts:
    counts: _Counts = collections.Counter()
    for kernel in kernels:
        counts[dataclasses.replace(kernel, count=1)] += kernel.count
    return counts


def _moved(part: GlueProfile) -> int:
    return sum(kernel.nbytes * kernel.count for kernel in part.kernels)


def _flops(kernels: Iterable[Kernel], *, forward: bool) -> int:
    """As a profile counts them, where attention under a causal mask is counted whole."""
    return sum(kernel.flops * kernel.count for kernel in kernels if (kernel.phase is Phase.FORWARD) == forward)
