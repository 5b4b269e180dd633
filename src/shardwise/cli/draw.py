"""`shardwise draw`: a schedule as text, simulated with costs in units of a forward. Knows schedules only."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.schedule import GENERATORS, Costs, draw, generate, simulate

__all__ = ["command"]


def command(
    schedule: Annotated[str, typer.Argument(help=f"One of {', '.join(GENERATORS)}.")],
    stages: Annotated[int, typer.Option(min=1, help="Stages of the pipeline.")] = 4,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 8,
    forward: Annotated[float, typer.Option(min=0, help="Time of a forward.")] = 1.0,
    backward: Annotated[float, typer.Option(min=0, help="Time of a backward.")] = 2.0,
    width: Annotated[int | None, typer.Option(min=1, help="Columns; as needed if not given.")] = None,
) -> None:
    """Draw a pipeline schedule: one row a rank, time to the right, "3>" the forward of micro-batch 3.

    shardwise draw 1f1b --stages 4 --micro-batches 8
    """
    made = generate(schedule, num_stages=stages, num_micro_batches=micro_batches)
    timeline = simulate(made, costs=Costs.uniform(stages, forward=forward, backward=backward))
    print(draw(timeline, width=width))
