"""A run under way goes over to another layout on the same ranks, in memory: nothing of the training is lost.

    rank 0 divides the model ──▶ every rank lays it out anew ──▶ state moves, slice by slice ──▶ the old program closes
        refused? all stay            failed anywhere? all stay       no room? undone, all stay

Step number, random keys and data order follow from the step and the seed; parameters, masters, moments, buffers and the
loss scale are moved bit for bit. Knows two layouts of one run; refuses to know which is better.
"""

from __future__ import annotations

import dataclasses
import time

import psutil
import torch
import torch.distributed as dist

from shardwise.errors import LayoutError
from shardwise.execute.assemble import fill_from
from shardwise.execute.large_blocks import trim
from shardwise.execute.program import Program
from shardwise.layout import Layout, StageRule
from shardwise.parallel.hold import hold
from shardwise.plan.sources import check_source
from shardwise.quantities import format_bytes
from shardwise.schedule import GENERATORS
from shardwise.train.build import bring_buffers, lay_out, schedule_of
from shardwise.train.divisions import Divisions, agreed_divisions, first_error
from shardwise.train.held_state import Side
from shardwise.train.materials import first_micro_batch
from shardwise.train.memory import PeakMemory, own_memory
from shardwise.train.moving import ROUND_BYTES, agree, move_state
from shardwise.train.run_file import Run
from shardwise.train.world import Candidate, World

__all__ = ["Relayout", "relayout"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Relayout:
    """What going over took on this rank: `build_s` to divide and lay out the model, `move_s` to move its state;
    `sent_bytes` by this rank of `state_bytes` that all ranks have of it together, each once; `peak_bytes` at most held
    meanwhile."""

    source: str
    target: str
    build_s: float
    move_s: float
    sent_bytes: int
    state_bytes: int
    rounds: int
    peak_bytes: int

    @property
    def seconds(self) -> float:
        return self.build_s + self.move_s


def relayout(
    world: World, to: Candidate | Layout, *, step: int, round_bytes: int = ROUND_BYTES
) -> tuple[World, Relayout]:
    """The world of this rank under another layout, `step` being the first one to do; `world` is closed. Collective,
    behind a step: every rank calls it with the same layout.

    Raises LayoutError, or what the layout broke, on every rank alike; then `world` goes on as if nobody had asked.
    """
    candidate = to if isinstance(to, Candidate) else Candidate(layout=to, predicted_s=0.0)
    run = _run_on(world, candidate.layout)
    agree(_lack_of_room(world, candidate))
    peak, start = PeakMemory(world.device), time.perf_counter()
    new = _laid_out(world, run, candidate)
    built = time.perf_counter()
    old = Side(program=world.program, optimizer=world.optimizer)
    try:
        moved = move_state(old, new, round_bytes=round_bytes)
    except LayoutError:
        new.program.close()
        raise
    if old.optimizer is not None:
        old.optimizer.state.clear()
    world.program.close()
    hold(world.program.model, (), device=world.device)  # also where somebody keeps the module
    told = Relayout(
        source=str(world.run.layout),
        target=str(run.layout),
        build_s=built - start,
        move_s=time.perf_counter() - built,
        sent_bytes=moved.sent_bytes,
        state_bytes=moved.state_bytes,
        rounds=moved.rounds,
        peak_bytes=peak.nbytes,
    )
    program, optimizer = new.program, new.optimizer
    world = dataclasses.replace(
        world, run=run, program=program, optimizer=optimizer, first_step=step, planned=None, stream=None
    )
    trim()  # a module has cycles: what the old one held goes now
    return world, told


def _run_on(world: World, layout: Layout) -> Run:
    """The run with another layout. Raises LayoutError where it cannot go over to it."""
    run = world.run
    if world.fresh is None:
        raise LayoutError(
            "a run goes over to another layout with a model that can be made again, but nobody kept this one; start it "
            "with its candidates"
        )
    if world.workers is not None:
        raise LayoutError("workers that train by themselves keep their layout; leave [asynchronous] out")
    if layout.world_size != run.layout.world_size:
        raise LayoutError(
            f"a run goes over to a layout of as many ranks, but {layout} has {layout.world_size} and {run.layout} "
            f"{run.layout.world_size}; resume from a checkpoint for another number"
        )
    for each in (run.layout, layout):
        if each.schedule in GENERATORS and not GENERATORS[each.schedule].flushes:
            raise LayoutError(
                f"{each.schedule} is never between two steps, so that nothing can go over from {run.layout} to "
                f"{layout} there; use a schedule that flushes"
            )
    check_source(layout, layout.num_micro_batches(run.training.global_batch))
    update: dict[str, object] = {"layout": layout}
    if layout.stages != StageRule.COST:
        update["balance"] = "flops"  # the layout says its stages itself
    return run.model_copy(update=update)


def _lack_of_room(world: World, candidate: Candidate) -> LayoutError | None:
    """Why this rank cannot hold what it would by prediction; None where it can, or nobody has predicted. Ranks of a
    host share what it has free."""
    layout, needs_bytes = candidate.layout, candidate.peak_bytes
    if not needs_bytes:
        return None
    place = world.program.place.rank * layout.pp // layout.world_size
    more = needs_bytes[min(place, len(needs_bytes) - 1)] - own_memory(world.device)
    if world.device.type == "cuda":
        free = int(torch.cuda.mem_get_info(world.device)[0])
    else:
        free = int(psutil.virtual_memory().available) // layout.world_size
    if more <= free:
        return None
    return LayoutError(
        f"a rank holds its part of a layout, but {layout} needs {format_bytes(round(more))} more than it has here, and "
        f"{format_bytes(free)} are free; try fewer layouts, or a smaller batch"
    )


def _laid_out(world: World, run: Run, candidate: Candidate) -> Side:
    """The model under the run's layout, with values that do not count yet. Collective; the same error on all ranks."""
    assert world.fresh is not None
    rank, device = world.program.place.rank, world.device
    model, values = world.fresh()
    bring_buffers(model, device)
    inputs = first_micro_batch(run, world.task, device)
    try:
        divisions = agreed_divisions(
            run,
            model,
            inputs,
            task=world.task,
            values=values,
            device=device,
            rank=rank,
            known=Divisions(layout=run.seeded_layout, tensor=candidate.tensor, experts=candidate.experts),
        )
        schedule = schedule_of(divisions, rank=rank)
    except Exception as refused:  # the others have been told
        raise first_error(refused, rank=rank) from refused
    program: Program | None = None
    optimizer: torch.optim.Optimizer | None = None
    error: Exception | None = None
    try:
        program, optimizer = lay_out(
            run,
            model,
            inputs,
            divisions,
            schedule,
            task=world.task,
            rank=rank,
            device=device,
            fill=fill_from(values, device),
        )
    except Exception as raised:  # the others must know before they wait for this rank
        error = raised
    try:
        agree(error)
    except LayoutError:
        if program is not None:
            program.close()
        raise
    assert program is not None
    if dist.is_initialized() and world.program.place.world_size > 1:
        dist.barrier()
    return Side(program=program, optimizer=optimizer)
