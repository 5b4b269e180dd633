"""The layouts that a search finds for a run on its machine, the best first, and what is kept of them beside the run.

Knows runs, clusters and searches; starts no rank.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.catalogue import find_device, load_cluster, named_cluster
from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError, LayoutError, ShardwiseError
from shardwise.execute.batches import batch_size
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import Layout, Precision
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.plan.ranked import Ranked
from shardwise.plan.resize import of_devices
from shardwise.plan.search import Search, search_layouts
from shardwise.quantities import format_bytes, format_seconds
from shardwise.trace.objective import LossFunction
from shardwise.train.auto_layout import Written, run_with_layout
from shardwise.train.materials import build_model, build_task, first_micro_batch
from shardwise.train.run_file import Run
from shardwise.train.traced_model import job_of, traced_model
from shardwise.train.world import Candidate, Job

__all__ = ["Choice", "best_layout", "choose", "machine_of", "read_choice"]

_TOP = 40  # of a ranking, among which are several layouts of every mesh
_FILE, _TEXT = "layout.json", "plan.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What was found. candidates: the best first, and behind it those that the run is to measure; told: in some lines;
    explained: the whole of it; kept: what a run stayed with, which has measured them."""

    candidates: tuple[Candidate, ...]
    told: str
    explained: str = ""
    kept: Layout | None = None

    @property
    def layout(self) -> Layout:
        return self.candidates[0].layout if self.kept is None else self.kept

    def write(self, folder: str | Path) -> None:
        """Into the folder of the run: layout.json for who resumes it, plan.txt for people."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        plain = {
            "layout": self.layout.to_dict(),
            "measured": self.kept is not None,
            "told": self.told,
            "candidates": [
                {"layout": c.layout.to_dict(), "predicted_s": c.predicted_s, "peak_bytes": list(c.peak_bytes)}
                for c in self.candidates
            ],
        }
        (folder / _FILE).write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
        if self.explained:
            (folder / _TEXT).write_text(f"{self.told}\n\n{self.explained}\n", encoding="utf-8")


def read_choice(folder: str | Path) -> Choice | None:
    """What was found for the run of a folder; None where nothing is kept. Raises ConfigError for another version's."""
    path = Path(folder) / _FILE
    if not path.is_file():
        return None
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        candidates = tuple(
            Candidate(
                layout=Layout.from_dict(each["layout"]),
                predicted_s=float(each["predicted_s"]),
                peak_bytes=tuple(map(float, each["peak_bytes"])),
            )
            for each in plain["candidates"]
        )
        kept = Layout.from_dict(plain["layout"]) if plain["measured"] else None
        return Choice(candidates=candidates, told=str(plain["told"]), kept=kept)
    except (ValueError, KeyError, TypeError, RecursionError, ShardwiseError) as error:
        raise ConfigError(
            f"{path} is what a search has found, but {type(error).__name__}: {error}; search again with --search"
        ) from error


def choose(job: Job, written: Written, overrides: Sequence[str] = (), *, ranks: int | None = None) -> Choice:
    """Search all layouts of the run's machine: `run.cluster`, FOLDER/cluster.toml, or what this host has; `ranks` of it
    where these have been started already. `job` is of `run_on_one_device`.

    Raises LayoutError where no layout fits, or the run can have none of the best.
    """
    run = job.run
    cluster, source = machine_of(run, ranks)
    task = build_task(job)
    model, _ = build_model(job)
    inputs = first_micro_batch(run, task)
    training = run.training
    traced = traced_model(
        model,
        inputs,
        samples=training.global_batch // run.num_micro_batches,
        cluster=cluster,
        loss=task.loss,
        tp_plan=run.tp_plan,
    )
    priced = job_of(training.global_batch, precision=run.techniques.precision, optimizer=training.optimizer)
    found = search_layouts(traced.works, cluster, priced, limits=traced.limits, top=_TOP)
    chosen = _candidates(found.ranking, written, overrides, run)
    return Choice(
        candidates=tuple(_candidate(ranked, traced.profiles) for ranked in chosen),
        told=_told(found, chosen, cluster, source, measures=min(run.auto.measure, len(chosen)), steps=run.auto.steps),
        explained=found[found.ranking.index(chosen[0])].explain(),
    )


def best_layout(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    loss: LossFunction | None = None,
    cluster: Cluster | None = None,
    optimizer: str = "adamw",
    precision: Precision | None = None,
    tp_plan: GivenPlan | None = None,
) -> Layout:
    """The layout that a search finds for steps of `batch` on a cluster, or on the processors of this machine. Raises
    LayoutError where none fits, ModelError."""
    machine = cluster or Cluster.local(len(os.sched_getaffinity(0)))
    size = batch_size(batch, None)
    traced = traced_model(model, batch, samples=size, cluster=machine, loss=loss, tp_plan=tp_plan)
    priced = job_of(size, precision=precision or Precision(), optimizer=optimizer)
    return search_layouts(traced.works, machine, priced, limits=traced.limits, top=1)[0].layout


def machine_of(run: Run, ranks: int | None) -> tuple[Cluster, str]:
    """What a run's layout is searched for, and where that is from, in words."""
    beside = Path(run.folder) / "cluster.toml"
    named = run.cluster or (str(beside) if beside.is_file() else "")
    if named:
        cluster = load_cluster(named, ranks=ranks or _own_devices(run))
        return (cluster if ranks is None else of_devices(cluster, ranks)), f"the cluster {named}"
    count = ranks or _own_devices(run)
    if run.device == "cuda":
        name = find_device(torch.cuda.get_device_name()).device.name
        return of_devices(named_cluster(f"{name}x{min(count, _own_devices(run))}"), count), f"{name} as it is sold"
    return Cluster.local(count), "typical cores, not measured (shardwise probe --out FILE, cluster = FILE)"


def _own_devices(run: Run) -> int:
    return torch.cuda.device_count() if run.device == "cuda" else len(os.sched_getaffinity(0))


def _candidate(ranked: Ranked, profiles: TracedProfiles) -> Candidate:
    """With the divisions that the search has proven."""
    layout = ranked.layout
    return Candidate(
        layout=layout,
        predicted_s=ranked.price.step_s,
        peak_bytes=tuple(lines.total for lines in ranked.price.memory),
        tensor=profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None,
        experts=profiles.expert_plan(layout.ep) if layout.ep > 1 else None,
    )


def _candidates(ranking: Sequence[Ranked], written: Written, overrides: Sequence[str], run: Run) -> tuple[Ranked, ...]:
    """The best, and the best of other meshes that are predicted near it: neighbours of one mesh err alike. Where few
    are, also those that divide the states of replicas in another way."""
    allowed: list[Ranked] = []
    refused: list[str] = []
    for ranked in ranking:
        if allowed and ranked.price.step_s > (1 + run.auto.within) * allowed[0].price.step_s:
            continue
        why = _refusal(written, overrides, ranked.layout)
        if why:
            refused.append(f"{ranked.layout}: {why}")
        else:
            allowed.append(ranked)
        if run.auto.measure < 2 and allowed:
            break
    if not allowed:
        raise LayoutError(f"none of the {len(ranking)} best layouts is one that this run can have; {refused[0]}")
    places: list[int] = []
    for key in (_axes, _mesh):
        known = {key(allowed[place].layout) for place in places}
        for place, ranked in enumerate(allowed):
            if len(places) < max(1, run.auto.measure) and key(ranked.layout) not in known:
                known.add(key(ranked.layout))
                places.append(place)
    return tuple(allowed[place] for place in sorted(places))


def _axes(layout: Layout) -> tuple[int, ...]:
    return layout.num_replicas // layout.ep, layout.ep, layout.cp, layout.tp, layout.pp


def _mesh(layout: Layout) -> tuple[int, ...]:
    return *_axes(layout), layout.fsdp, layout.zero if layout.fsdp > 1 else 0


def _refusal(written: Written, overrides: Sequence[str], layout: Layout) -> str:
    """Why the run cannot have a layout; "" where it can."""
    try:
        run = run_with_layout(written, overrides, layout)
    except ShardwiseError as error:
        return str(error)
    if layout.offloads_optimizer and run.training.optimizer not in ("adamw", "sgd"):
        return f"optimizer={run.training.optimizer} does not wait on the host"
    if layout.tp > 1 and run.techniques.precision.compute == "float8":
        return "float8 layers are whole"
    return ""


def _told(found: Search, chosen: Sequence[Ranked], cluster: Cluster, source: str, *, measures: int, steps: int) -> str:
    best = chosen[0]
    first = (
        f"layout: {best.layout}, of {found.num_layouts} layouts for {cluster.num_devices} ranks; predicted "
        f"{format_seconds(best.price.step_s)} a step, {format_bytes(best.peak_bytes)} on the fullest rank, for {source}"
    )
    meshes: dict[tuple[int, ...], Ranked] = {}
    for ranked in found.ranking:
        meshes.setdefault(_mesh(ranked.layout), ranked)
    others = [ranked for mesh, ranked in meshes.items() if mesh != _mesh(best.layout)][:3]
    behind = [f"{ranked.layout} {ranked.price.step_s / best.price.step_s - 1:+.0%}" for ranked in others]
    refused = [f"{rule} ({count})" for rule, count, _ in found.rejected[:2]]
    why = "; ".join(
        [
            *(["behind it: " + ", ".join(behind)] if behind else []),
            *(["others: " + ", ".join(refused)] if refused else []),
        ]
    )
    lines = [first, *([f"  {why}"] if behind or refused else [])]
    if measures > 1:
        names = ", ".join(str(ranked.layout) for ranked in chosen)
        lines.append(f"  measured on the way, {steps} steps each: {names}")
    return "\n".join(lines)
