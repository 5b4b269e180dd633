"""A model laid out on ranks, seen from one of them: one call for a step, whatever the layout.

Made by `build`; holds what is live (parameters, groups, hooks). Knows no optimizer, no data source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.point_to_point import ProcessGroupTransport, Transport
from shardwise.comm.same_host import SameHostTransport, same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.comm.traffic import CountedTransport, Traffic
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import Slice, TensorPlan
from shardwise.errors import LayoutError
from shardwise.execute.batches import MicroBatch
from shardwise.execute.engine import Engine, Moment, Work
from shardwise.execute.expert_ranks import ExpertCounts, ExpertStep, cut_by, divide_experts, whole_for_traces
from shardwise.execute.flows import Flows
from shardwise.execute.norms import sum_of_squares
from shardwise.execute.weight_sums import WeightSums
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.gradients import GradientSum
from shardwise.parallel.hold import hold, holders_of, take_own
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.processes import ProcessTensorGroup
from shardwise.parallel.tensor.start_up import StartUp, prove_on_ranks
from shardwise.plan.cut import Cut, cut_stages
from shardwise.schedule import generate
from shardwise.schedule.check import check
from shardwise.schedule.schedule import Schedule, forward_only
from shardwise.schedule.transfers import Row, with_transfers
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import LossFunction
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import Tape

__all__ = ["Fill", "Part", "Place", "Program", "StepResult", "build"]

Part = Callable[[str, torch.Tensor], torch.Tensor]  # (name, whole value) -> what of it belongs on this rank


def _all_of_it(name: str, whole: torch.Tensor) -> torch.Tensor:
    return whole


class Fill(Protocol):
    """Gives the parameters `names` of a model their values: of each whole value, what `part` says."""

    def __call__(self, model: nn.Module, names: Sequence[str], part: Part = ...) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where this rank stands: its stage, its replica, its shard. rank = (stage * dp + replica) * tp + shard.

    `dp` are all replicas, each with its share of the batch; in turn, replica % ep, they hold other experts.
    """

    rank: int
    dp: int
    pp: int
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        return self.dp * self.pp * self.tp

    @property
    def stage(self) -> int:
        return self.rank // self.tp // self.dp

    @property
    def replica(self) -> int:
        return self.rank // self.tp % self.dp

    @property
    def shard(self) -> int:
        return self.rank % self.tp

    @property
    def expert(self) -> int:
        """Which of the ranks that divide the experts this one is."""
        return self.replica % self.ep

    def rank_of(self, stage: int) -> int:
        """The rank of a stage of this rank's replica and shard."""
        return (stage * self.dp + self.replica) * self.tp + self.shard

    def ranks_holding(self, stages: Sequence[int], shards: Sequence[int], expert: int | None = None) -> list[int]:
        """All ranks of some stages and shards, of every replica or of those that hold the same experts."""
        return [
            (stage * self.dp + replica) * self.tp + shard
            for stage in stages
            for replica in (range(self.dp) if expert is None else range(expert, self.dp, self.ep))
            for shard in shards
        ]

    def ranks_dividing_experts(self) -> list[list[int]]:
        """The groups of the expert axis: for every stage, replica of all experts and shard, who divides them."""
        return [
            [(stage * self.dp + first + expert) * self.tp + shard for expert in range(self.ep)]
            for stage in range(self.pp)
            for first in range(0, self.dp, self.ep)
            for shard in range(self.tp)
        ]

    def ranks_sharing(self) -> list[list[int]]:
        """The groups of the tensor axis: for every stage and replica, its shards."""
        return [
            [(stage * self.dp + replica) * self.tp + shard for shard in range(self.tp)]
            for stage in range(self.pp)
            for replica in range(self.dp)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """What a step tells: the mean loss over the global batch and its weight, the same on every rank."""

    loss: float
    weight: float
    moments: Sequence[Moment]
    experts: ExpertStep | None = None  # what the experts did, where they are divided
    sent_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by this rank; see `comm.traffic`


class _MeanLoss:
    """The mean loss of a step, summed over all ranks: behind the step through `group`, which costs next to nothing, or
    while the last backwards run."""

    def __init__(
        self,
        factors: Sequence[float],
        *,
        device: torch.device,
        alone: bool,
        shards: int,
        group: SameHostGroup | None = None,
        stages: Collection[int] = (),
    ) -> None:
        self._group = group  # one replica: places in the group are stages
        self._stages = sorted(stages)  # that know losses
        self._factors = [factor / shards for factor in factors]  # every shard of a stage knows the same losses
        self._alone = alone
        self._sum = torch.zeros((), dtype=torch.float64, device=device)
        self._pending: dist.Work | None = None
        self._losses: Mapping[int, torch.Tensor] = {}

    def start(self, losses: Mapping[int, torch.Tensor]) -> None:
        """Begin, with the losses that this rank has; every rank calls it once a step."""
        if self._group is not None:  # nothing to begin: the backwards go first
            self._losses = losses
            return
        self._add(losses)
        if not self._alone:
            self._pending = dist.all_reduce(self._sum, async_op=True)

    def _add(self, losses: Mapping[int, torch.Tensor]) -> None:
        weighed = {m: loss for m, loss in losses.items() if self._factors[m]}  # a mean over no label is 0 / 0
        if weighed:
            factors = torch.tensor([self._factors[m] for m in weighed], dtype=torch.float64, device=self._sum.device)
            self._sum = torch.stack(list(weighed.values())).to(factors).dot(factors)

    def wait(self) -> float:
        """The sum. Behind everything that the step sends: messages of a pair of ranks keep their order."""
        self._add(self._losses)
        if self._group is not None and len(self._stages) == 1:
            self._group.broadcast(self._sum, self._stages[0])
        elif self._group is not None:
            self._group.all_reduce(self._sum)
        if self._pending is not None:
            self._pending.wait()
        return float(self._sum.item())


class Program:
    """One rank's share of a model under a layout. Use `build` to make one and `close()` to take it apart."""

    def __init__(
        self,
        model: nn.Module,
        *,
        place: Place,
        flows: Flows,
        engine: Engine,
        schedule: str,
        holders: Mapping[str, tuple[int, ...]],
        gradients: GradientSum | None,
        edges: frozenset[tuple[int, int]],
        seed: int,
        tape: Tape,
        cut: Cut,
        stack: contextlib.ExitStack,
        divided: Divided | None = None,
        experts: DividedExperts | None = None,
        everyone: SameHostGroup | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self.model = model
        self._traffic = traffic or Traffic()
        self._everyone = everyone
        self.divided = divided
        self.experts = experts
        self._expert_counts = (
            None if experts is None else ExpertCounts(experts, shard=place.shard, device=engine.device)
        )
        self.tape = tape
        self.cut = cut
        self.place = place
        self.holders = dict(holders)
        self.seed = seed
        self._flows = flows
        self._engine = engine
        self._schedule = schedule
        self._gradients = gradients
        self._edges = edges
        self._rows: dict[tuple[int, frozenset[tuple[int, int]], bool], Row] = {}
        self._stack = stack
        self._world = place.world_size

    @property
    def random(self) -> bool:
        """Whether a step that has been run drew random numbers."""
        return self._flows.random

    # -- parameters -----------------------------------------------------------------------------

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this rank holds, by name."""
        return {
            name: p
            for name, p in self.model.named_parameters()
            if self.place.stage in self.holders[name] and (self.experts is None or self.experts.holds(name))
        }

    def owns(self, name: str) -> bool:
        """Whether this rank is the one that saves the parameter, or its part of it: lowest stage, first replica that
        has it, and the first shard where all have the same."""
        first = self.place.expert if self.divides_experts(name) else 0
        return self.counts(name) and self.place.replica == first

    def divides_experts(self, name: str) -> bool:
        """Whether the parameter, or its part on this rank, is that of experts that other replicas do not have."""
        return self.experts is not None and self.experts.divides(name)

    def experts_of(self, name: str) -> Slice | None:
        """How a parameter is divided along its experts; None where it is not."""
        return None if self.experts is None else self.experts.slice_of(name)

    def counts(self, name: str) -> bool:
        """Whether this rank counts the parameter, or its part of it, in its replica's norm."""
        return self.holders[name][0] == self.place.stage and (self.place.shard == 0 or self.part_of(name) is not None)

    def part_of(self, name: str) -> Slice | None:
        """How a parameter is divided among the shards; None where each has it whole."""
        return None if self.divided is None else self.divided.part_of(name)

    # -- steps ----------------------------------------------------------------------------------

    def step(self, micro_batches: Sequence[MicroBatch], *, step: int) -> StepResult:
        """Forward and backward of this replica's micro-batches; gradients of the mean loss are in `.grad` afterwards.

        Every rank calls it with its replica's micro-batches. Raises `DataflowError`, `TransferError`.
        """
        return self._run(micro_batches, step=step, backward=True)

    def evaluate(self, micro_batches: Sequence[MicroBatch], *, step: int = 0) -> StepResult:
        """The mean loss without gradients. The caller has set `model.eval()`."""
        with torch.no_grad():
            return self._run(micro_batches, step=step, backward=False)

    def _run(self, micro_batches: Sequence[MicroBatch], *, step: int, backward: bool) -> StepResult:
        total, pending = self._total_weight(micro_batches)
        scopes = [
            Scope(seed=self.seed, step=step, micro_batch=mb.index, samples=mb.samples, place="glue", call=0)
            for mb in micro_batches
        ]
        flows = [self._flows.flow_of(mb, scope) for mb, scope in zip(micro_batches, scopes, strict=True)]
        if pending is not None:
            pending.wait()
        weight = float(total.item())
        works = [
            Work(
                mb,
                flow,
                mb.weight / weight if weight else 0.0,
                scope,
                headers=flow.met == 0 and len(flow.cut.stages) > 1,
            )
            for mb, flow, scope in zip(micro_batches, flows, scopes, strict=True)
        ]
        edges = self._edges.union(*(flow.cut.edges for flow in flows))
        row = self._row(len(micro_batches), edges, backward)
        gradients = self._gradients
        arm = (lambda _: gradients.arm()) if gradients is not None and backward else None
        factors = [work.factor for work in works]
        mean = _MeanLoss(
            factors,
            device=self._engine_device,
            alone=self._world == 1,
            shards=self.place.tp,
            group=self._everyone,
            stages={flow.cut.loss_stage for flow in flows},
        )
        with contextlib.nullcontext() if self.divided is None else self.divided.step():
            _, moments = self._engine.run(row, works, before_last_backward=arm, after_last_forward=mean.start)
        if self._gradients is not None and backward:
            self._gradients.finish()
        if self.divided is not None and self.divided.shares and backward:
            self.divided.sum_shared(self.parameters)
        for flow in flows:
            flow.met += 1
        loss = mean.wait()  # behind everything that the step sends
        experts = None if self._expert_counts is None else self._expert_counts.read()
        return StepResult(loss, weight, moments, experts, self._traffic.read())

    def _total_weight(self, micro_batches: Sequence[MicroBatch]) -> tuple[torch.Tensor, Any]:
        total = torch.tensor(sum(mb.weight for mb in micro_batches), dtype=torch.float64, device=self._engine_device)
        if self.place.dp == 1:  # every rank has the same micro-batches
            return total, None
        # Every stage and shard of a replica counts the same micro-batches: the sum over the world is too large.
        total /= self.place.pp * self.place.tp
        return total, dist.all_reduce(total, async_op=True)

    @property
    def _engine_device(self) -> torch.device:
        return self._engine.device

    def _row(self, num_micro_batches: int, edges: frozenset[tuple[int, int]], backward: bool) -> Row:
        key = (num_micro_batches, edges, backward)
        if key not in self._rows:
            schedule = generate(self._schedule, num_stages=self.place.pp, num_micro_batches=num_micro_batches)
            if not backward:
                schedule = forward_only(schedule)
            check(schedule, edges)
            self._rows[key] = _own_row(schedule, edges, self.place.stage)
        return self._rows[key]

    # -- the norm -------------------------------------------------------------------------------

    def gradient_norm(self) -> float:
        """The Euclidean norm of all gradients, every parameter counted once on any layout."""
        own = [
            p.grad if self.divided is None else self.divided.counted(name, p.grad)
            for name, p in self.parameters.items()
            if p.grad is not None and self.counts(name) and not self.divides_experts(name)
        ]
        squares = sum_of_squares([gradient for gradient in own if gradient is not None]).to(self._engine_device)
        squares += self._squares_of_experts()
        if self._world > 1:
            dist.all_reduce(squares)
            squares /= self.place.dp
        return float(squares.sqrt().item())

    def _squares_of_experts(self) -> torch.Tensor:
        """Of experts that are divided, weighed so that the mean over all replicas counts each once."""
        own = [
            p.grad if self.divided is None else self.divided.counted(name, p.grad)
            for name, p in self.parameters.items()
            if p.grad is not None and self.counts(name) and self.divides_experts(name)
        ]
        squares = sum_of_squares([gradient for gradient in own if gradient is not None]).to(self._engine_device)
        return squares * self.place.ep

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, as clipping does."""
        own = [p.grad for p in self.parameters.values() if p.grad is not None]
        if own:
            torch._foreach_mul_(own, factor)

    def close(self) -> None:
        """Take hooks and substitutions out of the model."""
        if self._gradients is not None:
            self._gradients.close()
        self._stack.close()


def build(
    model: nn.Module,
    *,
    place: Place,
    tape: Tape,
    placement: Mapping[tuple[str, int], int],
    schedule: str = "1f1b",
    loss: LossFunction | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    units: Sequence[str] = (),
    transport: Transport | None = None,
    fill: Fill | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    start_up: StartUp | None = None,
) -> Program:
    """Lay `model` out on this rank, in place: its own parameters filled, the others absent, units installed.

    `tape` is a tape of the whole model, `placement` (unit, call) -> stage. `fill` gives the held parameters their
    values (deferred initialisation, a checkpoint); without it the model's own values are copied. `tensor` says how
    units are divided among the shards; without it, shards do the same work. `experts` says the same of experts and
    the replicas that divide them.
    Collective: every rank calls it with the same arguments.
    """
    where = torch.device(device)
    stages = {node.index: placement[(node.name, node.call)] for node in tape.flow.calls}
    cut: Cut = cut_stages(tape.flow, stages, place.pp)
    holders = holders_of(model, tape.flow, cut, tape.units, placement)
    mine = [name for name, stages_of in holders.items() if place.stage in stages_of]
    if fill is not None:
        hold(model, mine, device=where)
    elif place.world_size > 1:
        take_own(model, mine, device=where)
        hold(model, mine, device=where)
    switch = Switch()
    stack = contextlib.ExitStack()
    sums = WeightSums()
    sums.install(model, tape.units, {name: p for name, p in model.named_parameters() if name in set(mine)})
    stack.callback(sums.close)
    same_host = _same_host(place, where, stack)
    traffic = Traffic()
    divided = _divided(model, place, tensor, tape.units, stack, same_host, traffic)
    divided_experts = divide_experts(
        model,
        experts,
        ep=place.ep,
        groups=place.ranks_dividing_experts(),
        rank=place.rank,
        stack=stack,
        same_host=same_host,
    )
    if divided_experts is not None:
        mine = [name for name in mine if divided_experts.holds(name)]
    if divided is not None:
        sums.divide(model.get_parameter(name) for name in mine if divided.part_of(name) is not None)
    if fill is not None:
        fill(model, mine, cut_by(divided, divided_experts))
    if divided is not None and start_up and place.ep == 1:
        here = {unit: call for unit, call in start_up.items() if placement.get((unit, 0)) == place.stage}
        with _closing_on_error(stack):
            divided.start_up_errors = prove_on_ranks(divided.shardings, here, divided.group)
    stack.enter_context(installed({name: model.get_submodule(name) for name in tape.units}, switch))
    kept = set(mine)
    held = {name: p for name, p in model.named_parameters() if name in kept}
    partial = {name for name in holders if tensor is not None and tensor.is_partial(name)}
    of_experts = {name for name in holders if divided_experts is not None and divided_experts.divides(name)}
    groups = _groups(place, holders, partial, of_experts)
    for group in groups.values():
        stack.callback(dist.destroy_process_group, group)
    of = {name: groups.get((holders[name], name in partial, name in of_experts)) for name in held}
    shared = {name: group for name, group in of.items() if group is not None}
    gradients = GradientSum(held, shared) if shared else None
    if gradients is not None:
        _count_gradients(traffic, gradients, groups)
    if divided_experts is not None:
        of_group = divided_experts.group
        traffic.add("ep.all_to_all", lambda: of_group.sent_bytes)
    between_stages = CountedTransport(transport or same_host or ProcessGroupTransport())
    if place.pp > 1:
        traffic.add("pp.send", lambda: between_stages.sent_bytes)
    engine = Engine(
        model,
        switch=switch,
        loss=loss,
        rank=place.rank,
        rank_of_stage=[place.rank_of(stage) for stage in range(place.pp)],
        transport=between_stages,
        device=where,
        sums=sums,
    )
    flows = Flows(
        model,
        switch=switch,
        placement=placement,
        num_stages=place.pp,
        loss=loss,
        units=units,
        whole=whole_for_traces(divided, divided_experts),
        divided=divided,
    )
    return Program(
        model,
        place=place,
        flows=flows,
        engine=engine,
        schedule=schedule,
        holders=holders,
        gradients=gradients,
        edges=frozenset(cut.edges),
        seed=seed,
        tape=tape,
        cut=cut,
        stack=stack,
        divided=divided,
        experts=divided_experts,
        everyone=_everyone(place, same_host),
        traffic=traffic,
    )


@contextlib.contextmanager
def _closing_on_error(stack: contextlib.ExitStack) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stack.close()
        raise


def _same_host(place: Place, device: torch.device, stack: contextlib.ExitStack) -> SameHostTransport | None:
    """Shared memory between the stages of this rank's pipeline, between the shards of its stage, and between the ranks
    that divide its experts; collective."""
    stages = {place.rank_of(stage) for stage in range(place.pp)}
    shards = {place.rank - place.shard + shard for shard in range(place.tp)}
    experts = next(set(ranks) for ranks in place.ranks_dividing_experts() if place.rank in ranks)
    if place.pp * place.tp * place.ep == 1 or device.type != "cpu" or not dist.is_initialized():
        return None
    if dist.get_backend() != "gloo" or dist.get_world_size() != place.world_size:  # not every rank of the group calls
        return None
    return stack.enter_context(same_host_transport(stages | shards | experts))


def _divided(
    model: nn.Module,
    place: Place,
    tensor: TensorPlan | None,
    units: Sequence[str],
    stack: contextlib.ExitStack,
    same_host: SameHostTransport | None,
    traffic: Traffic,
) -> Divided | None:
    """The units of the model divided among this rank's shards; collective where there are any."""
    if place.tp == 1 or tensor is None:
        return None
    if tensor.tp != place.tp:
        raise LayoutError(
            f"a plan divides units among the shards of its layout, but this one was made for tp={tensor.tp} and the "
            f"layout has tp={place.tp}; make the plan for tp={place.tp}"
        )
    mine: dist.ProcessGroup | None = None
    for ranks in place.ranks_sharing():
        group = dist.new_group(ranks)
        if place.rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine = group
    assert mine is not None
    stack.callback(dist.destroy_process_group, mine)
    sharing = _tensor_group(place, mine, same_host)
    traffic.add("tp.all_reduce", lambda: sharing.reduced_bytes)
    traffic.add("tp.all_gather", lambda: sharing.gathered_bytes)
    traffic.add("tp.reduce_scatter", lambda: sharing.scattered_bytes)
    divided = Divided(model, tensor, sharing, units, keep_logits=True)
    stack.callback(divided.close)
    return divided


def _everyone(place: Place, same_host: SameHostTransport | None) -> SameHostGroup | None:
    """All ranks, where they are one pipeline on one host; collective."""
    if same_host is None or place.dp * place.tp > 1:  # on every rank
        return None
    connected = torch.tensor(len(same_host.connected) == place.pp - 1, dtype=torch.int64)
    dist.all_reduce(connected, op=dist.ReduceOp.MIN)
    return SameHostGroup(same_host, range(place.pp), place.rank) if connected.item() else None


def _tensor_group(
    place: Place, group: dist.ProcessGroup, same_host: SameHostTransport | None
) -> ProcessTensorGroup | SameHostGroup:
    """What sums over the shards of this rank's stage: shared memory where it reaches them all."""
    if same_host is None:  # on every rank
        return ProcessTensorGroup(group)
    ranks = next(ranks for ranks in place.ranks_sharing() if place.rank in ranks)
    everybody = torch.tensor(same_host.connected >= {*ranks} - {place.rank}, dtype=torch.int64)
    dist.all_reduce(everybody, op=dist.ReduceOp.MIN, group=group)
    return SameHostGroup(same_host, ranks, place.rank) if everybody.item() else ProcessTensorGroup(group)


def _groups(
    place: Place, holders: Mapping[str, tuple[int, ...]], partial: Collection[str], of_experts: Collection[str]
) -> dict[tuple[tuple[int, ...], bool, bool], dist.ProcessGroup]:
    """A process group for every set of ranks that sum the gradient of a parameter: (stages that hold it, whether it
    is partial on every shard, whether it is that of divided experts) -> the group that this rank is in."""
    groups: dict[tuple[tuple[int, ...], bool, bool], dist.ProcessGroup] = {}
    everyone = range(place.tp)
    for key in sorted({(holders[name], name in partial, name in of_experts) for name in holders}):
        stages, sums_shards, divides = key
        for shards in [tuple(everyone)] if sums_shards else [(shard,) for shard in everyone]:
            for expert in range(place.ep) if divides else [None]:
                ranks = place.ranks_holding(stages, shards, expert)
                if len(ranks) > 1:
                    group = dist.new_group(ranks)
                    if place.rank in ranks:
                        assert isinstance(group, dist.ProcessGroup)
                        groups[key] = group
    return groups


def _own_row(schedule: Schedule, edges: frozenset[tuple[int, int]], stage: int) -> Row:
    return with_transfers(schedule, edges)[schedule.owners[stage]]


def _count_gradients(
    traffic: Traffic, gradients: GradientSum, groups: Mapping[tuple[tuple[int, ...], bool, bool], dist.ProcessGroup]
) -> None:
    for (stages, sums_shards, _), group in groups.items():
        kind = "tp.gradients" if sums_shards else "pp.all_reduce" if len(stages) > 1 else "dp.all_reduce"
        traffic.add(kind, functools.partial(gradients.reduced_bytes, group))
