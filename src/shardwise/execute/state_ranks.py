"""Who divides the state of training with whom, and the buckets of a rank: from a place and a layout to `DividedStates`.

    parts   the ranks of the fsdp axis: part r of every bucket is on rank r of them
    rest    who holds the same part: other groups of the same, contexts, stages and shards that share a parameter

Everything here is collective: every rank of the layout calls it in the same order, with the same arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.collective import KINDS, Collective
from shardwise.comm.collective_over import collective_over
from shardwise.comm.compress.make import compressing
from shardwise.comm.traffic import Traffic
from shardwise.describe.flow import Dataflow, NodeKind
from shardwise.execute.divided_states import DividedStates
from shardwise.execute.place import Place
from shardwise.execute.rank_groups import Kind
from shardwise.layout import Communication, Layout
from shardwise.parallel.gradients import Compressed
from shardwise.parallel.sharded.bucket import Bucket
from shardwise.parallel.sharded.buckets import BucketPlan, Item, bucket_bytes_of, plan_buckets

__all__ = ["divide_states", "readers_of"]


def divide_states(
    place: Place,
    layout: Layout | None,
    held: Mapping[str, nn.Parameter],
    *,
    filled: Callable[[Sequence[str]], None] | None = None,
    own: Callable[[str], nn.Parameter],
    kinds: Mapping[str, Kind],
    holders: Mapping[str, tuple[int, ...]],
    flow: Dataflow,
    units: Sequence[str],
    replicated: Collection[str],
    varies: bool,
    traffic: Traffic,
    stack: contextlib.ExitStack,
    device: torch.device,
    masters: Callable[[str], torch.Tensor | None] = lambda name: None,
    communication: Communication | None = None,
) -> DividedStates | None:
    """The state of `held`, this rank's parameters, divided; None where nobody divides it. Collective.

    `kinds` and `holders` are those of all parameters of the model, `units` its units; `replicated` are left alone.
    `own` gives a parameter by its name; `filled`, where they have no values yet, gives values to some, in place of what
    `own` gave before. `varies`: not every step calls the same units, so that they cannot tell when to gather. `masters`
    gives up the float32 value of a parameter that is computed with in another dtype.
    """
    if layout is None or place.fsdp == 1:
        return None
    communication = communication or Communication()
    compress = compressing(communication)
    groups = _Groups(place, device, communication.algorithm, stack)
    parts = groups.own(place.ranks_dividing_states())
    assert parts is not None
    rest = {kind: groups.own(_rest(place, kind)) for kind in sorted(set(kinds.values()))}
    frees = layout.zero == 3
    readers = readers_of(flow, units, held)
    chosen = [n for n in _in_order(held, readers, flow) if n not in replicated and (held[n].requires_grad or frees)]
    others = max(len(ranks) for kind in set(kinds.values()) for ranks in _rest(place, kind))
    items = [
        Item(
            name=name,
            numel=held[name].numel(),
            itemsize=held[name].element_size(),
            like=(kinds[name], holders[name], held[name].dtype, held[name].requires_grad),
            units=readers[name],
        )
        for name in chosen
    ]
    buckets: list[Bucket] = []
    saves: list[Compressed] = []
    for plan in plan_buckets(items, multiple=place.fsdp * others, bucket_bytes=_bucket_bytes(items, device)):
        if filled is not None:
            filled(plan.names)
        wide = {name: value for name in plan.names if (value := masters(name)) is not None}
        mine = [own(name) for name in plan.names]
        stages = holders[plan.names[0]]
        buckets.append(Bucket(plan, mine, parts, frees=frees, stages=stages, masters=wide))
        if compress is not None and buckets[-1].trained:
            saves.append(compress(parts, _shapes_in(plan, mine)))
            buckets[-1].sums = saves[-1]
    if not buckets:
        return None
    for what in KINDS:
        traffic.add(f"fsdp.{what}", lambda what=what: parts.sent_bytes.get(what, 0))  # type: ignore[misc]
    counted = {id(group): (kind.axis, group) for kind, group in rest.items() if group is not None}
    for axis, group in counted.values():
        traffic.add(axis, lambda group=group: sum(group.sent_bytes.values()))  # type: ignore[misc]
    if saves:
        traffic.add("fsdp.saved", lambda: sum(each.saved_bytes for each in saves))
    by_step = layout.unshards_by_step
    return DividedStates(
        buckets,
        {unit: [bucket for bucket in buckets if unit in bucket.plan.units] for unit in units},
        [rest[kinds[bucket.plan.names[0]]] for bucket in buckets],
        own=place.stages,
        by_step=frees and (by_step or varies),
        each=layout.zero > 1 and not by_step,
        keeps=layout.zero == 1,
    )


def _shapes_in(plan: BucketPlan, parameters: Sequence[nn.Parameter]) -> list[tuple[int, ...]]:
    """What lies side by side in a bucket: parameters, and what fills up to the next one."""
    found: list[tuple[int, ...]] = []
    ends = (*plan.starts[1:], plan.numel)
    for start, end, parameter in zip(plan.starts, ends, parameters, strict=True):
        filling = end - start - parameter.numel()
        found += [tuple(parameter.shape), *([(filling,)] if filling else [])]
    return found


def _bucket_bytes(items: Sequence[Item], device: torch.device) -> int:
    """The same on all ranks: stages that share some parameters hold others besides. Collective."""
    total = torch.tensor(sum(item.numel * item.itemsize for item in items), dtype=torch.int64, device=device)
    dist.all_reduce(total, op=dist.ReduceOp.MAX)
    return bucket_bytes_of(int(total.item()))


def readers_of(flow: Dataflow, units: Sequence[str], names: Collection[str]) -> dict[str, frozenset[str]]:
    """Parameter -> the units in whose bodies it is read; none where the code between units reads it, or nobody does."""
    found: dict[str, set[str]] = {name: set() for name in names}
    outside: set[str] = set()
    for node in flow.nodes:
        for name in node.parameters:
            if name not in found:
                continue
            if node.kind is NodeKind.CALL:
                found[name].add(node.name)
            else:
                outside.add(name)
    for unit in units:
        for name in names:
            if name.startswith(unit + ".") or unit == "":
                found[name].add(unit)
    return {name: frozenset() if name in outside else frozenset(each) for name, each in found.items()}


def _in_order(names: Collection[str], readers: Mapping[str, frozenset[str]], flow: Dataflow) -> list[str]:
    """Names as their units are called, the same on every rank; what no unit reads, first."""
    first: dict[str, int] = {}
    for node in flow.calls:
        first.setdefault(node.name, node.index)
    last = len(flow.nodes)
    return sorted(names, key=lambda name: min((first.get(unit, last) for unit in readers[name]), default=-1))


def _rest(place: Place, kind: Kind) -> list[list[int]]:
    """The groups of a kind whose ranks hold the same part of its parameters; a rank is in one at most."""
    everyone = range(place.tp)
    found: list[list[int]] = []
    for shards in [tuple(everyone)] if kind.partial else [(shard,) for shard in everyone]:
        for expert in range(place.ep) if kind.divides_experts else [None]:
            ranks = place.ranks_holding(kind.positions, shards, expert)
            part_of = {rank: dataclasses.replace(place, rank=rank).part for rank in ranks}
            found += [[rank for rank in ranks if part_of[rank] == part] for part in range(place.fsdp)]
    return found


class _Groups:
    """Process groups, one for each set of ranks."""

    def __init__(self, place: Place, device: torch.device, algorithm: str, stack: contextlib.ExitStack) -> None:
        self._place = place
        self._device = device
        self._algorithm = algorithm
        self._stack = stack
        self._known: dict[tuple[int, ...], Collective | None] = {}

    def own(self, groups: Sequence[Sequence[int]]) -> Collective | None:
        """The one of `groups` that this rank is in; None where it is alone, or in none. Collective."""
        mine: Collective | None = None
        for ranks in groups:
            key = tuple(ranks)
            if len(key) < 2:
                continue
            if key not in self._known:
                self._known[key] = self._made(key)
            if self._place.rank in key:
                mine = self._known[key]
        return mine

    def _made(self, ranks: tuple[int, ...]) -> Collective | None:
        return collective_over([ranks], device=self._device, stack=self._stack, algorithm=self._algorithm)
