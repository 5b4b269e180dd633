"""From a run file, or a bare model config, to the rehearsal of one of its ranks and what is predicted of it.

The layout is the one that is given, with as many replicas as fill the world; every replica has its share of a batch
that grows with them. Knows runs, tasks and configs; prints nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError, LayoutError
from shardwise.execute.batches import MicroBatch, batch_size, split
from shardwise.execute.program import Program
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.execute.weights import weigher
from shardwise.layout import Layout
from shardwise.parallel.precision.numerics import Numerics
from shardwise.plan.estimate import OPTIMIZER_STATES
from shardwise.plan.job import Job, PerParameter
from shardwise.tasks import indices_at
from shardwise.trace.model_config import empty_model, read_config, synthetic_batch
from shardwise.train.build import build_model, build_task, first_micro_batch
from shardwise.train.estimate import job_of
from shardwise.train.optimizer import optimizer_for, optimizer_of
from shardwise.train.run import prepare
from shardwise.train.run_file import Run
from shardwise.train.shares import share
from shardwise.verify.rehearse import Rehearsed, rehearse
from shardwise.verify.rehearse_predicted import Foretold, foretell

__all__ = ["filling", "rehearse_config", "rehearse_run"]


def filling(layout: Layout, world: int) -> Layout:
    """`layout` with as many replicas (dp) as it takes for `world` ranks. Raises `LayoutError` where none does."""
    one = layout.world_size // layout.dp
    if world % one:
        raise LayoutError(
            f"replicas of {one} ranks fill a world of a multiple of {one}, but got {world} for {layout}; use "
            f"{max(1, world // one) * one}"
        )
    return dataclasses.replace(layout, dp=world // one)


def rehearse_run(
    run: Run, *, rank: int, device: str | None, cluster: Cluster | None = None
) -> tuple[Rehearsed, Foretold]:
    """Rank `rank` of a run. device: None: fake tensors. Raises what a wrong run raises."""
    if run.asynchronous is not None:
        raise ConfigError("workers that train by themselves are rehearsed one at a time; leave [asynchronous] out")
    run = run.model_copy(
        update={
            "device": "cpu" if device is None else "cuda",
            "checkpoint": run.checkpoint.model_copy(update={"every": 0}),
        }
    )
    job = prepare(run)
    layout, task, training = run.seeded_layout, build_task(job), run.training
    model, _ = build_model(job)
    inputs = first_micro_batch(run, task)
    indices = indices_at(task, seed=training.seed, step=0, global_batch=training.global_batch)

    def micro_batches(replica: int) -> Sequence[MicroBatch]:
        return share(
            task,
            indices,
            replica=replica,
            replicas=layout.num_replicas,
            num_micro_batches=run.num_micro_batches,
            shares=layout.shares,
            device=device or "cpu",
        )

    def optimizer(program: Program) -> torch.optim.Optimizer | None:
        return optimizer_for(program, training, on_host=layout.offloads_optimizer)

    numerics = Numerics(model, run.techniques.precision)
    try:
        with numerics.traced():  # as it is computed with
            profiles = TracedProfiles(model, inputs, loss=task.loss, proof_batch=inputs)
            samples = batch_size(inputs)
            foretold = foretell(
                profiles,
                layout,
                job_of(run, profiles.shard(layout, samples)),
                rank=rank,
                samples=samples,
                num_micro_batches=run.most_micro_batches,
                cluster=cluster,
            )
    finally:
        numerics.close()
    found = rehearse(
        model,
        micro_batches,
        layout=layout,
        rank=rank,
        profiles=profiles,
        optimizer=optimizer,
        loss=task.loss,
        techniques=dataclasses.replace(run.techniques, compile=""),
        device=device,
    )
    return found, foretold


def rehearse_config(
    config: Any,
    *,
    layout: Layout,
    rank: int,
    batch_size: int = 1,
    sequence_length: int = 128,
    device: str | None,
    cluster: Cluster | None = None,
) -> tuple[Rehearsed, Foretold]:
    """Rank `rank` of a transformers config (a path, a mapping, a config), trained with AdamW in the config's dtype.

    batch_size: samples of a micro-batch, as `shardwise plan --model-config` has it. Raises ConfigError, LayoutError.
    """
    model = empty_model(read_config(config))
    count = layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp)
    inputs = synthetic_batch(model, batch_size=batch_size, sequence_length=sequence_length)
    profiles = TracedProfiles(model, inputs)
    foretold = foretell(
        profiles,
        layout,
        _job(model, layout, batch_size * count * layout.num_replicas),
        rank=rank,
        samples=batch_size,
        num_micro_batches=count,
        cluster=cluster,
    )
    replica: Mapping[str, torch.Tensor] = synthetic_batch(
        model, batch_size=batch_size * count, sequence_length=sequence_length
    )
    own = {name: tensor.to(device or "cpu") for name, tensor in replica.items()}
    weights = weigher(model)
    found = rehearse(
        model,
        lambda _: split(own, micro_batches=count, replicas=1, weights=weights)[0],  # replicas are alike
        layout=layout,
        rank=rank,
        profiles=profiles,
        optimizer=optimizer_of,
        device=device,
    )
    return found, foretold


def _job(model: nn.Module, layout: Layout, global_batch: int) -> Job:
    """Parameters, gradients and AdamW's moments in the model's dtype."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wide = max((parameter.element_size() for parameter in trained), default=4)
    return Job(
        global_batch=global_batch,
        per_parameter=PerParameter(parameter=wide, gradient=wide, optimizer=wide * OPTIMIZER_STATES["adamw"]),
        reduce_bytes=wide,
        gradients_stay=layout.num_replicas * layout.cp > 1,
    )
