"""What is done before the ranks of a run are started: the run checked, its task prepared, its layout searched.

Knows what was asked for and what a search finds; starts nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from shardwise.checkpoint.source import open_checkpoint
from shardwise.errors import ConfigError
from shardwise.execute.compiled import check_backend
from shardwise.tasks import Task, head_of_kind, prepare_task
from shardwise.train.asked import Asked
from shardwise.train.build import Job, ModelLike
from shardwise.train.checks import check_path, check_task
from shardwise.train.layout_search import Choice, choose, read_choice
from shardwise.train.materials import head_of
from shardwise.train.model import model_factory
from shardwise.train.run_file import Run
from shardwise.train.run_tables import CheckpointOptions

__all__ = ["Start", "found_for", "prepare"]


def found_for(
    asked: Asked,
    *,
    ranks: int | None = None,
    model: ModelLike | None = None,
    task: Task | None = None,
    known: bool = True,
) -> Choice | None:
    """What a search finds for a run, for so many ranks, or all that this machine has; None where the run has a layout.

    known: whether what was found before, for the run of that folder, is still it. Raises as `choose` does.
    """
    if not asked.searches:
        return None
    before = read_choice(asked.run.folder) if known and not asked.again else None
    if before is not None:
        return before
    if not known:
        _check_anew(asked.run)
    alone = asked.run.model_copy(update={"checkpoint": CheckpointOptions()})
    found = choose(prepare(alone, model=model, task=task), asked.written, asked.overrides, ranks=ranks)
    found.write(alone.folder)
    return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """What a training is started with."""

    asked: Asked
    model: ModelLike | None
    task: Task | None
    resume: bool
    started_s: float

    def choice(self, ranks: int | None) -> Choice | None:
        """What a search has found, now or before, for so many ranks; None where the run has a layout."""
        return found_for(self.asked, ranks=ranks, model=self.model, task=self.task, known=self.resume)

    def job(self, choice: Choice | None, options: Mapping[str, object] | None = None) -> Job:
        """The run, prepared here, or with the options of a task that somebody has prepared."""
        run = self.asked.on(choice)
        if options is None:
            job = prepare(run, model=self.model, task=self.task, resume=self.resume, started_s=self.started_s)
        else:
            job = Job(
                run=run,
                task_options=options,
                model=self.model,
                task=self.task,
                resume=self.resume,
                started_s=self.started_s,
            )
        if choice is None:
            return job
        if choice.kept is not None:
            return dataclasses.replace(job, told=choice.told)
        best = choice.candidates[0]
        return dataclasses.replace(
            job, candidates=choice.candidates, told=choice.told, tensor=best.tensor, experts=best.experts
        )


def prepare(
    run: Run,
    *,
    model: ModelLike | None = None,
    task: Task | None = None,
    resume: bool = False,
    started_s: float = 0.0,
) -> Job:
    """Check the run and do the slow part of its task, in one process. Raises ConfigError, CheckpointError."""
    if model is None:
        model_factory(run.model, head_of_kind(run.task.kind) if task is None else head_of(task))
        check_path(run.model.path)
    if run.device == "cuda" and torch.cuda.device_count() == 0:
        raise ConfigError('device = "cuda" needs a GPU, and torch sees 0 here; use device = "cpu"')
    if run.compile:
        check_backend(run.compile)
    if resume:
        open_checkpoint(run.checkpoint_folder)
    else:
        _check_anew(run)
    options = prepare_task(run.task.kind, run.task_options) if task is None else {}
    job = Job(run=run, task_options=options, model=model, task=task, resume=resume, started_s=started_s)
    check_task(job)
    return job


def _check_anew(run: Run) -> None:
    """That a run which does not go on has a folder of its own. Raises ConfigError."""
    if run.checkpoint.every and (run.checkpoint_folder / "latest").exists():
        saved = open_checkpoint(run.checkpoint_folder)
        raise ConfigError(
            f"a run that starts anew has a folder of its own, but {run.checkpoint_folder} holds a checkpoint of step "
            f"{saved.manifest.step}; go on from it with --resume, give another folder, or --overwrite it"
        )
