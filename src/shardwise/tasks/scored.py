"""Tasks that are scored by what a model answers: entities found, images told apart. The loss alone does not say it.

    outputs of a micro-batch ──answers──► small tensors, a row a sample ──gathered, in sample order──► score, once

`answers` runs where the outputs are, `score` once for all ranks. A task knows neither: it is given whole tensors and
all held-out samples. What a model does in a loop of its own (generation, a simulator) is no `Scored`: it shares
`Score` alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from shardwise.errors import ConfigError
from shardwise.tasks.task import Batch, Split, Task

__all__ = ["Answers", "Score", "Scored"]

Answers = Mapping[str, Sequence[Tensor]]  # name -> [sample]; rows of samples of several batches may differ in shape


@dataclass(frozen=True, kw_only=True)
class Score:
    """What an evaluation says: `figures` by name, such as f1, and a report for people; empty where there is none."""

    figures: Mapping[str, float] = field(default_factory=dict)
    report: str = ""

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.figures.items() if not math.isfinite(value)]
        if wrong:
            raise ConfigError(f"a figure is a finite number, but {wrong[0]} is {self.figures[wrong[0]]}; leave it out")


@runtime_checkable
class Scored(Task, Protocol):
    """A task with `answers` and `score`. Every evaluation is then of all held-out samples, and gives its figures.

    Without `labels` or a loss of the model it is a task like any other: `loss` and `weight` are still asked for.
    """

    def answers(self, outputs: object, batch: Batch) -> Mapping[str, Tensor]:
        """What `score` needs of the outputs for `batch`: by name, dim 0 are the batch's samples. Keep them small.

        Called without gradients, with whole tensors, after the loss of the same outputs; several ranks may compute the
        same. An output that the loss does not need may be absent: to read it is an error that names it.
        """
        ...

    def score(self, answers: Answers, indices: Sequence[int], split: Split) -> Score:
        """The score of samples `indices` of a split: `answers[name][i]` is the row of sample `indices[i]`, on the CPU.

        The indices ascend, each once; they are all samples of the split, or the first ones.
        """
        ...
