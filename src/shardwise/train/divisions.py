"""How a run's model is divided for one layout, made on rank 0 and the same on every rank: units, experts, sequences,
listed stages, a schedule that was searched.

What rank 0 cannot make is an error on all ranks, so that nobody waits for a plan that does not come. Knows a run and a
model without values; refuses to know how a division is applied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import LayoutError, ShardwiseError
from shardwise.execute.contexts import context_plan
from shardwise.execute.large_blocks import passing
from shardwise.layout import SEARCHED, Layout
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.plan.searched import Found
from shardwise.schedule import Schedule, Timeline
from shardwise.tasks import Task
from shardwise.train.asynchronous.note import workers_note
from shardwise.train.balance import layout_for
from shardwise.train.estimate import profiles_for, store_estimate
from shardwise.train.model import Values
from shardwise.train.plan import context_note, experts_note, plan_and_timeline, schedule_for, statistics_note
from shardwise.train.run_file import Run
from shardwise.train.saved_values import new_values_note

__all__ = ["Divisions", "Tell", "agreed_divisions", "first_error"]

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divisions:
    """`layout` has its stages listed where the clock balances them, `schedule` is the one that was searched, `planned`
    the step of the plan in words, where one was asked for."""

    layout: Layout
    tensor: TensorPlan | None = None
    experts: ExpertPlan | None = None
    context: ContextPlan | None = None
    schedule: Schedule | None = None
    planned: Timeline | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Given:
    """What rank 0 makes them of."""

    run: Run
    model: nn.Module
    inputs: Mapping[str, torch.Tensor]
    task: Task
    values: Values | None
    device: torch.device
    known: Divisions
    on_plan: Tell | None
    on_estimate: Tell | None


def agreed_divisions(
    run: Run,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    task: Task,
    values: Values | None,
    device: torch.device,
    rank: int,
    known: Divisions | None = None,
    on_plan: Tell | None = None,
    on_estimate: Tell | None = None,
) -> Divisions:
    """The divisions of `run.layout`. Collective where ranks have a process group; raises what rank 0 has raised, on
    every rank.

    `known` has plans that were made before; rank 0 gives the plan in words to `on_plan`, and a line about the estimate
    that it stores to `on_estimate`.
    """
    made: Divisions | None = None
    error: Exception | None = None
    if rank == 0:
        given = _Given(
            run=run,
            model=model,
            inputs=inputs,
            task=task,
            values=values,
            device=device,
            known=known or Divisions(layout=run.seeded_layout),
            on_plan=on_plan,
            on_estimate=on_estimate,
        )
        try:
            made = _made(given)
        except Exception as raised:  # the others wait to be told
            error = raised
    told = _told(made, error, alone=run.seeded_layout.world_size == 1)
    if error is not None:
        raise error
    if isinstance(told, ShardwiseError):
        raise told
    assert isinstance(told, Divisions)
    return told if made is None else made  # what was drawn stays on rank 0


def _told(made: Divisions | None, error: Exception | None, *, alone: bool) -> Divisions | ShardwiseError | None:
    if alone or not dist.is_initialized():
        return made
    of_rank_0: list[Divisions | ShardwiseError | None] = [None]
    if error is not None:
        of_rank_0 = [first_error(error, rank=0)]
    elif made is not None:
        of_rank_0 = [dataclasses.replace(made, planned=None)]
    dist.broadcast_object_list(of_rank_0, src=0)
    return of_rank_0[0]


def first_error(error: BaseException, *, rank: int) -> ShardwiseError:
    """What other ranks are told of an error of this one."""
    if isinstance(error, ShardwiseError):
        return error
    told = " ".join(str(error).split())
    return LayoutError(f"all ranks lay a model out together, but on rank {rank} {type(error).__name__}: {told}")


def _made(given: _Given) -> Divisions:
    run, model, inputs, loss = given.run, given.model, given.inputs, given.task.loss
    known, layout = given.known, given.known.layout
    tensor, experts, context = known.tensor, known.experts, known.context
    with passing():
        if layout.tp > 1 and tensor is None:
            sequence = layout.sequence_parallel
            tensor = plan_tensor(model, inputs, tp=layout.tp, loss=loss, sequence=sequence, tp_plan=run.tp_plan)
        if layout.ep > 1 and experts is None:
            experts = plan_experts(model, inputs, ep=layout.ep, loss=loss)
        if layout.cp > 1 and context is None:
            context = context_plan(model, inputs, layout=layout, loss=loss)
    divided = dataclasses.replace(known, tensor=tensor, experts=experts, context=context)
    if not (given.on_plan or given.on_estimate) and run.balance != "measured" and layout.schedule != SEARCHED:
        return divided
    return _planned(given, divided)


def _planned(given: _Given, divided: Divisions) -> Divisions:
    """What a trace of the model besides tells: listed stages, a schedule, the plan in words, the estimate."""
    run, model = given.run, given.model
    tensor, experts, context = divided.tensor, divided.experts, divided.context
    profile, profiles = profiles_for(
        run,
        model,
        given.inputs,
        loss=given.task.loss,
        values=given.values,
        device=given.device,
        tensor=tensor,
        experts=experts,
        context=context,
    )
    layout = layout_for(run, profile)
    found = schedule_for(
        profile,
        layout=layout,
        num_micro_batches=run.most_micro_batches,
        tensor=tensor,
        experts=experts,
        context=context,
    )
    if found is not None:
        _write_schedule(run, found)
    planned: Timeline | None = None
    if given.on_plan is not None:
        plan, planned = plan_and_timeline(
            profile,
            layout=layout,
            num_micro_batches=run.most_micro_batches,
            tensor=tensor,
            experts=experts,
            context=context,
            found=found,
        )
        notes = experts_note(experts) + context_note(context) + statistics_note(model, layout)
        notes += new_values_note(given.values, run.model.path)
        given.on_plan(plan + notes + workers_note(run, model))
    if given.on_estimate is not None:
        given.on_estimate(store_estimate(run, model, layout, profiles))
    schedule = None if found is None else found.schedule
    return dataclasses.replace(divided, layout=layout, schedule=schedule, planned=planned)


def _write_schedule(run: Run, found: Found) -> None:
    """The schedule that was found, for whoever wants to run it again: `schedule = "FOLDER/schedule.json"`."""
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedule.json").write_text(found.schedule.to_json() + "\n", encoding="utf-8")
