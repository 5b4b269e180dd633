"""`shardwise plan`: the plan of a run or of a bare model config, in words. Traces in this process; starts nothing."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Annotated

import typer

from shardwise.cli.calibrate import calibrate_runs
from shardwise.cli.options import Overrides
from shardwise.cli.plan_search import Asked, assess, searched, swept
from shardwise.cli.plan_traced import Traced, job_of, traced_model
from shardwise.cli.planned_run import write_planned
from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError
from shardwise.execute.contexts import context_plan
from shardwise.layout import Layout, Precision
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.plan.job import Job as PriceJob
from shardwise.plan.ranked import Objective
from shardwise.plan.sources import check_source
from shardwise.quantities import format_bytes, format_count, format_seconds, parse_flops
from shardwise.trace.model_config import empty_model, read_config, synthetic_batch
from shardwise.trace.profile import trace
from shardwise.train.asynchronous.note import workers_note
from shardwise.train.auto_layout import AUTO, is_auto, run_on_one_device
from shardwise.train.balance import layout_for, profile_for, with_threads
from shardwise.train.build import build_model, build_task, first_micro_batch
from shardwise.train.plan import (
    context_note,
    experts_note,
    plan_of_profile,
    schedule_for,
    statistics_note,
    threads_of_rank,
)
from shardwise.train.run import prepare
from shardwise.train.run_file import load_run

__all__ = ["command"]

_KIB = 1024
_PROOF_TOKENS = 64  # of a sample, with which divisions of a bare config are proven


def command(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN.toml]", help="The run; examples/demo.toml is one to copy.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="LAYOUT", help="Instead of the run's; pp=1 with --model-config.")
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Plan this transformers config, without a run.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --model-config: samples of a micro-batch.")
    ] = 1,
    sequence_length: Annotated[
        int, typer.Option(metavar="N", min=1, help="With --model-config: tokens of a sample.")
    ] = 128,
    flops: Annotated[
        str | None,
        typer.Option(
            metavar="RATE", help="What a rank computes in a second, such as 400T; measured here if not given."
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="Search, or price, on this machine: h100x8x4, local2, or the path of a cluster.toml.",
        ),
    ] = None,
    objective: Annotated[
        str, typer.Option(metavar="WHAT", help="With --cluster: time, cost, memory, pareto or pareto-cost.")
    ] = "time",
    top: Annotated[int, typer.Option(metavar="N", min=1, help="With --cluster: layouts that are shown.")] = 5,
    sweep: Annotated[
        str | None, typer.Option(metavar="devices=A..B", help="With --cluster: strong and weak scaling.")
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --cluster and --model-config: samples of a step.")
    ] = None,
    svg: Annotated[
        str | None, typer.Option(metavar="FILE", help="With --cluster: the step, or the sweep, as a picture.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --cluster: one JSON line.")] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN_FOLDER",
            help="Fit --cluster, or the run's own, to what a run has measured; several times: to all of these.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="With --cluster: where to write the run with its best layout; with --calibrate: the cluster.",
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Show how a model is split: what every stage runs, holds and sends, and the schedule drawn.

    Starts no process and allocates nothing of the model: 671 B parameters take
    seconds. How shards (tp) divide units is found and proven on random numbers,
    block by block; a block that is too large for that in a narrow instance of
    the same classes, and the plan says so.

    shardwise plan run.toml
    shardwise plan run.toml --layout pp=4,schedule=gpipe
    shardwise plan run.toml --set balance=measured
    shardwise plan --model-config config.json --layout tp=8,pp=16 --flops 400T
    shardwise plan run.toml --cluster h100x8x4
    shardwise plan run.toml --cluster cluster.toml --out planned.toml
    shardwise plan run.toml --cluster h100x8x4 --layout tp=8,dp=4
    shardwise plan run.toml --cluster h100x8x128 --sweep devices=8..1024
    shardwise plan --calibrate runs/demo --out cluster.toml

    With --cluster, seconds and bytes are those of that machine: without --layout
    (or where the run says layout = "auto") all layouts of its devices are
    searched, with it one is priced; what one change would buy is told.

    A layout is name=value with commas:
      dp, pp, tp      replicas, stages of the pipeline, shards of every unit;
                      1 if not given
      ep              ranks that divide the experts of a model among them, each
                      with its own share of the batch, dp times over
      recompute       none, full, selective, or the bytes that a rank may keep
                      of activations, such as 4GiB; units are chosen for it
      offload         activations, optimizer or both: wait in the host's memory
      micro_batches   of a replica and step; 2 x pp if not given
      schedule        naive, gpipe, 1f1b, interleaved, looped-bfs, zb-h1,
                      zb-h2, zb-v, zb-v-half, zb-v-min, dualpipe-v,
                      pipedream-2bw (no flush); searched: found for this
                      model; or a file (.json, torch's .csv)
      chunks          stages a rank, where the schedule can have several
      stages          cost, parameters, depth, or listed by hand as
                      \\[embed+layers.0|layers.1-3+head]

    The predicted step is forwards and backwards at a rate that is printed;
    what is left out is printed too.
    """
    if calibrate:
        print(calibrate_runs(calibrate, cluster=cluster, out=out))
        return
    if (run is None) == (model_config is None):
        given = "neither" if run is None else "both"
        raise ConfigError(
            f"a plan is made of a run file or of --model-config FILE.json, but {given} of them is given; give one"
        )
    if model_config is not None and overrides:
        raise ConfigError(
            f"--set sets values of a run file, and --model-config has none, but got --set {overrides[0]}; change the "
            "config file, or use a run file"
        )
    rate = None if flops is None else _rate(flops)
    if (
        run is not None
        and cluster is None
        and is_auto(run, [*(overrides or ()), *([f"layout={layout}"] if layout else ())])
    ):
        cluster = f"local{os.cpu_count() or 1}"
    extra = {"--sweep": sweep, "--svg": svg, "--json": as_json, "--global-batch": global_batch}
    if out is not None and (cluster is None or run is None or sweep is not None):
        raise ConfigError(
            "--out is where --calibrate writes a cluster, and --cluster a run file with its best layout, but there is "
            "neither --calibrate RUN_FOLDER nor a run file with --cluster; add one, without --sweep"
        )
    if cluster is None and any(extra.values()):
        given = next(name for name, value in extra.items() if value)
        raise ConfigError(f"{given} is for a plan on a cluster, but no --cluster is given; add --cluster local2, say")
    if cluster is not None:
        asked = Asked(objective=_objective(objective), top=top, as_json=as_json, svg=svg or "")
        explicit = None if layout in (None, AUTO) else Layout.parse(str(layout))
        machine = load_cluster(cluster, ranks=None if explicit is None else explicit.world_size)
        if model_config is not None:
            own = None if layout is None else Layout.parse(layout)
            batch = global_batch or batch_size * machine.num_devices
            _on_cluster_config(model_config, own, batch_size, sequence_length, machine, batch, asked, sweep)
        elif run is not None:
            chosen = _on_cluster_run(run, overrides or [], layout, machine, asked, sweep)
            if out is not None and chosen is not None:
                write_planned(out, run=run, layout=chosen, cluster=cluster)
                if not as_json:
                    sets = "".join(f' --set "{text}"' for text in overrides or () if not text.startswith("layout"))
                    print(f"written to    {out}; run it with   shardwise train {out}{sets}")
        return
    if model_config is not None:
        _plan_config(model_config, Layout.parse(layout or "pp=1"), batch_size, sequence_length, rate)
    elif run is not None:
        _plan_run(run, [*(overrides or ()), *([f"layout={layout}"] if layout else ())], rate)


def _objective(text: str) -> Objective:
    try:
        return Objective(text)
    except ValueError:
        raise ConfigError(f'--objective is {", ".join(Objective)}, but got "{text}"; use one of these') from None


def _on_cluster_run(
    path: str, overrides: list[str], layout: str | None, machine: Cluster, asked: Asked, sweep: str | None
) -> Layout | None:
    written = run_on_one_device(path, overrides)
    wanted = None if layout in (None, AUTO) else Layout.parse(str(layout))
    described = written.model_copy(update={"checkpoint": written.checkpoint.model_copy(update={"every": 0})})
    job = prepare(described)
    task = build_task(job)
    model, _ = build_model(job)
    inputs = first_micro_batch(described, task)
    samples = described.training.global_batch // described.num_micro_batches
    traced = traced_model(model, inputs, samples=samples, cluster=machine, loss=task.loss, tp_plan=described.tp_plan)
    training = described.training
    priced = job_of(training.global_batch, precision=described.techniques.precision, optimizer=training.optimizer)
    return _on_cluster(traced, machine, priced, wanted, asked, sweep)


def _on_cluster_config(
    path: str,
    layout: Layout | None,
    batch_size: int,
    sequence_length: int,
    machine: Cluster,
    global_batch: int,
    asked: Asked,
    sweep: str | None,
) -> None:
    model = empty_model(read_config(path))
    batch = synthetic_batch(model, batch_size=batch_size, sequence_length=sequence_length)
    small = synthetic_batch(model, batch_size=2, sequence_length=min(sequence_length, _PROOF_TOKENS))
    traced = traced_model(model, batch, samples=batch_size, cluster=machine, proof_batch=small)
    priced = job_of(global_batch, precision=Precision(compute="bfloat16"), optimizer="adamw")
    _on_cluster(traced, machine, priced, layout, asked, sweep)


def _on_cluster(
    traced: Traced, machine: Cluster, job: PriceJob, layout: Layout | None, asked: Asked, sweep: str | None
) -> Layout | None:
    """The layout that was chosen, or priced."""
    chosen: Layout | None = None
    if sweep is not None:
        swept(traced.works, traced.limits, machine, job, sweep, asked)
    elif layout is None:
        chosen = searched(traced.works, traced.limits, machine, job, asked)
    else:
        chosen = assess(traced.works, traced.limits, machine, job, layout, asked)
    if not asked.as_json:
        for axes, why in traced.profiles.reasons.items():
            print(f"note          {axes}: not traced, by shares of the whole model: {why}")
    return chosen


def _rate(text: str) -> float:
    try:
        return parse_flops(text)
    except ConfigError as error:
        raise ConfigError(f"--flops: {error}") from error


def _plan_run(path: str, overrides: list[str], rate: float | None) -> None:
    described = load_run(path, overrides)
    job = prepare(described.model_copy(update={"checkpoint": described.checkpoint.model_copy(update={"every": 0})}))
    task = build_task(job)
    model, values = build_model(job)
    inputs = first_micro_batch(described, task)
    with with_threads(threads_of_rank(described.layout.world_size)):
        profile = profile_for(described, model, inputs, loss=task.loss, values=values)
    layout = layout_for(described, profile)
    sequence = layout.sequence_parallel
    tensor = None
    if layout.tp > 1:
        told = described.tp_plan
        tensor = plan_tensor(model, inputs, tp=layout.tp, loss=task.loss, sequence=sequence, tp_plan=told)
    micro_batches = described.most_micro_batches
    experts = plan_experts(model, inputs, ep=layout.ep, loss=task.loss) if layout.ep > 1 else None
    context = context_plan(model, inputs, layout=layout, loss=task.loss) if layout.cp > 1 else None
    found = schedule_for(
        profile,
        layout=layout,
        num_micro_batches=micro_batches,
        flops_per_s=rate,
        tensor=tensor,
        experts=experts,
        context=context,
    )
    plan = plan_of_profile(
        profile,
        layout=layout,
        num_micro_batches=micro_batches,
        flops_per_s=rate,
        tensor=tensor,
        experts=experts,
        context=context,
        found=found,
    )
    notes = experts_note(experts) + context_note(context) + statistics_note(model, layout)
    print(plan + notes + workers_note(described, model))


def _plan_config(path: str, layout: Layout, batch_size: int, sequence_length: int, rate: float | None) -> None:
    if layout.ep > 1:
        raise ConfigError(
            f"experts are found and proven with a batch, so a bare config is planned for ep=1, but the layout has "
            f"ep={layout.ep}; use a run file"
        )
    start = time.perf_counter()
    model = empty_model(read_config(path))
    batch = synthetic_batch(model, batch_size=batch_size, sequence_length=sequence_length)
    profile = trace(model, batch)
    traced_s = time.perf_counter() - start
    tensor = plan_tensor(model, batch, tp=layout.tp, sequence=layout.sequence_parallel) if layout.tp > 1 else None
    proven_s = time.perf_counter() - start - traced_s
    micro_batches = layout.micro_batches or (1 if layout.pp == 1 else 2 * layout.pp)
    check_source(layout, micro_batches)
    context = context_plan(model, batch, layout=layout, loss=None) if layout.cp > 1 else None
    found = schedule_for(
        profile, layout=layout, num_micro_batches=micro_batches, flops_per_s=rate, tensor=tensor, context=context
    )
    told = plan_of_profile(
        profile,
        layout=layout,
        num_micro_batches=micro_batches,
        flops_per_s=rate,
        tensor=tensor,
        context=context,
        found=found,
    )
    print(told + context_note(context))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    count = format_count(profile.num_parameters, "parameters")
    proven = "" if tensor is None else f", how shards divide them found and proven in {format_seconds(proven_s)}"
    print(f"traced {count} in {format_seconds(traced_s)}{proven}; this process held {format_bytes(peak)} at most")
