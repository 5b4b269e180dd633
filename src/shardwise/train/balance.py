"""Stages balanced by the clock: unit calls timed once, on one rank, and the layout that every rank then applies.

What was measured leaves here as a layout whose stages are listed by hand, so all ranks agree on it, it can be printed
and it can be written into a run file. Refuses to know how parameters are made: it asks for them unit by unit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.describe.profile import ModelProfile
from shardwise.layout import Layout, StageRule, compress
from shardwise.plan.partition import place
from shardwise.trace.objective import LossFunction
from shardwise.trace.profile import trace
from shardwise.trace.timing import measure
from shardwise.train.model import Values
from shardwise.train.run_file import Run

__all__ = ["layout_for", "listed_stages", "of_rank_0", "profile_for", "with_threads"]


def profile_for(
    run: Run,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    loss: LossFunction | None,
    values: Values | None,
    device: torch.device | str = "cpu",
) -> ModelProfile:
    """What the model costs on one micro-batch: counted, and by the clock where the run is balanced so.

    `values(names)` are the parameters of a model without values; while calls are timed on this rank's threads or GPU,
    one unit's are in memory at a time. The random numbers of the process are left as they were. Raises ModelError.
    """
    if run.balance != "measured":
        return trace(model, inputs, loss=loss)
    gpus = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        return measure(model, inputs, loss=loss, values=values, device=device)


def layout_for(run: Run, profile: ModelProfile) -> Layout:
    """The run's layout, with the stages that measured seconds give where they balance it. Raises LayoutError."""
    return listed_stages(profile, run.seeded_layout) if run.balance == "measured" else run.seeded_layout


def listed_stages(profile: ModelProfile, layout: Layout) -> Layout:
    """`layout` with the stages that `profile` gives it, listed by unit. Raises LayoutError.

    Calls of a unit that is called several times are listed by number.
    """
    stages = place(profile, dataclasses.replace(layout, stages=StageRule.COST))
    times = Counter(call.unit for call in profile.calls)
    names: list[list[str]] = [[] for _ in range(layout.num_stages)]
    for node in profile.flow.calls:
        names[stages[node.index]].append(node.name if times[node.name] == 1 else node.label)
    return dataclasses.replace(layout, stages=tuple(compress(stage) for stage in names))


def of_rank_0(layout: Layout) -> Layout:
    """The layout that rank 0 has. Collective where there are several ranks."""
    if not dist.is_initialized():
        return layout
    told = [layout.to_json()]
    dist.broadcast_object_list(told, src=0)
    return Layout.from_json(told[0])


@contextlib.contextmanager
def with_threads(num_threads: int) -> Iterator[None]:
    """Torch computes on so many threads in the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
