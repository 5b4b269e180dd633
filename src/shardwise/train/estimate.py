"""The estimate that a run stores at its start: the model traced as its ranks will run it, priced on the run's cluster.

Made on rank 0, beside the plan, of the same trace. Never makes a run fail: what cannot be estimated is told in one
line. Refuses to know how a price is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn as nn

from shardwise.describe.catalogue import find_device, load_cluster, named_cluster
from shardwise.describe.cluster import Cluster
from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.profile import ModelProfile
from shardwise.describe.tensor import SequenceParallel, TensorPlan
from shardwise.errors import BatchError
from shardwise.execute.batches import batch_size
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import SEARCHED, Layout
from shardwise.parallel.precision.numerics import Numerics
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.estimate import OPTIMIZER_STATES
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.partition import place
from shardwise.plan.resize import of_devices
from shardwise.plan.run_estimate import Predictor, RunEstimate, estimate_file
from shardwise.plan.step_traffic import SummedParameter, traffic_of_step
from shardwise.trace.objective import LossFunction
from shardwise.train.balance import profile_for
from shardwise.train.model import Values
from shardwise.train.run_file import Run

__all__ = [
    "ProfilesOfRun",
    "cluster_of",
    "estimate_of",
    "job_of",
    "profiles_for",
    "store_estimate",
    "summed_parameters",
]


class ProfilesOfRun(TracedProfiles):
    """Profiles of a run's model, with the divisions that the run has proven already."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        *,
        loss: LossFunction | None,
        tensor: TensorPlan | None = None,
        experts: ExpertPlan | None = None,
        context: ContextPlan | None = None,
    ) -> None:
        super().__init__(model, inputs, loss=loss, proof_batch=inputs)
        self.samples = batch_size(inputs, None)
        self._known = tensor, experts, context

    def tensor_plan(self, tp: int, sequence: SequenceParallel) -> TensorPlan:
        return self._known[0] or super().tensor_plan(tp, sequence)

    def expert_plan(self, ep: int) -> ExpertPlan:
        return self._known[1] or super().expert_plan(ep)

    def context_plan(self, layout: Layout) -> ContextPlan:
        return self._known[2] or super().context_plan(layout)


def profiles_for(
    run: Run,
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    *,
    loss: LossFunction | None,
    values: Values | None,
    device: torch.device,
    tensor: TensorPlan | None,
    experts: ExpertPlan | None,
    context: ContextPlan | None,
) -> tuple[ModelProfile, ProfilesOfRun | None]:
    """What the plan is made of, and what the estimate is: one trace for both, where the plan counts in the dtypes that
    are computed in. None where samples of a batch cannot be told apart. Raises what `balance.profile_for` raises."""
    profiles: ProfilesOfRun | None = None
    with contextlib.suppress(BatchError):
        profiles = ProfilesOfRun(model, inputs, loss=loss, tensor=tensor, experts=experts, context=context)
    if profiles is not None and run.balance != "measured" and not run.techniques.precision.is_narrow:
        return profiles.whole(profiles.samples), profiles
    return profile_for(run, model, inputs, loss=loss, values=values, device=device), profiles


def store_estimate(run: Run, model: nn.Module, layout: Layout, profiles: ProfilesOfRun | None) -> str:
    """Write RUN_FOLDER/estimate.json, and say in one line what it says, or why there is none. Raises nothing."""
    try:
        estimate_file(run.folder).unlink(missing_ok=True)
        if profiles is None:
            return "no estimate of this run: samples of its batches cannot be told apart"
        made = estimate_of(run, model, layout, profiles)
        made.write(run.folder)
    except Exception as error:  # whatever it is: training needs no estimate
        return f"no estimate of this run: {type(error).__name__}: {' '.join(str(error).split())}"
    return "; ".join([str(made), *made.notes])


def estimate_of(run: Run, model: nn.Module, layout: Layout, profiles: ProfilesOfRun) -> RunEstimate:
    """What a step of the run will take and hold. `layout` is the run's, with stages as they were found.

    Raises what tracing and prices raise.
    """
    layout = _with_schedule(run, layout)
    count = run.num_micro_batches
    with _traced(run, model):
        works = profiles.works(layout, profiles.samples, num_micro_batches=count)
        whole, rank = profiles.whole(profiles.samples), profiles.shard(layout, profiles.samples)
    cluster, source = cluster_of(run, layout.world_size)
    if cluster.is_uniform:  # all wait for who has most; else shares are by speed
        count = run.most_micro_batches
    job = job_of(run, rank)
    predict = Predictor(works, layout, job, count, cluster)
    predicted = predict(cluster)
    cut = cut_stages(whole.flow, place(whole, layout), layout.num_stages)
    experts = frozenset(profiles.expert_plan(layout.ep).slices()) if layout.ep > 1 else frozenset()
    tensor = profiles.tensor_plan(layout.tp, layout.sequence_parallel) if layout.tp > 1 else None
    return RunEstimate(
        layout=layout.to_dict(),
        num_micro_batches=count,
        job=job,
        cluster=cluster,
        source=source,
        works=works,
        traffic=traffic_of_step(
            works,
            predicted.stages,
            summed_parameters(rank, cut, tensor, experts),
            layout,
            job,
            num_micro_batches=count,
            mapped=_maps(run, cluster),
        ),
        predicted=predicted,
        notes=tuple(f"{what} counted by shares ({why})" for what, why in profiles.reasons.items()),
    )


def cluster_of(run: Run, ranks: int) -> tuple[Cluster, str]:
    """What the run is priced for, and in words where that is from: its `cluster`, cluster.toml of its folder, the GPU
    as it is sold, or the typical cores of a server."""
    written = Path(run.folder) / "cluster.toml"
    if run.cluster or written.is_file():
        named = run.cluster or str(written)
        cluster = load_cluster(named, ranks=ranks)
        return of_devices(cluster, ranks), f"the cluster {named}"
    if run.device == "cuda":
        name = find_device(torch.cuda.get_device_name()).device.name
        here = min(ranks, torch.cuda.device_count())
        text = f"{name}x{here}" if ranks <= here else f"{name}x{here}x{-(-ranks // here)}"
        return of_devices(named_cluster(text), ranks), f"{name} as its maker promises it, not measured"
    return Cluster.local(ranks), "typical cores, not measured (shardwise probe --out FILE, cluster = FILE)"


def job_of(run: Run, profile: ModelProfile) -> Job:
    """How the run's steps keep and send numbers. `profile` says how wide parameters are."""
    held = [parameter for parameter in profile.parameters.values() if parameter.trainable]
    elements = sum(parameter.num_elements for parameter in held)
    wide = round(sum(parameter.nbytes for parameter in held) / elements) if elements else 4
    narrow = run.techniques.precision.is_narrow
    states = 4 if narrow else wide
    # 16-bit products cannot write into the buckets of float32 sums: what is summed up stands beside them
    beside = narrow and run.layout.num_replicas > 1 and run.layout.fsdp == 1 and run.num_micro_batches > 1
    return Job(
        global_batch=run.training.global_batch,
        per_parameter=PerParameter(
            parameter=2 if narrow else wide,
            gradient=states,
            master=states if narrow else 0,
            optimizer=states * OPTIMIZER_STATES[run.training.optimizer],
            wire=states if beside else 0,
        ),
        reduce_bytes=states if run.techniques.precision.reduce == "float32" else 2,
        gradients_stay=run.layout.num_replicas * run.layout.cp > 1,  # in buckets that are used again
    )


def _maps(run: Run, cluster: Cluster) -> bool:
    """Whether all ranks are processes of one host, which exchange by its memory."""
    one_host = sum(hosts.count for hosts in cluster.hosts) == 1
    return run.device == "cpu" and one_host and run.techniques.communication.algorithm == "auto"


def _with_schedule(run: Run, layout: Layout) -> Layout:
    """One that was searched stands in the run's folder."""
    if layout.schedule != SEARCHED:
        return layout
    return dataclasses.replace(layout, schedule=str(Path(run.folder) / "schedule.json"))


@contextlib.contextmanager
def _traced(run: Run, model: nn.Module) -> Iterator[None]:
    """The model in the dtypes that it will compute in."""
    numerics = Numerics(model, run.techniques.precision)
    try:
        with numerics.traced():
            yield
    finally:
        numerics.close()


def summed_parameters(
    profile: ModelProfile, cut: Cut, tensor: TensorPlan | None, experts: frozenset[str]
) -> tuple[SummedParameter, ...]:
    """What is trained, with the stages that read it."""
    holders: dict[str, list[int]] = {}
    for stage in cut.stages:
        for name in stage.parameters:
            holders.setdefault(name, []).append(stage.stage)
    return tuple(
        SummedParameter(
            parameter.num_elements,
            holders.get(name, [0]),
            partial=tensor is not None and tensor.is_partial(name),
            expert=name in experts,
        )
        for name, parameter in profile.parameters.items()
        if parameter.trainable
    )
