"""What every rank of a run is told, and what is live on one of them. Values; how they are made is in `build`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.execute.batches import MicroBatch
from shardwise.execute.continuous import Stream
from shardwise.execute.program import Program
from shardwise.layout import SYNCHRONISED, Layout
from shardwise.schedule import Timeline
from shardwise.tasks import Batch, Split, Task, batch_size, indices_at
from shardwise.train.asynchronous.outer import Outer
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.model import Values
from shardwise.train.run_file import Run
from shardwise.train.shares import micro_batches_of, share

__all__ = ["Candidate", "Fresh", "Job", "ModelLike", "World"]

ModelLike = nn.Module | Callable[[], nn.Module]
Fresh = Callable[[], tuple[nn.Module, Values]]  # the model anew, without values, and some that it may have meanwhile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout that may be tried, and what a search has predicted of it: seconds of a step, bytes of ranks by their
    place in the pipeline. tensor, experts: how units are divided, where the search has proven it already."""

    layout: Layout
    predicted_s: float
    peak_bytes: tuple[float, ...] = ()
    tensor: TensorPlan | None = dataclasses.field(default=None, repr=False)
    experts: ExpertPlan | None = dataclasses.field(default=None, repr=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What every rank is told: the run, its prepared task, and objects that stand in for the run's own."""

    run: Run
    task_options: Mapping[str, object]
    model: ModelLike | None = None
    task: Task | None = None
    tensor: TensorPlan | None = None  # as somebody wrote it, proven
    resume: bool = False
    started_s: float = 0.0  # of the monotonic clock
    experts: ExpertPlan | None = None  # of layouts that divide experts; None: rank 0 makes it
    candidates: tuple[Candidate, ...] = ()  # that a search has found, the run's own first; several: they are measured
    told: str = ""  # what the search says of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What is live on one rank; `first_step` is the first one to do."""

    run: Run
    task: Task
    program: Program
    optimizer: torch.optim.Optimizer | None
    device: torch.device
    state: Mapping[str, object]
    first_step: int = 0
    planned: Timeline | None = None  # of a step, as the plan has it; on rank 0
    stream: Stream | None = None  # of a schedule that is not drained between steps
    workers: Workers | None = None  # that train by themselves, where the run has several
    outer: Outer | None = None  # what they exchange
    fresh: Fresh | None = None  # for another layout; None: a live model, of which nobody kept a copy

    def micro_batches(self, step: int) -> tuple[MicroBatch, ...]:
        """This replica's share of a step's samples."""
        training = self.run.training
        return self._share("train", step=step, num_micro_batches=self.run.num_micro_batches, seed=training.seed)

    @property
    def num_replicas(self) -> int:
        """Who has samples of its own, over all workers."""
        return self.run.layout.num_replicas

    def held_out(self, indices: Sequence[int]) -> tuple[MicroBatch, ...]:
        """This replica's share of the held-out samples `indices`, at least one a replica."""
        num_micro_batches = min(self.run.num_micro_batches, len(indices) // self.num_replicas)
        return self._shared(indices, "held_out", num_micro_batches)

    def shown(self, batch: Batch) -> tuple[MicroBatch, ...]:
        """This replica's share of the rows of a batch that somebody made. Raises `ConfigError` for too few rows."""
        rows = batch_size(batch)
        num_micro_batches = micro_batches_of(rows, replicas=self.num_replicas, at_most=self.run.num_micro_batches)
        return self._shared(range(rows), "held_out", num_micro_batches, given=batch)

    def _share(self, split: Split, *, step: int, num_micro_batches: int, seed: int) -> tuple[MicroBatch, ...]:
        indices = indices_at(self.task, seed=seed, step=step, global_batch=self.run.training.global_batch)
        return self._shared(indices, split, num_micro_batches, step=step)

    def _shared(
        self, indices: Sequence[int], split: Split, num_micro_batches: int, step: int = 0, given: Batch | None = None
    ) -> tuple[MicroBatch, ...]:
        place = self.program.place
        return share(
            self.task,
            indices,
            split=split,
            replica=place.replica + (0 if self.workers is None else self.workers.index * place.dp),
            replicas=self.run.layout.num_replicas,
            num_micro_batches=num_micro_batches,
            device=self.device,
            seed=self.run.training.seed,
            step=step,
            together=self.run.techniques.batch_norm == SYNCHRONISED,
            shares=self.run.layout.shares if split == "train" else None,
            given=given,
        )

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the parameters are those of all workers together; where there is one, they are so anyway."""
        return contextlib.nullcontext() if self.outer is None else self.outer.averaged()

    def mean_over_workers(self, loss: float, weight: float) -> tuple[float, float]:
        """The mean loss of all workers and its weight, from those of each. Collective."""
        if self.workers is None:
            return loss, weight
        (mean, total, _), *_ = self.workers.numbers([(loss, weight, 0.0)]).wait()
        return mean, total
