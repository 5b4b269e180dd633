"""Experts of a program that are divided among replicas: installed, shown whole to a trace, counted in a step.

Knows process groups and plain numbers; refuses to know stages and schedules.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.same_host import SameHostTransport
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import Slice
from shardwise.errors import LayoutError
from shardwise.parallel.expert.groups import ExpertGroup, ProcessExpertGroup, SameHostExpertGroup
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.tensor.divided import Divided

__all__ = ["ExpertCounts", "ExpertStep", "OwnPart", "divide_experts", "whole_for_traces"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ExpertStep:
    """The experts in one step, the same on every rank: by layer, how many rows all ranks gave to every expert, and how
    many the model drops (none is dropped on the way), and the bytes that all ranks sent to others for it, there and
    back, forward and backward."""

    loads: Mapping[str, tuple[int, ...]]
    dropped: Mapping[str, int]
    all_to_all_bytes: int

    @property
    def imbalance(self) -> float:
        """The most rows of an expert over the mean of its layer, in the worst layer; 1 is even."""
        return max((max(rows) * len(rows) / sum(rows) for rows in self.loads.values() if sum(rows)), default=1.0)


class ExpertCounts:
    """Reads what the experts did since it was read last."""

    def __init__(self, experts: DividedExperts, *, shard: int, device: torch.device) -> None:
        self._experts = experts
        self._counts_rows = shard == 0  # every shard sends rows of the same tokens
        self._device = device
        self._sent_bytes = 0

    def read(self) -> ExpertStep:
        """Summed over all ranks; collective over the world."""
        rows = self._experts.loads.take()
        sent, before = self._experts.group.sent_bytes, self._sent_bytes
        self._sent_bytes = sent
        own = torch.cat([torch.tensor([sent - before]), *(each * self._counts_rows for each in rows.values())])
        own = own.to(self._device)
        dist.all_reduce(own)
        of_layers = own[1:].split([len(each) for each in rows.values()])  # type: ignore[no-untyped-call]
        told = {name: each.tolist() for name, each in zip(rows, of_layers, strict=True)}
        return ExpertStep(
            loads={name: tuple(numbers[:-1]) for name, numbers in told.items()},
            dropped={name: numbers[-1] for name, numbers in told.items()},
            all_to_all_bytes=int(own[0]),
        )


def divide_experts(
    model: nn.Module,
    plan: ExpertPlan | None,
    *,
    ep: int,
    groups: Sequence[Sequence[int]],
    rank: int,
    stack: contextlib.ExitStack,
    same_host: SameHostTransport | None = None,
) -> DividedExperts | None:
    """The experts of the model, divided among the ranks of this rank's group; collective where ep > 1.

    Raises `LayoutError` for a plan of another ep.
    """
    if ep == 1 or plan is None:
        return None
    if plan.ep != ep:
        raise LayoutError(
            f"a plan divides experts among the ranks of its layout, but this one was made for ep={plan.ep} and the "
            f"layout has ep={ep}; make the plan for ep={ep}"
        )
    mine: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks))
        if rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    assert mine is not None
    stack.callback(dist.destroy_process_group, mine)
    divided = DividedExperts(model, plan, _group(mine, groups, rank, same_host))
    stack.callback(divided.close)
    return divided


def _group(
    group: dist.ProcessGroup, groups: Sequence[Sequence[int]], rank: int, same_host: SameHostTransport | None
) -> ExpertGroup:
    """Shared memory where it reaches all ranks of the group; collective over them."""
    if same_host is None:  # on every rank
        return ProcessExpertGroup(group)
    ranks = next(each for each in groups if rank in each)
    everybody = torch.tensor(same_host.connected >= {*ranks} - {rank}, dtype=torch.int64)
    dist.all_reduce(everybody, op=dist.ReduceOp.MIN, group=group)
    return SameHostExpertGroup(same_host, ranks, rank) if everybody.item() else ProcessExpertGroup(group)


class OwnPart:
    """What of a whole value belongs on this rank: of its experts, its shard. Called with a name and its whole value."""

    def __init__(self, divided: Divided | None, experts: DividedExperts | None) -> None:
        self._divided = divided
        self._experts = experts

    def __call__(self, name: str, whole: torch.Tensor) -> torch.Tensor:
        own = whole if self._experts is None else self._experts.cut(name, whole)
        return own if self._divided is None else self._divided.cut(name, own)

    def slices(self, name: str) -> tuple[tuple[Slice, int], ...]:
        """How the value is divided, and which part is this rank's."""
        both: list[tuple[Slice | None, int]] = []
        if self._experts is not None:
            both.append((self._experts.slice_of(name), self._experts.rank))
        if self._divided is not None:
            both.append((self._divided.part_of(name), self._divided.shard))
        return tuple((part, rank) for part, rank in both if part is not None and part.num_ranks > 1)


def whole_for_traces(
    divided: Divided | None, experts: DividedExperts | None
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Around a trace: the model as it is on one device. Experts first, which are parts of shards."""

    @contextlib.contextmanager
    def whole() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each in (experts, divided):
                if each is not None:
                    stack.enter_context(each.off())
            yield

    return contextlib.nullcontext if divided is None and experts is None else whole
