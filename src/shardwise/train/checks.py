"""What is wrong with a run, found before a rank is started: task against model, stages against units, paths.

Knows a job and transformers' names of sizes. Refuses to know how ranks are started; a rule of one table alone is in
`run_file`.
"""

from __future__ import annotations

from pathlib import Path

from shardwise.checkpoint.source import open_safetensors
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import CheckpointError, ConfigError
from shardwise.layout import StageRule
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.written_plan import words_by_hand
from shardwise.plan.partition import place
from shardwise.tasks import LanguageModelling, RandomTokens, TokenClassification, Translation
from shardwise.trace.profile import trace
from shardwise.train.build import Job, build_model, build_task, first_micro_batch
from shardwise.train.model import sizes_of

__all__ = ["check_experts", "check_path", "check_stages", "check_task", "check_tensor", "make_folder"]


def check_task(job: Job) -> None:
    """The model has a row for every token and a place for every position of the task, which has samples.

    Asked of transformers configs and of tasks over tokens. Raises ConfigError with the numbers.
    """
    task = build_task(job)
    if task.num_samples("train") < 1:
        raise ConfigError("a task has training samples, but this one has 0; give more data")
    if job.model is not None or job.run.model.factory is not None:
        return
    if isinstance(task, LanguageModelling):
        tokens, source = task.corpus.vocabulary_size, "the corpus has"
    elif isinstance(task, RandomTokens):
        tokens, source = task.vocabulary_size, "the task draws from"
    elif isinstance(task, TokenClassification | Translation):
        tokens, source = task.vocabulary_size, "the tokenizer has"
    else:
        return
    rows, places = sizes_of(job.run.model)
    if rows is not None and rows < tokens:
        raise ConfigError(
            f"a model has a row for every token, but vocab_size={rows} and {source} {tokens} tokens; set "
            f"model.config.vocab_size={tokens} or task.vocabulary_size={rows}"
        )
    if places is not None and places < task.sequence_length:
        option = "max_tokens" if isinstance(task, TokenClassification | Translation) else "sequence_length"
        raise ConfigError(
            f"a model has a place for every token of a sequence, but max_position_embeddings={places} and "
            f"sequence_length={task.sequence_length}; set model.config.max_position_embeddings={task.sequence_length} "
            f"or task.{option}={places}"
        )


def check_stages(job: Job) -> None:
    """Stages that are listed by hand name units of the model, each once. Raises LayoutError. Traces the model."""
    if isinstance(job.run.layout.stages, StageRule):
        return
    model, _ = build_model(job)
    task = build_task(job)
    place(trace(model, first_micro_batch(job.run, task), loss=task.loss), job.run.layout)


def check_experts(job: Job) -> ExpertPlan | None:
    """How the layout divides experts, proven; None where it does not. Raises LayoutError where there are none."""
    if job.run.layout.ep == 1:
        return None
    model, _ = build_model(job)
    task = build_task(job)
    return plan_experts(model, first_micro_batch(job.run, task), ep=job.run.layout.ep, loss=task.loss)


def check_tensor(job: Job) -> TensorPlan | None:
    """The plan of shards that the run, or somebody on its model, says; proven. None where nobody says one.

    Raises `ModelError` or `LayoutError` with the module and the first tensor that differs, where it is wrong.
    """
    run = job.run
    if run.layout.tp == 1:
        return None
    model, _ = build_model(job)
    if run.tp_plan is None and words_by_hand(model) is None:
        return None
    task = build_task(job)
    inputs = first_micro_batch(run, task)
    sequence = run.layout.sequence_parallel
    return plan_tensor(model, inputs, tp=run.layout.tp, loss=task.loss, sequence=sequence, tp_plan=run.tp_plan)


def check_path(path: str | None) -> None:
    """That a folder of initial values has them. Raises CheckpointError."""
    try:
        if path is not None:
            open_safetensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"model.path: {error}") from error


def make_folder(folder: Path) -> None:
    """A folder of the run, made here so that a wrong one is one error. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"a run has a folder that can be written, but {folder} cannot be made: {error.strerror}; set folder"
        ) from error
