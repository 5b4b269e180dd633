"""From a model, a layout and one micro-batch to a `Program` on this rank.

Every rank traces the same micro-batch and derives the same stages from it; nobody sends a plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.comm.point_to_point import Transport
from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.flow import Dataflow
from shardwise.describe.profile import ModelProfile
from shardwise.describe.tensor import Slice, TensorPlan
from shardwise.errors import LayoutError, ShardwiseError
from shardwise.execute.build import Fill, Part, build
from shardwise.execute.contexts import agreed_context
from shardwise.execute.expert_ranks import OwnPart
from shardwise.execute.large_blocks import give_back_large_blocks, passing
from shardwise.execute.modes import evaluating
from shardwise.execute.place import Place, owners_of
from shardwise.execute.program import Program
from shardwise.layout import SEARCHED, SYNCHRONISED, Layout, Techniques
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.precision.numerics import Numerics
from shardwise.parallel.tensor.calls import kinds_of
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.start_up import StartUp, calls_at_start_up
from shardwise.plan.cut import cut_stages
from shardwise.plan.divide import profile_of_shard
from shardwise.plan.partition import place as place_calls
from shardwise.plan.recompute import How, RecomputePlan, plan_recompute
from shardwise.plan.searched import find_schedule
from shardwise.plan.sources import AnySource, GivenSource, OffloadedSource, moves_by_schedule, source_of
from shardwise.schedule import Action, Kind, Schedule
from shardwise.trace.capture import capture
from shardwise.trace.count import Counter
from shardwise.trace.objective import LossFunction
from shardwise.trace.profile import profile_of

__all__ = ["Fill", "agreed_experts", "agreed_plan", "agreed_schedule", "assemble", "fill_from"]


def assemble(
    model: nn.Module,
    inputs: Any,
    *,
    layout: Layout,
    rank: int,
    loss: LossFunction | None = None,
    units: Sequence[str] = (),
    device: torch.device | str = "cpu",
    fill: Fill | None = None,
    transport: Transport | None = None,
    measured: ModelProfile | None = None,
    tensor: TensorPlan | None = None,
    experts: ExpertPlan | None = None,
    context: ContextPlan | None = None,
    tp_plan: GivenPlan | None = None,
    schedule: AnySource | None = None,
    num_micro_batches: int | None = None,
    techniques: Techniques | None = None,
    believed: bool = False,
) -> Program:
    """Lay out `model` for `layout` on rank `rank`, in place. `inputs` is one micro-batch, as `forward` takes it.

    `fill(model, names)` gives parameters their values where the model has none yet. Stages are balanced by `measured`
    (see `trace.timing`) where it is given, by counted work otherwise. `tensor` divides units among the shards of
    layouts with tp > 1; without it rank 0 finds and proves how (`parallel.tensor.plan_tensor`), by `tp_plan` where it
    is given; the same holds of `experts` for layouts with ep > 1 (`parallel.expert.plan_experts`) and of `context` for
    those with cp > 1 (`parallel.context.plan_context`). `schedule` is the
    layout's; without it rank 0 reads it, or searches for one for `num_micro_batches` of a replica. `techniques` say how
    numbers are kept and sent. `believed`: split backwards are not proven again (a rank by itself cannot). Collective.
    Raises `LayoutError` if the rank is none of the layout's.
    """
    if not 0 <= rank < layout.world_size:
        raise LayoutError(
            f"layout {layout} has ranks 0..{layout.world_size - 1}, and this is rank {rank}; start {layout.world_size} "
            "ranks"
        )
    counters: list[Counter] = []

    def watch(recorder: Any) -> Any:
        counters.append(Counter())
        return counters[-1].watching(recorder)

    if layout.shares is not None and techniques is not None and techniques.batch_norm == SYNCHRONISED:
        raise LayoutError(
            f"replicas whose BatchNorm sees all samples together have as many micro-batches, but the layout is "
            f'{layout}; drop shares, or use batch_norm="own"'
        )
    numerics = Numerics(model, None if techniques is None else techniques.precision, device)
    if layout.tp > 1 and numerics.precision.compute == "float8":
        raise LayoutError(f'float8 layers are whole, but tp={layout.tp}; use tp=1, or compute = "bfloat16"')
    with numerics.traced():
        captured = _whole_path(model, inputs, loss, units, watch)
    profile = profile_of(model, captured, counters[-1])
    profile = _with_seconds(profile, measured)
    stages = place_calls(profile, layout)
    placement = {(node.name, node.call): stages[node.index] for node in captured.tape.flow.calls}
    if layout.tp > 1 and tensor is None:
        tensor = agreed_plan(model, inputs, layout=layout, rank=rank, loss=loss, units=units, tp_plan=tp_plan)
    if layout.ep > 1 and experts is None:
        experts = agreed_experts(model, inputs, layout=layout, rank=rank, loss=loss, units=units)
    if layout.cp > 1 and context is None:
        context = agreed_context(model, inputs, layout=layout, rank=rank, loss=loss, units=units)
    if torch.device(device).type == "cpu":  # before parameters get their values: these are the first large blocks
        held_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // layout.pp
        give_back_large_blocks(held_bytes)
    known = profile if tensor is None else profile_of_shard(profile, tensor)
    if schedule is None:
        wanted = num_micro_batches or layout.micro_batches or 2 * layout.pp
        schedule = agreed_schedule(
            layout, rank=rank, find=lambda: find_schedule(known, layout, stages, num_micro_batches=wanted).schedule
        )
    place = Place(
        rank=rank,
        dp=layout.num_replicas,
        pp=layout.pp,
        tp=layout.tp,
        ep=layout.ep,
        fsdp=layout.fsdp,
        cp=layout.cp,
        owner_of=owners_of(schedule.ranks),
    )
    start_up: StartUp = {}
    if tensor is not None and any(proof.start_up for proof in tensor.proofs):
        start_up = calls_at_start_up(kinds_of(model, inputs, loss=loss, units=units), tensor)
    splits = not believed and _splits(schedule, num_micro_batches or layout.micro_batches or 2 * layout.pp)
    return build(
        model,
        place=place,
        tape=captured.tape,
        placement=placement,
        schedule=OffloadedSource(source=schedule) if moves_by_schedule(layout) else schedule,
        loss=loss,
        seed=layout.seed,
        device=device,
        units=units,
        transport=transport,
        fill=fill,
        tensor=tensor,
        experts=experts,
        context=context,
        start_up=start_up,
        layout=layout,
        techniques=techniques or Techniques(),
        recompute=_recompute(known, layout, stages, schedule, captured.tape.flow, num_micro_batches).units,
        numerics=numerics,
        split=kinds_of(model, inputs, loss=loss, units=units) if splits else (),
    )


def _recompute(
    profile: ModelProfile,
    layout: Layout,
    stages: Mapping[int, int],
    schedule: AnySource,
    flow: Dataflow,
    num_micro_batches: int | None,
) -> RecomputePlan:
    """Which units are computed again, the same on every rank: all know the same profile and schedule."""
    if layout.recompute == How.NONE:
        return RecomputePlan(units={})
    made = schedule.schedule if isinstance(schedule, GivenSource) else None
    if made is None:
        made = schedule(num_micro_batches or layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp))
    return plan_recompute(profile, cut_stages(flow, stages, layout.num_stages), made, layout.recompute)


def _splits(schedule: AnySource, num_micro_batches: int) -> bool:
    """Whether a backward is split somewhere; perhaps, where the schedule is not for so many micro-batches.

    One that was written or found says it itself: for another number of micro-batches it would give another schedule.
    """
    try:
        made = schedule.schedule if isinstance(schedule, GivenSource) else schedule(num_micro_batches)
    except ShardwiseError:
        return True
    return any(isinstance(each, Action) and each.kind is Kind.I for row in made.actions for each in row)


def agreed_schedule(layout: Layout, *, rank: int, find: Callable[[], Schedule]) -> AnySource:
    """Where the layout's schedule comes from, the same on every rank: rank 0 reads the file, or asks `find` for one.

    Collective where a schedule is read or searched for. Raises what reading or searching raised, on every rank.
    """
    if not layout.reads_schedule and layout.schedule != SEARCHED:
        made = source_of(layout)
        assert made is not None
        return made
    told: list[Any] = [None]
    if rank == 0:
        try:
            made = source_of(layout) or GivenSource(schedule=find())
            assert isinstance(made, GivenSource)
            told = [made.schedule]
        except ShardwiseError as error:
            told = [error]
        except Exception as error:  # the others wait to be told
            told = [LayoutError(f"rank 0 makes the schedule, but {type(error).__name__}: {error}; see its traceback")]
            if dist.is_initialized():
                dist.broadcast_object_list(told, src=0)
            raise
    if dist.is_initialized():
        dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], ShardwiseError):
        raise told[0]
    assert isinstance(told[0], Schedule)
    return GivenSource(schedule=told[0])


def agreed_experts(
    model: nn.Module, inputs: Any, *, layout: Layout, rank: int, loss: LossFunction | None, units: Sequence[str] = ()
) -> ExpertPlan:
    """The plan of experts that rank 0 has proven, on every rank. Collective. Rank 0 raises what the proof raised."""
    told: list[Any] = [None]
    if rank == 0:
        with passing():
            made = plan_experts(model, inputs, ep=layout.ep, loss=loss, units=units)
        told = [made]
    dist.broadcast_object_list(told, src=0)
    assert isinstance(told[0], ExpertPlan)
    return told[0]


def agreed_plan(
    model: nn.Module,
    inputs: Any,
    *,
    layout: Layout,
    rank: int,
    loss: LossFunction | None,
    units: Sequence[str] = (),
    tp_plan: GivenPlan | None = None,
) -> TensorPlan:
    """The plan of shards that rank 0 has proven, on every rank. Collective. Raises what the proof raised, on rank 0."""
    told: list[Any] = [None]
    if rank == 0:
        sequence = layout.sequence_parallel
        with passing():
            made = plan_tensor(model, inputs, tp=layout.tp, loss=loss, units=units, sequence=sequence, tp_plan=tp_plan)
        told = [made]
    dist.broadcast_object_list(told, src=0)
    assert isinstance(told[0], TensorPlan)
    return told[0]


def _with_seconds(profile: ModelProfile, measured: ModelProfile | None) -> ModelProfile:
    """The seconds of `measured` in `profile`; both must know the same unit calls."""
    if measured is None:
        return profile
    seconds = {(call.unit, call.call): (call.forward_s, call.backward_s) for call in measured.calls}
    missing = [call.unit for call in profile.calls if (call.unit, call.call) not in seconds]
    if missing:
        raise LayoutError(
            f"measured seconds are of the same model: {len(missing)} unit calls such as {missing[0]} are not in them; "
            "measure again with the same units"
        )
    calls = tuple(
        dataclasses.replace(call, forward_s=f, backward_s=b)
        for call in profile.calls
        for f, b in [seconds[(call.unit, call.call)]]
    )
    return dataclasses.replace(profile, calls=calls)


def _whole_path(model: nn.Module, inputs: Any, loss: LossFunction | None, units: Sequence[str], watch: Any) -> Any:
    """A recording in which no unit is dropped: where the glue decides by random numbers, that of evaluation."""
    captured = capture(model, inputs, loss=loss, units=units, watch=watch)
    if not (captured.tape.looks and captured.tape.random and model.training):
        return captured
    with evaluating(model):
        return capture(model, inputs, loss=loss, units=units, watch=watch)


def fill_from(
    values: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
    device: torch.device | str,
    *,
    read: Callable[[str, Sequence[tuple[Slice, int]]], torch.Tensor] | None = None,
) -> Fill:
    """A `fill` that asks `values(names)` for whole tensors, one parameter at a time; or, of what is divided,
    `read(name, slices)` for this rank's part alone."""

    def value_of(name: str, part: Part) -> torch.Tensor:
        if read is not None and isinstance(part, OwnPart):
            return read(name, part.slices(name))
        return part(name, values([name])[name])

    def fill(model: nn.Module, names: Sequence[str], part: Part = lambda name, whole: whole) -> None:
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        wanted = set(names)
        made: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for leaf, parameter in list(module._parameters.items()):
                if parameter is None or canonical[id(parameter)] not in wanted:
                    continue
                if id(parameter) not in made:
                    value = value_of(canonical[id(parameter)], part).to(device=device, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
                module._parameters[leaf] = made[id(parameter)]

    return fill
