"""The steps of a run whose layout is decided on the way: its candidates are measured in steps of the training itself.

    step      0 … 5          6 … 11         12 … 17        18 …
    layout    dp=2  ──────▶  pp=2  ──────▶  tp=2  ──────▶  pp=2, the fastest
              warm, measured               relayout        until the end

Every step is a step of one curve; between two layouts the state moves in memory (`relayout`). A candidate that cannot
be laid out is told and left out. Knows measured seconds; refuses to know how a layout is applied.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import torch.distributed as dist

from shardwise.errors import BatchError, ConfigError, LayoutError, ModelError, ScheduleError
from shardwise.quantities import format_bytes, format_seconds
from shardwise.train.divisions import Divisions, agreed_divisions
from shardwise.train.layout_search import read_choice
from shardwise.train.loop import Emit, run_steps
from shardwise.train.materials import first_micro_batch
from shardwise.train.relayout import Relayout, relayout
from shardwise.train.world import Candidate, World

__all__ = ["Measured", "run_and_measure"]

WARM_UP = 2  # steps that trace, exchange headers and touch memory for the first time
_WORTH = 0.01  # by how much a layout must be faster for a run to go over to it once more
_REFUSALS = (LayoutError, ScheduleError, ConfigError, ModelError, BatchError)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A candidate, and the median of its measured steps; of the slowest rank."""

    candidate: Candidate
    seconds: float

    def __str__(self) -> str:
        error = self.candidate.predicted_s / self.seconds - 1
        predicted = format_seconds(self.candidate.predicted_s)
        return f"{self.candidate.layout} {format_seconds(self.seconds)} (predicted {predicted}, {error:+.0%})"


def run_and_measure(world: World, emit: Emit, candidates: Sequence[Candidate]) -> tuple[World, list[float]]:
    """All steps from `world.first_step`; returns the world that they ended in, and their losses. Collective.

    The first of `candidates` is the layout that the world has. Told: `relayout` for every change, `measured` once.
    """
    each = WARM_UP + world.run.auto.steps
    left = world.run.training.steps - world.first_step
    tried = list(candidates[: max(1, left // (2 * each))])  # half of the steps are of the layout that is kept
    if len(tried) < 2:
        if len(candidates) > 1:
            emit("measured", text=f"layouts are not measured: {left} steps are left, which takes {4 * each} or more")
        return world, run_steps(world, emit)
    step, losses, found = world.first_step, list[float](), list[Measured]()
    for number, candidate in enumerate(tried):
        if number:
            moved = _gone_over(world, candidate, emit, step)
            if moved is None:
                continue
            world = moved
        seconds, own = _steps(world, emit, until=step + each)
        losses += own
        step += each
        world = dataclasses.replace(world, first_step=step)
        found.append(Measured(candidate=candidate, seconds=_agreed(seconds[WARM_UP:])))
    world = _keep(world, emit, found, step)
    return world, losses + run_steps(world, emit)


def _steps(world: World, emit: Emit, *, until: int) -> tuple[list[float], list[float]]:
    """Seconds and losses of the steps before `until`."""
    seconds: list[float] = []

    def watching(kind: str, *, step: int | None = None, **data: object) -> None:
        taken = data.get("step_s")
        if kind == "step" and isinstance(taken, float):
            seconds.append(taken)
        emit(kind, step=step, **data)

    losses = run_steps(world, watching, until=until)
    return seconds, losses


def _agreed(seconds: Sequence[float]) -> float:
    """The median over steps of the slowest rank's; the same on every rank."""
    of_ranks: list[Sequence[float]] = [list(seconds)]
    if dist.is_initialized() and dist.get_world_size() > 1:
        of_ranks = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(of_ranks, list(seconds))
    return float(statistics.median(max(step) for step in zip(*of_ranks, strict=True)))


def _gone_over(world: World, candidate: Candidate, emit: Emit, step: int) -> World | None:
    """The world on another layout; None where that is refused, on every rank alike."""
    try:
        moved, told = relayout(world, candidate, step=step)
    except _REFUSALS as error:
        why = " ".join(str(error).split())
        emit("refused", step=step, layout=str(candidate.layout), why=why, text=f"{candidate.layout} is left out: {why}")
        return None
    _tell(emit, told, step)
    return moved


def _tell(emit: Emit, told: Relayout, step: int) -> None:
    emit(
        "relayout",
        step=step,
        source=told.source,
        target=told.target,
        seconds=told.seconds,
        build_s=told.build_s,
        move_s=told.move_s,
        sent_bytes=told.sent_bytes,
        state_bytes=told.state_bytes,
        rounds=told.rounds,
        peak_bytes=told.peak_bytes,
        text=(
            f"relayout behind step {step}: {told.source} -> {told.target} in {format_seconds(told.seconds)} "
            f"({format_seconds(told.move_s)} for {format_bytes(told.state_bytes)} of state)"
        ),
    )


def _keep(world: World, emit: Emit, found: Sequence[Measured], step: int) -> World:
    """The world on the fastest layout, its estimate stored in place of the first one's."""
    best = min(found, key=lambda each: each.seconds)
    here = next((each for each in found if each.candidate.layout == world.run.layout), None)
    if here is not None and here.seconds <= best.seconds * (1 + _WORTH):
        best = here
    first = found[0]
    if best is not here:
        moved = _gone_over(world, best.candidate, emit, step)
        if moved is None:  # it could be had before
            best, moved = here or first, world
        world = moved
    gain = first.seconds / best.seconds - 1
    than = "" if gain < _WORTH else f", {gain:.0%} faster than the first by prediction"
    emit(
        "measured",
        step=step,
        kept=str(world.run.layout),
        layouts={str(each.candidate.layout): each.seconds for each in found},
        predicted={str(each.candidate.layout): each.candidate.predicted_s for each in found},
        text=f"measured {', '.join(map(str, found))}; kept {world.run.layout}{than}",
    )
    if best is not first:
        _estimate(world, best.candidate, emit)
    if world.program.place.rank == 0:
        choice = read_choice(world.run.folder)
        if choice is not None:
            dataclasses.replace(choice, kept=world.run.layout).write(world.run.folder)
    return world


def _estimate(world: World, best: Candidate, emit: Emit) -> None:
    """What the run stores of its first layout, of the one that it keeps. Collective."""
    assert world.fresh is not None
    model, values = world.fresh()
    agreed_divisions(
        world.run,
        model,
        first_micro_batch(world.run, world.task, world.device),
        task=world.task,
        values=values,
        device=world.device,
        rank=world.program.place.rank,
        known=Divisions(layout=world.run.seeded_layout, tensor=best.tensor, experts=best.experts),
        on_estimate=lambda text: emit("estimate", text=text),
    )
