"""The forward of one stage on one micro-batch: the model's own, of which the stage computes its part.

Knows neither schedules nor messages: it is given what was received, and returns what is to be sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.execute.action_table import Forward
from shardwise.execute.around import Around
from shardwise.execute.stage import StageRun, Surroundings
from shardwise.execute.step_state import Work
from shardwise.execute.whole_run import WholeRun
from shardwise.trace.capture import own
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction, objective

__all__ = ["StageForward"]


class StageForward:
    """Runs forwards of `model`; `around` is what stands around the bodies of units."""

    def __init__(self, model: nn.Module, *, switch: Switch, loss: LossFunction | None, around: Around) -> None:
        self.model = model
        self.surroundings = Surroundings(around)
        self._switch = switch
        self._loss = loss
        self._around = around
        self._modules = dict(model.named_modules())

    def of(
        self, work: Work, forward: Forward, leaves: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """What a stage sends, and the loss on the loss stage, of what it has received."""
        inputs = own(work.micro_batch.inputs) if work.flow.writes_batch else work.micro_batch.inputs
        if len(work.flow.cut.stages) == 1 and not work.flow.random and not work.headers:
            return {}, self._whole(inputs)
        run = StageRun(
            tape=work.flow.tape,
            cut=forward.stage,
            table=forward.table,
            modules=self._modules,
            received=leaves,
            dealt=work.flow.dealt,
            scope=work.scope,
            checked=work.headers,
            around=self._around if self._around else None,
        )
        loss = run.forward(lambda: objective(self.model, inputs, self._loss), self._switch, self.surroundings)
        return run.sent, loss if forward.has_loss else None

    def _whole(self, inputs: Any) -> torch.Tensor:
        """The loss of a model that is one stage and draws nothing."""
        if not self._around:
            return objective(self.model, inputs, self._loss)
        run = self.surroundings.run = WholeRun(self._around)
        try:
            with self._switch.on(run):
                return objective(self.model, inputs, self._loss)
        finally:
            self.surroundings.run = None
