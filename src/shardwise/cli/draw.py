"""`shardwise draw`: a schedule as text, simulated with costs in units of a forward. Knows schedules only."""

from __future__ import annotations

from typing import Annotated

import typer

from shardwise.schedule import GENERATORS, Costs, draw, generate, simulate

__all__ = ["command"]


def command(
    schedule: Annotated[str, typer.Argument(metavar="SCHEDULE", help=f"One of {', '.join(GENERATORS)}.")],
    stages: Annotated[int, typer.Option(metavar="N", min=1, help="Stages of the pipeline: one row each.")] = 4,
    micro_batches: Annotated[int, typer.Option(metavar="N", min=1, help="Micro-batches of a step.")] = 8,
    forward: Annotated[float, typer.Option(metavar="TIME", min=0, help="Of one forward, in any unit.")] = 1.0,
    backward: Annotated[float, typer.Option(metavar="TIME", min=0, help="Of one backward, in the same unit.")] = 2.0,
    width: Annotated[
        int | None, typer.Option(metavar="COLUMNS", min=1, help="Of the drawing; as many as needed if not given.")
    ] = None,
) -> None:
    """Draw a pipeline schedule as text: one row a rank, time to the right.

    "3>" is the forward of micro-batch 3, "3<" its backward, "." waiting; the longer, the more of them.

    shardwise draw 1f1b
    shardwise draw gpipe --stages 2 --micro-batches 3

    naive   one micro-batch after another through all stages: layer parallel
    gpipe   all forwards, then all backwards: every micro-batch in memory
    1f1b    one forward, one backward in turn: the same wait, less memory
    """
    made = generate(schedule, num_ranks=stages, num_micro_batches=micro_batches)
    timeline = simulate(made, costs=Costs.uniform(stages, forward=forward, backward=backward))
    print(draw(timeline, width=width))
