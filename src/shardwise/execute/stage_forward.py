"""The forward of one stage on one micro-batch: the model's own, of which the stage computes its part.

Knows neither schedules nor messages: it is given what was received, and returns what is to be sent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from shardwise.errors import ModelError
from shardwise.execute.action_table import Forward
from shardwise.execute.around import Around
from shardwise.execute.batches import MicroBatch
from shardwise.execute.stage import StageRun
from shardwise.execute.step_state import Work
from shardwise.execute.surroundings import Surroundings
from shardwise.execute.whole_run import WholeRun
from shardwise.parallel.tensor.divided_logits import whole_of
from shardwise.parallel.tensor.sequence_shard import whole_tokens
from shardwise.trace.capture import own
from shardwise.trace.install import Switch
from shardwise.trace.objective import LossFunction, objective

__all__ = ["Seen", "StageForward"]

Seen = Callable[[MicroBatch, object], None]  # shown a micro-batch and the model's outputs for it


class _Outputs:
    """Keeps what a model returned while its loss is computed."""

    def __init__(self) -> None:
        self.kept: list[object] = []

    def of(self, loss: LossFunction | None) -> LossFunction:
        """`loss`, by which outputs are kept. Raises `ModelError` where only the model itself computes one."""
        if loss is None:
            raise ModelError("outputs are shown where a task computes the loss of them; give a loss")

        def keeping(outputs: Any, batch: Any) -> torch.Tensor:
            self.kept.append(outputs)
            return loss(outputs, batch)

        return keeping


class StageForward:
    """Runs forwards of `model`; `around` is what stands around the bodies of units."""

    def __init__(self, model: nn.Module, *, switch: Switch, loss: LossFunction | None, around: Around) -> None:
        self.model = model
        self.surroundings = Surroundings(around)
        self._switch = switch
        self._loss = loss
        self.seen: Seen | None = None  # who is shown outputs where the loss is computed
        self._around = around
        self._modules = dict(model.named_modules())

    def of(
        self, work: Work, forward: Forward, leaves: Mapping[int, torch.Tensor]
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor | None]:
        """What a stage sends, and the loss on the loss stage, of what it has received."""
        inputs = own(work.micro_batch.inputs) if work.flow.writes_batch else work.micro_batch.inputs
        loss_of, outputs = self._loss, _Outputs()
        if self.seen is not None and forward.has_loss:
            loss_of = outputs.of(self._loss)
        if len(work.flow.cut.stages) == 1 and not work.flow.random and not work.headers:
            loss: torch.Tensor | None = self.whole(lambda: self._computed(work, 0, inputs, loss_of))
            self._show(work.micro_batch, outputs)
            return {}, loss
        way, stage = work.way, forward.action.stage
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
            absent=None if way is None else functools.partial(way.absent, stage),
        )
        loss = run.forward(lambda: self._computed(work, stage, inputs, loss_of), self._switch, self.surroundings)
        if way is not None:
            way.left(stage, run.position)
        self._show(work.micro_batch, outputs)
        return run.sent, loss if forward.has_loss else None

    def _show(self, micro_batch: MicroBatch, outputs: _Outputs) -> None:
        if self.seen is not None and outputs.kept:
            self.seen(micro_batch, tree_map(lambda leaf: whole_tokens(whole_of(leaf)), outputs.kept.pop()))

    def _computed(self, work: Work, stage: int, inputs: Any, loss: LossFunction | None) -> torch.Tensor:
        return objective(self.model, inputs, loss) if work.way is None else work.way.compute(stage)

    def whole(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `compute` runs of a model that is one stage and draws nothing."""
        if not self._around:
            return compute()
        run = self.surroundings.run = WholeRun(self._around)
        try:
            with self._switch.on(run):
                return compute()
        finally:
            self.surroundings.run = None
