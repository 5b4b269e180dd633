"""Tasks that are evaluated by a loop of model and world: text that grows by what the model says, a simulator.

    play, on rank 0 ──batch──► the model, on its layout ──replies, a row a sample──► play … ──► score

A task knows neither ranks nor layouts here either: it yields whole batches and is sent the replies to all their rows.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from shardwise.tasks.scored import Score
from shardwise.tasks.task import Batch, Split, Task

__all__ = ["Game", "Played"]

Game = Generator[Batch, Mapping[str, Tensor], Score]  # yields what the model is shown, is sent replies, returns a score


@runtime_checkable
class Played(Task, Protocol):
    """A task with `replies` and `play`. A task may be `Scored` besides: its evaluation then has the figures of both.

    Keep the number of rows and the lengths of batches constant, rows that have ended too: every new shape is traced.
    """

    def replies(self, outputs: object, batch: Batch) -> Mapping[str, Tensor]:
        """What `play` needs of the outputs for `batch`: by name, dim 0 are the batch's rows, the others always alike.

        Called without gradients, with whole tensors; several ranks may compute the same.
        """
        ...

    def play(self, split: Split) -> Game:
        """The loop. On rank 0 alone, once an evaluation, the same every time.

        A batch has the names and dtypes that `samples` gives, labels that need not count among them, as the loss of
        the same outputs is computed too. Replies have a row for every row of it, in order, on the CPU. It needs as
        many rows as the layout has replicas.
        """
        ...
