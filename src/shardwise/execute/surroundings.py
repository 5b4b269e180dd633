"""What is changed in torch while stages run, and who is asked there: the stage, or the whole model, in its forward.

Knows autograd functions of the glue and checkpointed calls; nothing of stages, tapes and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import noop_context_fn

from shardwise.execute.around import Around
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.functions import as_one_function

__all__ = ["Running", "Surroundings"]


class Running(Protocol):
    """A forward that runs: whether it is inside a unit, the mode that counts its glue, what it says of checkpoints."""

    inside: bool
    mode: TorchFunctionMode | None

    def checkpoint(self) -> contextlib.AbstractContextManager[Contexts | None]: ...


class Surroundings:
    """What is changed in torch while stages run: autograd functions of the glue are one call, checkpoints are noticed.

    Opened once a step, not once a forward: to change a class costs every lookup in it afterwards.
    """

    def __init__(self, around: Around | None = None) -> None:
        self.run: Running | None = None  # what is in its forward
        self._around = around

    @contextlib.contextmanager
    def open(self) -> Iterator[Surroundings]:
        """Every forward inside the block is given these surroundings."""
        with as_one_function(self._glue), noticed(self):
            yield self

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        """What the running stage says of a checkpointed call; torch's own way where none runs (a repetition)."""
        if self._around is not None and self._around.keeps:
            yield None
        elif self.run is None:
            yield noop_context_fn
        else:
            with self.run.checkpoint() as chosen:
                yield chosen

    def _glue(self) -> TorchFunctionMode | None:
        return None if self.run is None or self.run.inside else self.run.mode
