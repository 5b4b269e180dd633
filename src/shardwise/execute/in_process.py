"""All stages of a cut, one after another in one process: the shortest proof that a cut is right.

Every stage sees only its own parameters; the others are absent. Values and gradients are handed over as plain
tensors. No schedule, no ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
import torch.nn as nn

from shardwise.execute.programme import programme
from shardwise.execute.stage import StageRun
from shardwise.parallel.hold import hold
from shardwise.plan.cut import Cut
from shardwise.trace.capture import own
from shardwise.trace.install import Switch, installed
from shardwise.trace.objective import Batch, LossFunction, objective
from shardwise.trace.randomness import Scope
from shardwise.trace.tape import Tape

__all__ = ["holding", "run_in_process"]


@contextlib.contextmanager
def holding(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Inside the block only the parameters `names` have storage; the rest are absent."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    hold(model, names)
    try:
        yield
    finally:
        for module, parameters in before:
            module._parameters.update(parameters)


def run_in_process(
    model: nn.Module,
    batch: Batch,
    *,
    tape: Tape,
    cut: Cut,
    loss: LossFunction | None = None,
    scope: Scope,
    weight: float = 1.0,
    checked: bool = True,
) -> torch.Tensor:
    """Forward and backward of one micro-batch through all stages; gradients accumulate in the model's parameters.

    Returns the loss. Raises `DataflowError` where the dataflow does not hold.
    """
    units = {name: model.get_submodule(name) for name in tape.units}
    modules = dict(model.named_modules())
    switch = Switch()
    runs: dict[int, StageRun] = {}
    leaves: dict[int, dict[int, torch.Tensor]] = {}
    value_of_loss: torch.Tensor | None = None
    with installed(units, switch):
        for stage in cut.order:
            plan = cut.stages[stage]
            leaves[stage] = {
                value: runs[source].sent[value].detach().clone().requires_grad_(tape.flow.values[value].requires_grad)
                for value, source in plan.receives
            }
            with holding(model, plan.parameters):
                runs[stage] = StageRun(
                    tape=tape,
                    cut=plan,
                    table=programme(tape, plan),
                    modules=modules,
                    received=leaves[stage],
                    scope=scope,
                    checked=checked,
                )
                inputs = own(batch)  # glue may write into it in place
                out = runs[stage].forward(lambda inputs=inputs: objective(model, inputs, loss), switch)  # type: ignore[misc]
            if stage == cut.loss_stage:
                value_of_loss = out
        assert value_of_loss is not None
        for stage in reversed(cut.order):
            _backward(cut, stage, runs, leaves, value_of_loss, weight)
    return value_of_loss.detach()


def _backward(
    cut: Cut,
    stage: int,
    runs: dict[int, StageRun],
    leaves: dict[int, dict[int, torch.Tensor]],
    loss: torch.Tensor,
    weight: float,
) -> None:
    roots: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []
    if stage == cut.loss_stage and loss.requires_grad:
        roots.append(loss)
        gradients.append(torch.full_like(loss, weight))
    for value, tensor in runs[stage].sent.items():
        arrived = [leaves[target][value].grad for v, target in cut.stages[stage].sends if v == value]
        parts = [gradient for gradient in arrived if gradient is not None]
        if parts and tensor.requires_grad:
            roots.append(tensor)
            gradients.append(sum(parts[1:], parts[0]))
    if roots:
        torch.autograd.backward(roots, gradients)
