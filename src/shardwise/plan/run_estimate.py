"""A run's step as it was predicted at its start: everything that a report compares, and all that it was made from.

    works, layout, job ── cluster ──► Predicted     again for another cluster, without the model

Kept in RUN_FOLDER/estimate.json. Made by `price` and the functions that it uses; refuses to know models and events.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError, ShardwiseError
from shardwise.files import read_text
from shardwise.layout import Layout
from shardwise.plan.collectives import send_seconds
from shardwise.plan.job import Job
from shardwise.plan.lines import MemoryLines, TimeLines
from shardwise.plan.placing import send_level
from shardwise.plan.plain import from_plain, to_plain
from shardwise.plan.price import placed_stages, price
from shardwise.plan.sources import source_of
from shardwise.plan.stage_seconds import StageTable, stage_seconds
from shardwise.plan.stage_work import StageWork
from shardwise.plan.steps import times_of, with_sums
from shardwise.quantities import format_bytes, format_seconds
from shardwise.schedule import Kind

__all__ = ["EdgePrediction", "Predicted", "Predictor", "RunEstimate", "estimate_file", "read_estimate"]

KINDS = (Kind.F, Kind.B, Kind.I, Kind.W)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgePrediction:
    """What crosses from a stage to another, of one micro-batch; seconds of one message, 0 on one rank."""

    source: int
    target: int
    forward_bytes: float
    backward_bytes: float
    forward_s: float
    backward_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predicted:
    """A step on one cluster. By place of the pipeline: stages, memory, time; actions[kind][s]: seconds of one action
    on stage s. pipeline_s: from the first forward to the last backward."""

    step_s: float
    pipeline_s: float
    mfu: float
    stages: tuple[tuple[int, ...], ...]
    memory: tuple[MemoryLines, ...]
    time: tuple[TimeLines, ...]
    actions: Mapping[str, tuple[float, ...]]
    edges: tuple[EdgePrediction, ...]
    step_overhead_s: float

    def waiting_s(self, place: int) -> float:
        """Of a step, in which the ranks at a place of the pipeline compute nothing."""
        return self.time[place].bubble + self.time[place].pipeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """layout: as `Layout.to_dict`; source: where the cluster is from, in words; traffic[place]: bytes that a rank there
    sends in a step, by what `comm.traffic` calls them; notes: what is only nearly as it will be."""

    layout: Mapping[str, Any]
    num_micro_batches: int
    job: Job
    cluster: Cluster
    source: str
    works: tuple[StageWork, ...]
    traffic: tuple[Mapping[str, int], ...]
    predicted: Predicted
    notes: tuple[str, ...] = ()

    @property
    def laid_out(self) -> Layout:
        return Layout.from_dict(self.layout)

    def write(self, folder: str | Path) -> Path:
        """Into the folder of the run. Returns the file."""
        path = estimate_file(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_plain(self)) + "\n", encoding="utf-8")
        return path

    def __str__(self) -> str:
        fullest = max(lines.total for lines in self.predicted.memory)
        return (
            f"estimated {format_seconds(self.predicted.step_s)} a step, {format_bytes(fullest)} on the fullest rank, "
            f"for {self.source}"
        )


def estimate_file(folder: str | Path) -> Path:
    """Where a run keeps its estimate."""
    return Path(folder) / "estimate.json"


def read_estimate(folder: str | Path) -> RunEstimate:
    """The estimate of a run's folder. Raises `ConfigError` where there is none, or it is another version's."""
    path = estimate_file(folder)
    text = read_text(
        path, what="the estimate of a run that `shardwise train` started", repair="give the folder of a run"
    )
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is JSON, but {error}; train again") from error
    try:
        found = from_plain(RunEstimate, values)
    except (ShardwiseError, ValueError) as error:
        raise ConfigError(f"{path} is an estimate as this version writes them, but {error}; train again") from error
    assert isinstance(found, RunEstimate)
    return found


class Predictor:
    """Predicts one run's step for any cluster: what does not depend on its coefficients is made once.

    `like` has the hosts and link levels of all clusters that are asked about. exact: by the simulator. Raises what
    `price` raises.
    """

    def __init__(
        self, works: Sequence[StageWork], layout: Layout, job: Job, num_micro_batches: int, like: Cluster
    ) -> None:
        self._works = tuple(works)
        self._layout = layout
        self._job = job
        self._num_micro_batches = num_micro_batches
        placed = placed_stages(self._works, layout, like, job)
        self._table = StageTable.of(placed)
        source = source_of(layout)
        self._stages = tuple((stage,) for stage in range(len(self._works))) if source is None else source.ranks
        self._owner = {stage: place for place, own in enumerate(self._stages) for stage in own}

    @classmethod
    def of(cls, estimate: RunEstimate, like: Cluster | None = None) -> Predictor:
        """Of what a run was estimated from."""
        layout = estimate.laid_out
        return cls(estimate.works, layout, estimate.job, estimate.num_micro_batches, like or estimate.cluster)

    def __call__(self, cluster: Cluster) -> Predicted:
        seconds = stage_seconds(self._table, cluster)
        times = times_of(with_sums(seconds, np.array(self._num_micro_batches)), cluster.overheads)
        made = price(
            self._works,
            self._layout,
            cluster,
            self._job,
            num_micro_batches=self._num_micro_batches,
            exact=True,
            seconds=seconds,
        )
        inputs = np.maximum(0.0, times.backward - times.weight)
        arrays = dict(zip(KINDS, (times.forward, times.backward, inputs, times.weight), strict=True))
        first = made.time[0]
        outside = first.replicas + first.optimizer + cluster.overheads.step_s
        return Predicted(
            step_s=made.step_s,
            pipeline_s=made.step_s - outside,
            mfu=made.mfu,
            stages=self._stages,
            memory=made.memory,
            time=made.time,
            actions={kind.value: tuple(map(float, values)) for kind, values in arrays.items()},
            edges=tuple(self._edges(cluster)),
            step_overhead_s=cluster.overheads.step_s,
        )

    def _edges(self, cluster: Cluster) -> list[EdgePrediction]:
        found: list[EdgePrediction] = []
        for work in self._works:
            for target, nbytes in work.sends.items():
                here, there = self._owner[work.stage], self._owner[target]
                back = work.gradients.get(target, 0.0)
                level = 0 if here == there else send_level(self._layout, cluster, here, there)
                found.append(
                    EdgePrediction(
                        source=work.stage,
                        target=target,
                        forward_bytes=nbytes,
                        backward_bytes=back,
                        forward_s=0.0 if here == there else send_seconds(nbytes, level, cluster),
                        backward_s=0.0 if here == there or not back else send_seconds(back, level, cluster),
                    )
                )
        return found
