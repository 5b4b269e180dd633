"""A model cut into stages that run one after another in this process, beside the model as it is."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping

import torch
import torch.nn as nn
from models import Example

from shardwise.describe.profile import ModelProfile
from shardwise.execute.in_process import run_in_process
from shardwise.layout import Layout, StageRule
from shardwise.plan.cut import Cut, cut_stages
from shardwise.plan.partition import place
from shardwise.trace.capture import capture, own
from shardwise.trace.count import Counter
from shardwise.trace.objective import objective
from shardwise.trace.profile import profile_of
from shardwise.trace.randomness import Scope
from shardwise.trace.record import Recorder
from shardwise.trace.tape import Tape
from shardwise.verify.comparison import errors_of

SCOPE = Scope(seed=3, step=5, micro_batch=0, samples=tuple(range(8)), place="glue", call=0)

Gradients = Mapping[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traced:
    """An example, its tape, and its profile."""

    example: Example
    tape: Tape
    profile: ModelProfile

    def cut(self, num_stages: int) -> Cut:
        """The planner's cut; by depth where layers may be dropped, so that no stage is left without one."""
        by_depth = bool(self.tape.looks) and self.tape.random
        layout = Layout(pp=num_stages, stages=StageRule.DEPTH if by_depth else StageRule.COST)
        return cut_stages(self.tape.flow, place(self.profile, layout), num_stages)

    def run(self, cut: Cut) -> tuple[float, Gradients]:
        """Loss and gradients of the stages; the model is left as it was."""
        model, buffers = self.example.model, _buffers(self.example.model)
        batch, loss = self.example.batch, self.example.loss
        value = run_in_process(model, batch, tape=self.tape, cut=cut, loss=loss, scope=SCOPE)
        return float(value), _taken(model, buffers)


def traced(example: Example) -> Traced:
    """One recording, as the planner and the executor use it."""
    counters: list[Counter] = []

    def watch(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
        counters.append(Counter())
        return counters[-1].watching(recorder)

    captured = capture(example.model, example.batch, loss=example.loss, scope=SCOPE, watch=watch)
    profile = profile_of(example.model, captured, counters[-1])
    return Traced(example=example, tape=captured.tape, profile=profile)


def run_whole(example: Example) -> tuple[float, Gradients]:
    """Loss and gradients of the model as it is, without any code of shardwise in its forward."""
    buffers = _buffers(example.model)
    loss = objective(example.model, own(example.batch), example.loss)
    loss.backward()
    return float(loss.detach()), _taken(example.model, buffers)


def _buffers(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return copy.deepcopy(dict(model.named_buffers()))


def _taken(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> Gradients:
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return gradients


def worst_error(gradients: Gradients, wanted: Gradients) -> float:
    """As `verify` measures it; both sides must lack the same gradients."""
    assert [name for name, g in gradients.items() if g is None] == [name for name, g in wanted.items() if g is None]
    sizes = {name: torch.zeros(0) if g is None else torch.zeros(g.shape) for name, g in wanted.items()}
    return max(error.gradient for error in errors_of(gradients, sizes, wanted, sizes, by_sign=False))
