"""`shardwise draw`: a schedule that is planned, or a step that was measured, as text, picture and trace.

Knows schedules and the files that a run leaves; starts nothing and reads no model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.draw_costs import costs_of, costs_of_run
from shardwise.cli.draw_passes import with_passes
from shardwise.cli.draw_run import panels_of, recording_of, timelines_of, words_of
from shardwise.cli.draw_searched import SEARCHED, searched_for
from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.schedule import (
    GENERATORS,
    Costs,
    Edges,
    Schedule,
    Timeline,
    check,
    chunks_of,
    draw,
    generate,
    pipedream_2bw,
    simulate,
)
from shardwise.schedule.chrome_trace import to_chrome_trace
from shardwise.schedule.svg import Unit, to_svg
from shardwise.schedule.torch_csv import read_csv, write_csv

__all__ = ["command"]

_RANKS, _MICRO_BATCHES = 4, 8
_STEPS = 3  # drawn of a schedule whose steps follow without a flush
_US_PER_UNIT = 1e3  # of a trace of what has no seconds: a unit is shown as a millisecond


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SCHEDULE",
            help=f"One of {', '.join(GENERATORS)}, {SEARCHED}; a file .json, or .csv of torch; the folder of a run.",
            show_default=False,
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Of the pipeline: one row each; {_RANKS} if not given.")
    ] = None,
    micro_batches: Annotated[
        int | None, typer.Option(metavar="N", min=1, help=f"Of a step; {_MICRO_BATCHES} if not given.")
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stages a rank; as few as the schedule is made for.")
    ] = None,
    forward: Annotated[
        str, typer.Option(metavar="TIME", help="Of a forward, in any unit: a number, or one a stage as in 1,1,2,1.")
    ] = "1",
    input_gradient: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of a backward's first half; that of a forward if not given.")
    ] = None,
    weight_gradient: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of its second half; that of a forward if not given.")
    ] = None,
    backward: Annotated[
        str | None, typer.Option(metavar="TIME", help="Of a whole backward; the sum of both if not given.")
    ] = None,
    transfer: Annotated[str, typer.Option(metavar="TIME", help="From a stage to the next one, there and back.")] = "0",
    costs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Of a run: the times that were measured in it, instead.")
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option(metavar="N", min=1, help="Of searched: micro-batches that a rank has room for; any if not given."),
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", metavar="", help="Run every forward once more ahead of its backward.")
    ] = False,
    offload: Annotated[
        float | None, typer.Option(metavar="TIME", min=0, help="Move what a forward keeps to the host, and back.")
    ] = None,
    reduce: Annotated[
        float | None, typer.Option(metavar="TIME", min=0, help="Sum a stage's gradients over replicas when final.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of a run: which recorded step; the last if not given.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(metavar="COLUMNS", min=1, help="Of the drawing; as many as needed if not given.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a picture, too.")] = None,
    chrome: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the schedule: edit it, and run it.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it for torch.distributed.pipelining.")] = None,
    stages: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Draw a pipeline schedule: one row a rank, time to the right.

    "3>" is the forward of micro-batch 3, "3<" its backward or input gradient,
    "3=" its weight gradient, "." waiting; the longer, the more of them. The
    second stage of a rank has "3)", "3(" and "3-".

    shardwise draw 1f1b
    shardwise draw gpipe --ranks 2 --micro-batches 3 --transfer 0.5
    shardwise draw 1f1b --forward 1,1,1,2 --svg picture.svg
    shardwise draw searched --chunks 2 --forward 1,1,1,1,1,1,1,3 --memory 4
    shardwise draw runs/mine --svg measured.svg --chrome trace.json
    shardwise draw searched --costs runs/mine --json found.json

    naive        one micro-batch after another through all stages: layer parallel
    gpipe        all forwards, then all backwards: every micro-batch in memory
    1f1b         one forward, one backward in turn: the same wait, less memory
    interleaved  1f1b over several stages a rank: less wait, more messages
    looped-bfs   gpipe over several stages a rank: each gathered once a step
    zb-h1        1f1b whose weight gradients fill the wait
    zb-h2        no gaps in the work of a rank, for twice the memory
    zb-v         no gaps in the memory of 1f1b: two stages a rank in a V
    zb-v-half    the same in half the memory, zb-v-min in a third: more wait
    dualpipe-v   a forward beside the backward of another micro-batch
    pipedream-2bw  1f1b that is not drained between steps: three of them
    searched     the fastest that is found for these times and this memory

    Of a run, the recorded step is drawn above what the simulator makes of the
    costs that were measured in it.
    """
    if stages is not None:
        raise ConfigError(
            f"a schedule is drawn for ranks, each of which may have several stages, but got --stages {stages}; write "
            f"--ranks {stages}, and --chunks N for N stages a rank"
        )
    path = Path(source)
    if source not in GENERATORS and path.is_dir():
        run = recording_of(path, step)
        print(words_of(run, width))
        _write(svg, to_svg(panels_of(run)) if svg else "")
        _write(chrome, to_chrome_trace(timelines_of(run), edges=run.edges) if chrome else "")
        _write(json, run.schedule.to_json() if json else "")
        _write(csv, write_csv(run.schedule) if csv else "")
        return
    if step is not None and costs is None:
        raise ConfigError(f"steps are those of a run, but {source} is a schedule and --step {step} is given; drop it")
    if memory is not None and source != SEARCHED:
        raise ConfigError(
            f"a schedule is searched for within a memory, but {source} is given; drop --memory {memory:g}"
        )
    measured = recording_of(costs, step) if costs is not None else None
    num_ranks = ranks or (measured.schedule.num_ranks if measured else _RANKS)
    num_micro_batches = micro_batches or (measured.schedule.num_micro_batches if measured else _MICRO_BATCHES)
    edges = measured.edges if measured else None
    priced: Callable[[int], Costs] = partial(
        costs_of,
        forward=forward,
        input_gradient=input_gradient,
        weight_gradient=weight_gradient,
        backward=backward,
        transfer=transfer,
    )
    if measured:
        priced = partial(costs_of_run, measured)
    found = ""
    if source == SEARCHED:
        each = chunks or (measured.schedule.num_stages // num_ranks if measured else 1)
        prices = priced(num_ranks * each)
        searched = searched_for(
            prices, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=each, room=memory, edges=edges
        )
        made, found = searched.schedule, f"\n{searched}"
    else:
        made = _schedule(source, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)
        prices = priced(made.num_stages)
    made, prices = with_passes(made, prices, recompute=recompute, offload=offload, reduce=reduce)
    timeline = simulate(made, edges, costs=prices)
    print(f"{draw(timeline, width=width)}\n{_in_flight(made, timeline, edges)}{found}")
    _write(svg, to_svg(timeline, title=str(made), unit=None if measured else Unit(name="")) if svg else "")
    us_per_unit = 1e6 if measured else _US_PER_UNIT
    _write(chrome, to_chrome_trace(timeline, edges=edges, us_per_unit=us_per_unit) if chrome else "")
    _write(json, made.to_json() if json else "")
    _write(csv, write_csv(made) if csv else "")


def _schedule(source: str, *, num_ranks: int, num_micro_batches: int, chunks: int | None) -> Schedule:
    path = Path(source)
    if source == pipedream_2bw.NAME:
        chunks_of(source, chunks)
        return pipedream_2bw.unrolled(num_ranks=num_ranks, num_micro_batches=num_micro_batches, num_steps=_STEPS)
    if source in GENERATORS or path.suffix not in (".json", ".csv"):
        return generate(source, num_ranks=num_ranks, num_micro_batches=num_micro_batches, chunks=chunks)
    text = read_text(path, what="a schedule file", repair="correct the path")
    return Schedule.from_json(text) if path.suffix == ".json" else read_csv(text, name=path.stem)


def _in_flight(schedule: Schedule, timeline: Timeline, edges: Edges | None) -> str:
    """What the schedule needs, and what it could not go below."""
    peaks = ", ".join(map(str, check(schedule, edges).peak_per_rank))
    busiest = max(timeline.busy_seconds)
    return (
        f"micro-batches in flight on rank 0, 1, ..., at most: {peaks}\n"
        f"ideal: {busiest:.6g}, what the busiest rank computes"
    )


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"a drawing is written to a file, but {path}: {error.strerror}; name another") from error
