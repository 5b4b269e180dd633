"""`shardwise plan`: the plan of a run or of a bare model config, in words. Traces in this process; starts nothing."""

from __future__ import annotations

import resource
import time
from typing import Annotated

import typer

from shardwise.cli.options import Overrides
from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.quantities import format_bytes, format_count, format_seconds
from shardwise.trace.model_config import trace_config
from shardwise.train.build import build_model, build_task, first_micro_batch
from shardwise.train.plan import plan_of_model, plan_of_profile
from shardwise.train.run import prepare
from shardwise.train.run_file import load_run

__all__ = ["command"]

_KIB = 1024


def command(
    run: Annotated[str | None, typer.Argument(metavar="[RUN.toml]", help="The run; or give --model-config.")] = None,
    layout: Annotated[str | None, typer.Option(help='Instead of the run\'s, as "dp=2,pp=4".')] = None,
    model_config: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="A transformers config: plan it without a run.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples of a micro-batch, with --model-config.")] = 1,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens of a sample, with --model-config.")] = 128,
    overrides: Overrides = None,
) -> None:
    """Show how a model is split: what every stage runs, holds and sends, and the schedule drawn.

    Nothing of the model is allocated: a config of 671 B parameters takes seconds.

    shardwise plan run.toml --layout pp=4

    shardwise plan --model-config config.json --layout pp=16
    """
    if (run is None) == (model_config is None):
        raise ConfigError("a plan is made of a run file or of --model-config FILE.json; give one of them")
    if model_config is not None:
        _plan_config(model_config, Layout.parse(layout or "pp=1"), batch_size, sequence_length)
    elif run is not None:
        _plan_run(run, [*(overrides or ()), *([f"layout={layout}"] if layout else ())])


def _plan_run(path: str, overrides: list[str]) -> None:
    described = load_run(path, overrides)
    job = prepare(described.model_copy(update={"checkpoint": described.checkpoint.model_copy(update={"every": 0})}))
    task = build_task(job)
    model, _ = build_model(job)
    inputs = first_micro_batch(described, task)
    print(
        plan_of_model(
            model,
            inputs,
            layout=described.layout,
            loss=task.loss,
            num_micro_batches=described.num_micro_batches,
        )
    )


def _plan_config(path: str, layout: Layout, batch_size: int, sequence_length: int) -> None:
    start = time.perf_counter()
    profile = trace_config(path, batch_size=batch_size, sequence_length=sequence_length)
    traced_s = time.perf_counter() - start
    micro_batches = layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp)
    print(plan_of_profile(profile, layout=layout, num_micro_batches=micro_batches))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    count = format_count(profile.num_parameters, "parameters")
    print(f"traced {count} in {format_seconds(traced_s)}; this process held {format_bytes(peak)} at most")
