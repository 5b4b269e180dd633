"""Lays a model out on a rank: what it holds, its units divided and installed, and who sums its gradients.

Every rank builds its own program, all in the same order. Knows one tape and one placement; no layouts, no steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn as nn

from shardwise.comm.compress.make import compressed_transport
from shardwise.comm.point_to_point import ProcessGroupTransport, Transport
from shardwise.comm.same_host import SameHostTransport
from shardwise.comm.traffic import CountedTransport, Traffic
from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.flow import NodeKind
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import LayoutError
from shardwise.execute import rank_groups
from shardwise.execute.around import Around, Order
from shardwise.execute.compiled import Compiled
from shardwise.execute.contexts import deal_contexts, dealt_too
from shardwise.execute.divided_states import Sums
from shardwise.execute.engine import Engine
from shardwise.execute.expert_ranks import OwnPart, divide_experts, whole_for_traces
from shardwise.execute.flows import Flows
from shardwise.execute.host_memory import host_memory
from shardwise.execute.offload import Offloads, OffloadUnits
from shardwise.execute.place import Place
from shardwise.execute.program import Program
from shardwise.execute.recompute import Recompute
from shardwise.execute.split_proof import Anywhere, SplitProof, prove_splits
from shardwise.execute.state_ranks import divide_states
from shardwise.execute.weight_sums import WeightSums
from shardwise.layout import SYNCHRONISED, Context, Layout, Techniques
from shardwise.parallel.batch_statistics import (
    BatchStatistics,
    RunningStatistics,
    SynchronisedStatistics,
    batch_norms,
)
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.hold import hold, holders_of, take_own
from shardwise.parallel.precision.numerics import Numerics
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.divided import Divided
from shardwise.parallel.tensor.start_up import StartUp, prove_on_ranks
from shardwise.plan.cut import cut_stages
from shardwise.plan.recompute import How
from shardwise.plan.sources import ScheduleSource, moves_by_schedule
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import LossFunction
from shardwise.trace.tape import Tape

__all__ = ["Fill", "Part", "build"]

Part = Callable[[str, torch.Tensor], torch.Tensor]  # (name, whole value) -> what of it belongs on this rank


class Fill(Protocol):
    """Gives the parameters `names` of a model their values: of each whole value, what `part` says."""

    def __call__(self, model: nn.Module, names: Sequence[str], part: Part = ...) -> None: ...


def build(
    model: nn.Module,
    *,
    place: Place,
    tape: Tape,
    placement: Mapping[tuple[str, int], int],
    schedule: ScheduleSource,
    loss: LossFunction | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    units: Sequence[str] = (),
    transport: Transport | None = None,
    fill: Fill | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    context: ContextPlan | None = None,
    start_up: StartUp | None = None,
    split: Sequence[Kind] = (),
    layout: Layout | None = None,
    techniques: Techniques | None = None,
    numerics: Numerics | None = None,
    recompute: Mapping[str, How] | None = None,
) -> Program:
    """Lay `model` out on this rank, in place: its own parameters filled, the others absent, units installed.

    `tape` is a tape of the whole model, `placement` (unit, call) -> stage, `schedule` the one that `place` knows the
    stages of. `fill` gives the held parameters their values (deferred initialisation, a checkpoint); without it the
    model's own values are copied. `tensor` says how units are divided among the shards; without it, shards do the same
    work. `experts` says the same of experts and the replicas that divide them, `context` how units work on own
    tokens of every sequence. Units in `start_up` are proven once more by their ranks.
    `layout` says what `place` does not: how long parameters are whole, what is computed again, what waits elsewhere.
    `numerics` are the casts, masters and loss scale of the model, around it already.
    `recompute`: which units are computed again in the backward, and how much of them.
    `split` are kinds of units of which a split backward is proven equal to the whole; those that fail keep it whole.
    Collective: every rank calls it with the same arguments.
    """
    where = torch.device(device)
    stages = {node.index: placement[(node.name, node.call)] for node in tape.flow.calls}
    cut = cut_stages(tape.flow, stages, place.num_stages)
    holders = holders_of(model, tape.flow, cut, tape.units, placement)
    mine = [name for name, stages_of in holders.items() if place.owns_any(stages_of)]
    if fill is None and place.world_size > 1:
        take_own(model, mine, device=where)
    if fill is not None or place.world_size > 1:
        hold(model, mine, device=where)
    switch, sums, traffic = Switch(), WeightSums(), Traffic()
    communication = (techniques or Techniques()).communication
    around = Around()  # what stands around the bodies of units while a step runs
    stack = contextlib.ExitStack()
    with _closing_on_error(stack):
        compiled = None if techniques is None or not techniques.compile else Compiled(techniques.compile)
        if compiled is not None:  # a graph has its weight gradients inside
            around.add(Order.COMPILE, compiled)
        summed = tape.units if compiled is None else ()
        sums.install(model, summed, {name: p for name, p in model.named_parameters() if name in set(mine)})
        stack.callback(sums.close)
        same_host = rank_groups.same_host(place, where, stack)
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
        of_whole, narrow = OwnPart(divided, divided_experts), numerics is not None and numerics.precision.is_narrow
        # parameters that are freed between their turns get their values a bucket at a time: never are all there
        late = fill is not None and layout is not None and layout.zero == 3 and place.fsdp > 1
        late = late and not (split or start_up or narrow)
        if fill is not None and not late:
            fill(model, mine, of_whole)
        if divided is not None and not late:  # parameters as they are from here on
            sums.divide(model.get_parameter(name) for name in mine if divided.part_of(name) is not None)
        if divided is not None and start_up and place.ep == 1:
            here = {unit: call for unit, call in start_up.items() if placement.get((unit, 0)) in place.stages}
            divided.start_up_errors = prove_on_ranks(divided.shardings, here, divided.group)
        proofs: tuple[SplitProof, ...] = ()
        if split and compiled is None:
            stack.callback(sums.unwatch)
            own_units = sorted({unit for (unit, _), stage in placement.items() if stage in place.stages})
            own_modules = {unit: model.get_submodule(unit) for unit in own_units}
            with contextlib.nullcontext() if divided is None else divided.step():
                proofs = prove_splits(
                    sums, own_modules, split, seed=seed, anywhere=_anywhere(divided, divided_experts, where)
                )
        if numerics is not None:  # proofs are in float32: they have been made
            numerics.take({name: p for name, p in model.named_parameters() if name in set(mine)})
        dealt = deal_contexts(
            model,
            context,
            place=place,
            how=Context.RING if layout is None else layout.context,
            units=tape.units,
            stack=stack,
            same_host=same_host,
            traffic=traffic,
        )
        statistics = _statistics(model, place, stack, "own" if techniques is None else techniques.batch_norm)
        stack.enter_context(installed({name: model.get_submodule(name) for name in tape.units}, switch))
        kinds = _kinds(place, holders, tensor, divided_experts)
        held = {name: p for name, p in model.named_parameters() if name in set(mine)}
        whole = [name for name in kinds if divided is not None and (part := divided.part_of(name)) and part.shared]
        states = divide_states(
            place,
            layout,
            held,
            filled=(lambda names: fill(model, names, of_whole)) if late and fill is not None else None,
            own=model.get_parameter,
            kinds=kinds,
            holders=holders,
            flow=tape.flow,
            units=tape.units,
            replicated=whole,
            varies=bool(tape.looks and tape.random),
            traffic=traffic,
            stack=stack,
            device=where,
            communication=communication,
            **({} if numerics is None else {"masters": numerics.masters.give}),
        )
        if late and fill is not None:
            fill(model, [name for name in mine if states is None or name not in states], of_whole)
            held = {name: p for name, p in model.named_parameters() if name in set(mine)}
            if divided is not None:
                sums.divide(model.get_parameter(name) for name in mine if divided.part_of(name) is not None)
        if layout is not None and place.fsdp > 1:  # also where a stage has nothing to divide: groups are made by all
            kinds = {name: kinds[name] for name in whole}
            held = {name: held[name] for name in whole if name in held}
        if states is not None:
            around.add(Order.UNSHARD, states.calls.around)
        gradients = rank_groups.gradient_sum(place, held, kinds, holders, traffic, stack, communication)
        if numerics is None or not numerics.precision.emulate:  # which rounds results that are returned
            if gradients is not None:
                sums.home = gradients.home
            if states is not None and states.parts is not None:
                sums.home = Sums(states.parts, gradients).home
        if divided_experts is not None:
            of_group = divided_experts.group
            traffic.add("ep.all_to_all", lambda: of_group.sent_bytes)
        between_stages = CountedTransport(transport or same_host or ProcessGroupTransport())
        if place.pp > 1:
            traffic.add("pp.send", lambda: between_stages.sent_bytes)
        narrowed = compressed_transport(between_stages, communication)
        if place.pp > 1 and narrowed is not None:
            traffic.add("pp.saved", lambda: narrowed.saved_bytes)
        everyone = rank_groups.everyone(place, same_host)
    traffic.read()  # what a proof has sent belongs to no step
    if again := _computed_again(recompute or {}, tape):
        around.add(
            Order.RECOMPUTE,
            Recompute(
                {name: model.get_submodule(name) for name in tape.units},
                again,
                around=around,
                repeating=contextlib.nullcontext if divided_experts is None else divided_experts.loads.paused,
                to_the_end=divided_experts is not None,
            ),
        )
    offloads = Offloads(model, lambda: host_memory(where))
    stack.callback(offloads.close)
    if layout is not None and layout.offloads_activations and not moves_by_schedule(layout):
        memory = host_memory(where)
        stack.callback(memory.close)
        around.add(Order.OFFLOAD, OffloadUnits(model, memory))
    engine = Engine(
        model,
        switch=switch,
        loss=loss,
        rank=place.rank,
        rank_of_stage=[place.rank_of(stage) for stage in range(place.num_stages)],
        transport=narrowed or between_stages,
        device=where,
        sums=sums,
        repeating=contextlib.nullcontext if divided_experts is None else divided_experts.loads.paused,
        around=around,
        parameters=states,
        copies=place.cp,
        offloads=offloads,
    )
    flows = Flows(
        model,
        switch=switch,
        placement=placement,
        num_stages=place.num_stages,
        loss=loss,
        units=units,
        whole=_as_traced(dealt_too(whole_for_traces(divided, divided_experts), dealt), numerics),
        divided=divided,
        context=dealt,
    )
    return Program(
        model,
        place=place,
        flows=flows,
        engine=engine,
        schedule=schedule,
        holders=holders,
        gradients=gradients,
        divided_states=states,
        edges=frozenset(cut.edges),
        seed=seed,
        tape=tape,
        cut=cut,
        stack=stack,
        divided=divided,
        experts=divided_experts,
        context=dealt,
        everyone=everyone,
        traffic=traffic,
        split_proofs=proofs,
        numerics=numerics,
        compiled=compiled,
        statistics=statistics,
    )


def _statistics(model: nn.Module, place: Place, stack: contextlib.ExitStack, batch_norm: str) -> BatchStatistics | None:
    """What BatchNorm's statistics are on several replicas; None where there is nothing to do. Collective."""
    norms = batch_norms(model)
    if place.dp == 1 or not norms:
        return None
    group = rank_groups.replica_group(place, stack)
    made: BatchStatistics = (
        SynchronisedStatistics(norms, group) if batch_norm == SYNCHRONISED else RunningStatistics(norms, group)
    )
    stack.callback(made.close)
    return made


def _computed_again(recompute: Mapping[str, How], tape: Tape) -> dict[str, How]:
    """Without units that write into what they are given: they would find it written already."""
    calls = zip(tape.flow.nodes, tape.records, strict=True)
    writes = {node.name for node, record in calls if node.kind is NodeKind.CALL and record.changes}
    return {unit: how for unit, how in recompute.items() if unit not in writes and how is not How.NONE}


def _anywhere(divided: Divided | None, experts: DividedExperts | None, device: torch.device) -> Anywhere:
    """Whether something is so on one of the ranks that compute a unit together."""

    def anywhere(here: bool) -> bool:
        if divided is not None:
            here = bool(divided.group.all_reduce(torch.tensor([float(here)], device=device)).any())
        if experts is not None:
            own = torch.full((experts.group.size, 1), int(here), device=device)
            here = bool(experts.group.headers(own).any())
        return here

    return anywhere


@contextlib.contextmanager
def _closing_on_error(stack: contextlib.ExitStack) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stack.close()
        raise


def _divided(
    model: nn.Module,
    place: Place,
    tensor: TensorPlan | None,
    units: Collection[str],
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
    sharing = rank_groups.tensor_group(place, same_host, stack)
    traffic.add("tp.all_reduce", lambda: sharing.reduced_bytes)
    traffic.add("tp.all_gather", lambda: sharing.gathered_bytes)
    traffic.add("tp.reduce_scatter", lambda: sharing.scattered_bytes)
    divided = Divided(model, tensor, sharing, units, keep_logits=True)
    stack.callback(divided.close)
    return divided


def _as_traced(
    whole: Callable[[], contextlib.AbstractContextManager[None]], numerics: Numerics | None
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Around a trace: whole parameters, in the dtypes that a step computes with."""

    @contextlib.contextmanager
    def traced() -> Iterator[None]:
        with whole(), contextlib.nullcontext() if numerics is None else numerics.traced():
            yield

    return traced


def _kinds(
    place: Place, holders: Mapping[str, tuple[int, ...]], tensor: TensorPlan | None, experts: DividedExperts | None
) -> dict[str, rank_groups.Kind]:
    """Who sums the gradient of each parameter of the model."""
    return {
        name: rank_groups.Kind(
            positions=place.positions_of(stages),
            partial=tensor is not None and tensor.is_partial(name),
            divides_experts=experts is not None and experts.divides(name),
        )
        for name, stages in holders.items()
    }
