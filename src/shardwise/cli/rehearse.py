"""`shardwise rehearse`: one rank of a job whose machine is not there, run by itself. Prints what it held and sent."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import torch
import typer

from shardwise.cli.options import Overrides
from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError
from shardwise.layout import Layout
from shardwise.plan.resize import of_devices
from shardwise.train.run_file import Run, load_run
from shardwise.verify.rehearse_job import filling, rehearse_config, rehearse_run
from shardwise.verify.rehearse_text import record, words

__all__ = ["command"]


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN.toml]", help="The run; examples/demo.toml is one to copy.")
    ] = None,
    rank: Annotated[int, typer.Option(metavar="R", min=0, help="The rank that is rehearsed.")] = 0,
    world: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks of the job: replicas (dp) are added until they fit.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Instead of the run's; pp=1 with --model-config.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="fake or cuda; the GPU if there is one, else fake tensors.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="CLUSTER", help="Predict seconds for it too, such as h100x8x4.")
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Rehearse this transformers config, without a run.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --model-config: samples of a micro-batch.")
    ] = 1,
    sequence_length: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --model-config: tokens of a sample.")
    ] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print numbers as JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Run one rank's program of a job by itself: its memory, what it sends, its time.

    The same program as in training, its actions run by the same engine; the
    other ranks are not there, nobody answers and nothing is waited for. On a
    GPU kernels and memory are real. Without one tensors have no values:
    every storage is counted when it is made and when it goes.

    shardwise rehearse run.toml --world 1024 --rank 37
    shardwise rehearse run.toml --layout dp=2,pp=4,tp=8 --rank 63
    shardwise rehearse --model-config config.json --layout fsdp=8,tp=8 --json

    With --world the layout has as many replicas as fill it, each with as many
    samples as before. Beside what was found stands what `shardwise plan`
    predicts of the same rank; docs/rehearse.md says what is left out.
    """
    if (run is None) == (model_config is None):
        given = "neither" if run is None else "both"
        raise ConfigError(
            f"a rehearsal is of a run file or of --model-config FILE.json, but {given} of them is given; give one"
        )
    where = _device(device)
    if run is not None:
        described = _scaled(load_run(run, [*(overrides or ()), *([f"layout={layout}"] if layout else ())]), world)
        priced = _cluster(cluster, described.layout.world_size)
        found, foretold = rehearse_run(described, rank=rank, device=where, cluster=priced)
    else:
        if overrides:
            raise ConfigError(
                f"--set sets values of a run file, and --model-config has none, but got --set {overrides[0]}; change "
                "the config file, or use a run file"
            )
        given_layout = Layout.parse(layout or "pp=1")
        chosen = given_layout if world is None else filling(given_layout, world)
        found, foretold = rehearse_config(
            model_config,
            layout=chosen,
            rank=rank,
            batch_size=batch_size,
            sequence_length=sequence_length,
            device=where,
            cluster=_cluster(cluster, chosen.world_size),
        )
    print(json.dumps(record(found, foretold), indent=2) if as_json else words(found, foretold))


def _device(named: str | None) -> str | None:
    """A device of torch; None: fake tensors."""
    if named not in (None, "fake", "cuda"):
        raise ConfigError(f"a rank is rehearsed on cuda or on fake tensors, but got --device {named}; use one of them")
    if named == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda needs a GPU, and torch sees none here; use --device fake")
    return "cuda" if named == "cuda" or (named is None and torch.cuda.is_available()) else None


def _scaled(run: Run, world: int | None) -> Run:
    """With the replicas that fill the world, and a batch that grows with them."""
    if world is None:
        return run
    layout = filling(run.layout, world)
    batch = run.training.global_batch * layout.dp // run.layout.dp
    layout = dataclasses.replace(layout, micro_batches=run.num_micro_batches)
    training = run.training.model_copy(update={"global_batch": batch})
    return run.model_copy(update={"layout": layout, "training": training})


def _cluster(named: str | None, ranks: int) -> Cluster | None:
    return None if named is None else of_devices(load_cluster(named, ranks=ranks), ranks)
