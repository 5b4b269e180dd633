"""Who a rank exchanges with, and by what: shared memory where all of a group live on one host, else process groups.

Everything here is collective: every rank of the layout calls it in the same order, with the same arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.collective import ALL_REDUCE, KINDS, Collective
from shardwise.comm.collective_over import collective_over, shared_memory_over
from shardwise.comm.compress.make import compressing
from shardwise.comm.mpi_backend import may_share_memory
from shardwise.comm.same_host import SameHostTransport, same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.shared_group import SharedGroup
from shardwise.comm.traffic import Traffic
from shardwise.execute.place import Place
from shardwise.layout import Communication
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.tensor.processes import ProcessTensorGroup

__all__ = ["Kind", "context_group", "everyone", "gradient_sum", "replica_group", "same_host", "tensor_group"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Kind:
    """Who sums the gradient of a parameter: the places of the pipeline that hold it, on one stage of theirs or several;
    whether it is partial on every shard; whether it is that of experts which other replicas do not have."""

    positions: tuple[int, ...]
    partial: bool
    divides_experts: bool

    @property
    def sums_replicas(self) -> bool:
        """Whether replicas, and nobody else, sum it."""
        return not self.partial and len(self.positions) == 1

    @property
    def axis(self) -> str:
        """What `comm.traffic` calls it."""
        return "tp.gradients" if self.partial else "pp.all_reduce" if len(self.positions) > 1 else "dp.all_reduce"


def same_host(place: Place, device: torch.device, stack: contextlib.ExitStack) -> SameHostTransport | None:
    """Shared memory between the ranks of this rank's pipeline, between its shards, between those that divide its
    sequences, and between those that divide its experts; None on every rank where there is none."""
    near = {*place.pipeline(), *place.shards(), *place.contexts()}
    experts = next(set(ranks) for ranks in place.ranks_dividing_experts() if place.rank in ranks)
    if place.pp * place.tp * place.cp * place.ep == 1 or device.type != "cpu" or not dist.is_initialized():
        return None
    if not may_share_memory() or dist.get_world_size() != place.world_size:  # not every rank of the group calls
        return None
    return stack.enter_context(same_host_transport(near | experts))


def everyone(place: Place, shared: SameHostTransport | None) -> SameHostGroup | None:
    """All ranks, where they are one pipeline on one host."""
    if shared is None or place.dp * place.cp * place.tp > 1:  # on every rank
        return None
    connected = torch.tensor(len(shared.connected) == place.pp - 1, dtype=torch.int64)
    dist.all_reduce(connected, op=dist.ReduceOp.MIN)
    return SameHostGroup(shared, range(place.pp), place.rank) if connected.item() else None


def tensor_group(
    place: Place, shared: SameHostTransport | None, stack: contextlib.ExitStack
) -> ProcessTensorGroup | SameHostGroup:
    """What sums over this rank's shards: shared memory where it reaches them all."""
    group, ranks = _own_group(place, place.ranks_sharing(), stack)
    found = _exchanging(place, group, ranks, shared)
    if shared is None:  # on every rank
        return found
    mapped = shared_memory_over(ranks, group, stack, meanwhile=shared.flush)
    if mapped is None or not isinstance(found, SameHostGroup):
        return found
    return SharedGroup(mapped, shared, ranks, place.rank)


def context_group(
    place: Place, shared: SameHostTransport | None, stack: contextlib.ExitStack
) -> ProcessTensorGroup | SameHostGroup:
    """What those who divide this rank's sequences exchange by: shared memory where it reaches them all."""
    return _exchanging(place, *_own_group(place, place.ranks_dividing_sequences(), stack), shared)


def replica_group(place: Place, stack: contextlib.ExitStack) -> ProcessTensorGroup:
    """What sums over the replicas of this rank's place."""
    return ProcessTensorGroup(_own_group(place, place.ranks_replicating(), stack)[0])


def _exchanging(
    place: Place, group: dist.ProcessGroup, ranks: Sequence[int], shared: SameHostTransport | None
) -> ProcessTensorGroup | SameHostGroup:
    if shared is None:  # on every rank
        return ProcessTensorGroup(group)
    everybody = torch.tensor(shared.connected >= {*ranks} - {place.rank}, dtype=torch.int64)
    dist.all_reduce(everybody, op=dist.ReduceOp.MIN, group=group)
    return SameHostGroup(shared, ranks, place.rank) if everybody.item() else ProcessTensorGroup(group)


def _own_group(
    place: Place, groups: Sequence[list[int]], stack: contextlib.ExitStack
) -> tuple[dist.ProcessGroup, list[int]]:
    own: tuple[dist.ProcessGroup, list[int]] | None = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if place.rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            stack.callback(dist.destroy_process_group, group)
            own = group, ranks
    assert own is not None
    return own


def gradient_sum(
    place: Place,
    held: Mapping[str, nn.Parameter],
    kinds: Mapping[str, Kind],
    holders: Mapping[str, tuple[int, ...]],
    traffic: Traffic,
    stack: contextlib.ExitStack,
    communication: Communication | None = None,
) -> GradientSum | None:
    """Sums the gradients of `held`, this rank's parameters; None where each of them has one holder.

    `communication` says how they travel; what is compressed are sums over replicas. `kinds` are those of all parameters
    of the model, by name, and `holders` the stages that hold them.
    """
    device = next((parameter.device for parameter in held.values()), torch.device("cpu"))
    communication = communication or Communication()
    groups = _groups(place, set(kinds.values()), device, communication.algorithm, stack)
    shared = {name: groups[kinds[name]] for name in held if kinds[name] in groups}
    if not shared:
        return None
    compress = compressing(communication)
    replicas = [group for kind, group in groups.items() if kind.sums_replicas]
    gradients = GradientSum(
        held, shared, stages=holders, own=place.stages, compress=compress, compressed=replicas if compress else ()
    )
    for kind, group in groups.items():
        count(traffic, kind.axis, group, communication)
    if compress is not None:
        traffic.add("dp.saved", lambda: gradients.saved_bytes)
    return gradients


def count(traffic: Traffic, axis: str, group: Collective, communication: Communication) -> None:
    """From now on `traffic` tells what a group sums by the name of the axis; what stands for sums by that and its
    kind."""
    traffic.add(axis, functools.partial(_sent, group, ALL_REDUCE))
    if communication.gradients != "none" or communication.algorithm == "hierarchical":
        for kind in KINDS:
            if kind != ALL_REDUCE:
                traffic.add(f"{axis.partition('.')[0]}.{kind}", functools.partial(_sent, group, kind))


def _sent(group: Collective, kind: str) -> int:
    return group.sent_bytes.get(kind, 0)


def _groups(
    place: Place, kinds: Collection[Kind], device: torch.device, algorithm: str, stack: contextlib.ExitStack
) -> dict[Kind, Collective]:
    """For every set of several ranks that sum a gradient, what moves it; those that this rank is in."""
    found: dict[Kind, Collective] = {}
    everyone = range(place.tp)
    for kind in sorted(kinds):
        groups = [
            place.ranks_holding(kind.positions, shards, expert)
            for shards in ([tuple(everyone)] if kind.partial else [(shard,) for shard in everyone])
            for expert in (range(place.ep) if kind.divides_experts else [None])
        ]
        if len(groups[0]) > 1:
            own = collective_over(groups, device=device, stack=stack, algorithm=algorithm)
            if own is not None:
                found[kind] = own
    return found
