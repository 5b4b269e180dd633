"""Who a rank exchanges with, and by what: shared memory where all of a group live on one host, else process groups.

Everything here is collective: every rank of the layout calls it in the same order, with the same arguments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.same_host import SameHostTransport, same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.traffic import Traffic
from shardwise.execute.place import Place
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.tensor.processes import ProcessTensorGroup

__all__ = ["Kind", "everyone", "gradient_sum", "same_host", "tensor_group"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, order=True)
class Kind:
    """Who sums the gradient of a parameter: the places of the pipeline that hold it, on one stage of theirs or several;
    whether it is partial on every shard; whether it is that of experts which other replicas do not have."""

    positions: tuple[int, ...]
    partial: bool
    divides_experts: bool

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
    if dist.get_backend() != "gloo" or dist.get_world_size() != place.world_size:  # not every rank of the group calls
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
    group, ranks = _own_group(place, stack)
    if shared is None:  # on every rank
        return ProcessTensorGroup(group)
    everybody = torch.tensor(shared.connected >= {*ranks} - {place.rank}, dtype=torch.int64)
    dist.all_reduce(everybody, op=dist.ReduceOp.MIN, group=group)
    return SameHostGroup(shared, ranks, place.rank) if everybody.item() else ProcessTensorGroup(group)


def _own_group(place: Place, stack: contextlib.ExitStack) -> tuple[dist.ProcessGroup, list[int]]:
    own: tuple[dist.ProcessGroup, list[int]] | None = None
    for ranks in place.ranks_sharing():
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
) -> GradientSum | None:
    """Sums the gradients of `held`, this rank's parameters; None where each of them has one holder.

    `kinds` are those of all parameters of the model, by name, and `holders` the stages that hold them.
    """
    groups = _groups(place, set(kinds.values()))
    for group in groups.values():
        stack.callback(dist.destroy_process_group, group)
    shared = {name: groups[kinds[name]] for name in held if kinds[name] in groups}
    if not shared:
        return None
    gradients = GradientSum(held, shared, stages=holders, own=place.stages)
    for kind, group in groups.items():
        traffic.add(kind.axis, functools.partial(gradients.reduced_bytes, group))
    return gradients


def _groups(place: Place, kinds: Collection[Kind]) -> dict[Kind, dist.ProcessGroup]:
    """A process group for every set of several ranks that sum a gradient; those that this rank is in."""
    groups: dict[Kind, dist.ProcessGroup] = {}
    everyone = range(place.tp)
    for kind in sorted(kinds):
        for shards in [tuple(everyone)] if kind.partial else [(shard,) for shard in everyone]:
            for expert in range(place.ep) if kind.divides_experts else [None]:
                ranks = place.ranks_holding(kind.positions, shards, expert)
                if len(ranks) > 1:
                    group = dist.new_group(ranks)
                    if place.rank in ranks:
                        assert isinstance(group, dist.ProcessGroup)
                        groups[kind] = group
    return groups
