"""Tasks: samples, losses, weights and metrics. They know no parallelism; see `Task` for what one gives."""

from shardwise.tasks.by_step import Augmented, Ordered, Padded, alike_indices, indices_at, samples_at
from shardwise.tasks.detection import Detection
from shardwise.tasks.head import Headed, ModelHead
from shardwise.tasks.images import ImageClassification
from shardwise.tasks.imitation import Imitation
from shardwise.tasks.language_modelling import CorpusOptions, EncodedCorpus, LanguageModelling
from shardwise.tasks.played import Game, Played
from shardwise.tasks.registry import head_of_kind, may_have_head, prepare_task, task_from, wanted_of_run
from shardwise.tasks.sampler import sample_indices
from shardwise.tasks.scored import Answers, Score, Scored
from shardwise.tasks.sight import Outcome, Sight
from shardwise.tasks.simulator import Expert, Pictured, Simulator
from shardwise.tasks.synthetic import RandomTokens
from shardwise.tasks.task import (
    IGNORED_LABEL,
    SPLITS,
    Batch,
    Counted,
    Described,
    Split,
    Task,
    batch_size,
    class_loss,
    label_count,
    logits_of,
    loss_of,
    next_token_loss,
    perplexity,
)
from shardwise.tasks.token_classification import TokenClassification
from shardwise.tasks.translation import Translation

__all__ = [
    "IGNORED_LABEL",
    "SPLITS",
    "Answers",
    "Augmented",
    "Batch",
    "CorpusOptions",
    "Counted",
    "Described",
    "Detection",
    "EncodedCorpus",
    "Expert",
    "Game",
    "Headed",
    "ImageClassification",
    "Imitation",
    "LanguageModelling",
    "ModelHead",
    "Ordered",
    "Outcome",
    "Padded",
    "Pictured",
    "Played",
    "RandomTokens",
    "Score",
    "Scored",
    "Sight",
    "Simulator",
    "Split",
    "Task",
    "TokenClassification",
    "Translation",
    "alike_indices",
    "batch_size",
    "class_loss",
    "head_of_kind",
    "indices_at",
    "label_count",
    "logits_of",
    "loss_of",
    "may_have_head",
    "next_token_loss",
    "perplexity",
    "prepare_task",
    "sample_indices",
    "samples_at",
    "task_from",
    "wanted_of_run",
]
