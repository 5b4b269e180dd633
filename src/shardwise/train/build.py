"""Makes the world of one rank from the description of a run: model, task, program, optimizer.

Knows the order in which they are made. Only what this rank holds gets values: from a checkpoint where the run
resumes, from a folder of safetensors, or from the model's own initialisation keyed by seed and name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from shardwise.checkpoint.source import Source, open_checkpoint, open_safetensors
from shardwise.describe.context import ContextPlan
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.execute.assemble import Fill, agreed_experts, agreed_plan, agreed_schedule, assemble, fill_from
from shardwise.execute.batches import MicroBatch
from shardwise.execute.contexts import agreed_context
from shardwise.execute.continuous import Stream
from shardwise.execute.program import Place, Program
from shardwise.launch import RankContext
from shardwise.launch.worker import Worker
from shardwise.layout import SEARCHED
from shardwise.plan.searched import Found
from shardwise.plan.sources import GivenSource
from shardwise.quantities import format_bytes, format_count
from shardwise.schedule import GENERATORS, Schedule, Timeline
from shardwise.tasks import LanguageModelling, Split, Task, sample_indices, task_from
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place
from shardwise.train.asynchronous.note import workers_note
from shardwise.train.asynchronous.outer import Outer
from shardwise.train.asynchronous.saved import restore_worker
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.balance import layout_for, of_rank_0
from shardwise.train.estimate import profiles_for, store_estimate
from shardwise.train.memory import own_memory
from shardwise.train.model import Values, model_factory, names_in, values_of
from shardwise.train.optimizer import optimizer_of
from shardwise.train.plan import context_note, experts_note, plan_and_timeline, schedule_for, statistics_note
from shardwise.train.run_file import Run
from shardwise.train.saved_values import SavedValues
from shardwise.train.shares import share
from shardwise.train.state import check_model, check_state, restore
from shardwise.train.update import update

__all__ = ["Job", "World", "about", "build", "build_model", "build_task", "first_micro_batch"]

ModelLike = nn.Module | Callable[[], nn.Module]


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

    def micro_batches(self, step: int) -> tuple[MicroBatch, ...]:
        """This replica's share of a step's samples."""
        training = self.run.training
        return self._share("train", step=step, num_micro_batches=self.run.num_micro_batches, seed=training.seed)

    def held_out(self, number: int, size: int) -> tuple[MicroBatch, ...]:
        """This replica's share of evaluation batch `number`, of `size` held-out samples in their order."""
        indices = range(number * size, (number + 1) * size)
        num_micro_batches = min(self.run.num_micro_batches, size // self.run.layout.num_replicas)
        return self._shared(indices, "held_out", num_micro_batches)

    def _share(self, split: Split, *, step: int, num_micro_batches: int, seed: int) -> tuple[MicroBatch, ...]:
        indices = sample_indices(
            seed=seed,
            step=step,
            global_batch=self.run.training.global_batch,
            num_samples=self.task.num_samples(split),
        )
        return self._shared(indices, split, num_micro_batches)

    def _shared(self, indices: Sequence[int], split: Split, num_micro_batches: int) -> tuple[MicroBatch, ...]:
        place = self.program.place
        return share(
            self.task,
            indices,
            split=split,
            replica=place.replica + (0 if self.workers is None else self.workers.index * place.dp),
            replicas=self.run.layout.num_replicas,
            num_micro_batches=num_micro_batches,
            device=self.device,
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


def build(
    job: Job,
    context: RankContext,
    *,
    worker: Worker | None = None,
    on_plan: Callable[[str], None] | None = None,
    on_estimate: Callable[[str], None] | None = None,
) -> World:
    """The world of this rank. Collective; rank 0 gives the plan in words to `on_plan` before the model is laid out, and
    a line about the estimate that it stores to `on_estimate`.

    `context` is that of the rank inside its `worker`, where a run has several.

    Raises what a wrong run raises: ConfigError, ModelError, LayoutError, CheckpointError.
    """
    run, layout = job.run if worker is None else _of_worker(job.run, worker), job.run.seeded_layout
    device = torch.device(run.device, context.local_rank) if run.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    task = build_task(job)
    source = open_checkpoint(run.checkpoint_folder) if job.resume else None
    state = _state(job, task)
    if source is not None:
        check_state(source, state)
    model, values = build_model(job, source)
    if source is not None:
        check_model(source, model)
    for name, buffer in model.named_buffers():
        if buffer.device != device:
            place(model, {name: buffer.to(device)})
    inputs = first_micro_batch(run, task, device)
    tensor = job.tensor
    if layout.tp > 1 and tensor is None:
        told = run.tp_plan
        tensor = agreed_plan(model, inputs, layout=layout, rank=context.rank, loss=task.loss, tp_plan=told)
    experts = job.experts
    if layout.ep > 1 and experts is None:
        experts = agreed_experts(model, inputs, layout=layout, rank=context.rank, loss=task.loss)
    context_plan: ContextPlan | None = None
    if layout.cp > 1:
        context_plan = agreed_context(model, inputs, layout=layout, rank=context.rank, loss=task.loss)
    searches = layout.schedule == SEARCHED
    found: Found | None = None
    planned: Timeline | None = None
    if context.rank == 0 and (on_plan is not None or run.balance == "measured" or searches):
        profile, profiles = profiles_for(
            run,
            model,
            inputs,
            loss=task.loss,
            values=values,
            device=device,
            tensor=tensor,
            experts=experts,
            context=context_plan,
        )
        layout = layout_for(run, profile)
        micro_batches = run.num_micro_batches
        found = schedule_for(
            profile,
            layout=layout,
            num_micro_batches=micro_batches,
            tensor=tensor,
            experts=experts,
            context=context_plan,
        )
        if found is not None:
            _write_schedule(run, found)
        if on_plan is not None:
            plan, planned = plan_and_timeline(
                profile,
                layout=layout,
                num_micro_batches=micro_batches,
                tensor=tensor,
                experts=experts,
                context=context_plan,
                found=found,
            )
            notes = experts_note(experts) + context_note(context_plan) + statistics_note(model, layout)
            on_plan(plan + notes + workers_note(run, model))
        if on_estimate is not None:
            on_estimate(store_estimate(run, model, layout, profiles))
    if run.balance == "measured":
        layout = of_rank_0(layout)
    workers = None if worker is None or run.asynchronous is None else Workers(worker, run.asynchronous)
    if workers is not None:  # what each has measured differs
        layout = workers.of_first(layout)

    def on_rank_0() -> Schedule:
        assert found is not None  # a layout that searches has been searched for
        return found.schedule

    schedule = agreed_schedule(layout, rank=context.rank, find=on_rank_0)
    if workers is not None and isinstance(schedule, GivenSource):
        schedule = GivenSource(schedule=workers.of_first(schedule.schedule))
    program = assemble(
        model,
        inputs,
        layout=layout,
        rank=context.rank,
        loss=task.loss,
        device=device,
        fill=_fill(values, device),
        tensor=tensor,
        experts=experts,
        context=context_plan,
        techniques=run.techniques,
        schedule=schedule,
    )
    training = run.training
    optimizer = optimizer_of(
        program,
        name=training.optimizer,
        betas=training.betas,
        epsilon=training.epsilon,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        nesterov=training.nesterov,
        on_host=layout.offloads_optimizer,
    )
    first_step = source.manifest.step if source is not None else 0
    stream = None
    if layout.schedule in GENERATORS and not GENERATORS[layout.schedule].flushes:
        stream = program.stream(
            first_step=first_step,
            update=lambda step, norm: update(program, optimizer, training, step=step, norm=norm),
            tell=lambda: own_memory(device),
        )
    if source is not None:
        program.numerics.from_state(source.manifest.state)
        restore(source, program=program, optimizer=optimizer, older=None if stream is None else stream.older)
    outer = None if workers is None else workers.outer_of(program)
    if source is not None and workers is not None and outer is not None:
        restore_worker(source, program, optimizer, workers, outer)
    return World(
        run=run,
        task=task,
        program=program,
        optimizer=optimizer,
        device=device,
        state=state,
        first_step=first_step,
        planned=planned,
        stream=stream,
        workers=workers,
        outer=outer,
    )


def _of_worker(run: Run, worker: Worker) -> Run:
    """The run as a worker writes it: those behind the first have a folder of their own, but for checkpoints."""
    if worker.index == 0:
        return run
    checkpoint = run.checkpoint.model_copy(update={"folder": str(run.checkpoint_folder)})
    return run.model_copy(update={"folder": str(Path(run.folder) / worker.folder), "checkpoint": checkpoint})


def _fill(values: Values | None, device: torch.device) -> Fill | None:
    """How parameters get their values; None: they have them."""
    if values is None:
        return None
    return fill_from(values, device, read=values.read if isinstance(values, SavedValues) else None)


def _write_schedule(run: Run, found: Found) -> None:
    """The schedule that was found, for whoever wants to run it again: `schedule = "FOLDER/schedule.json"`."""
    folder = Path(run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedule.json").write_text(found.schedule.to_json() + "\n", encoding="utf-8")


def build_task(job: Job) -> Task:
    """The task object that was given, or the one of the run."""
    return job.task if job.task is not None else task_from(job.run.task.kind, job.task_options)


def build_model(job: Job, source: Source | None = None) -> tuple[nn.Module, Values | None]:
    """The model without values, its buffers real, and where its values come from; None: it has its own.

    `source` is the checkpoint to go on from. Raises ConfigError, ModelError, CheckpointError.
    """
    if isinstance(job.model, nn.Module):
        model = job.model.train()
        return model, values_of(source, model) if source is not None else None
    factory = job.model if job.model is not None else model_factory(job.run.model)
    blueprint = defer(factory, seed=job.run.training.seed)
    model = blueprint.module
    buffers = [name for name, _ in model.named_buffers(remove_duplicate=False)]
    place(model, blueprint.materialize(buffers))
    path = job.run.model.path
    if source is None and path is None:
        return model, blueprint.materialize
    if source is None and path is not None:
        source = open_safetensors(path)
    assert source is not None
    values = values_of(source, model)
    saved = names_in(source, model)
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(values([name])[name])
    return model, values


def about(task: Task) -> str:
    """A task's data in words."""
    samples = format_count(task.num_samples("train"), "samples")
    if not isinstance(task, LanguageModelling):
        return samples
    corpus = task.corpus
    tokens = format_count(corpus.num_train_tokens, "tokens")
    return f"{samples}, {tokens} of {format_bytes(corpus.num_bytes)} of text in {corpus.num_documents} documents"


def first_micro_batch(run: Run, task: Task, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """What every rank traces: the first micro-batch of the first replica at step 0."""
    indices = sample_indices(
        seed=run.training.seed,
        step=0,
        global_batch=run.training.global_batch,
        num_samples=task.num_samples("train"),
    )
    first = Place(rank=0, dp=run.layout.num_replicas, pp=run.layout.pp)
    parts = share(
        task,
        indices,
        replica=first.replica,
        replicas=first.dp,
        num_micro_batches=run.num_micro_batches,
        device=device,
    )
    inputs: dict[str, torch.Tensor] = parts[0].inputs
    return inputs


def _state(job: Job, task: Task) -> dict[str, object]:
    """What a resumed run must have in common with the one that was saved."""
    training = job.run.training
    told = {"seed": training.seed, "global_batch": training.global_batch, "data": _fingerprint(job, task)}
    return {**told, "optimizer": training.optimizer}


def _fingerprint(job: Job, task: Task) -> str:
    if isinstance(task, LanguageModelling):
        return f"{task.corpus.fingerprint}-{task.sequence_length}"
    known = type(task).__qualname__ if job.task is not None else job.run.task.kind
    text = json.dumps([known, dict(job.task_options), task.num_samples("train")], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
