"""Tasks: samples, losses, weights and metrics. They know no parallelism; see `Task` for what one gives."""

from shardwise.tasks.language_modelling import CorpusOptions, EncodedCorpus, LanguageModelling
from shardwise.tasks.registry import prepare_task, task_from
from shardwise.tasks.sampler import sample_indices
from shardwise.tasks.synthetic import RandomTokens
from shardwise.tasks.task import (
    IGNORED_LABEL,
    SPLITS,
    Batch,
    Split,
    Task,
    batch_size,
    label_count,
    loss_of,
    next_token_loss,
    perplexity,
)

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "Batch",
    "CorpusOptions",
    "EncodedCorpus",
    "LanguageModelling",
    "RandomTokens",
    "Split",
    "Task",
    "batch_size",
    "label_count",
    "loss_of",
    "next_token_loss",
    "perplexity",
    "prepare_task",
    "sample_indices",
    "task_from",
]
