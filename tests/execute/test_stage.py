"""Whatever a forward does between its layers, stages have the gradients of the model, or say by name why not."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
from models import Example

import awkward_models as awkward
from one_process import run_whole, traced, worst_error
from shardwise.errors import DataflowError, ModelError


def example(model: nn.Module) -> Example:
    return Example(model=model, batch=(torch.linspace(-2, 2, 8 * awkward.WIDTH).sin().view(8, awkward.WIDTH),))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
@pytest.mark.parametrize("kind", awkward.ALL, ids=lambda kind: kind.__name__)
def test_stages_are_the_model(kind: type[nn.Module], num_stages: int) -> None:
    made = example(kind())
    wanted, wanted_gradients = run_whole(made)
    trace = traced(made)
    loss, gradients = trace.run(trace.cut(num_stages))
    assert loss == pytest.approx(wanted, rel=1e-6)
    assert worst_error(gradients, wanted_gradients) <= 1e-6


def gradients_where_needed(kind: type[nn.Module]) -> None:
    made = example(kind())
    trace = traced(made)
    trace.run(trace.cut(2))


class HooksThatCompute(awkward.Awkward):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken: list[torch.Tensor] = []
        handles = [
            layer.linear.register_forward_hook(lambda module, args, output: taken.append(output * 2.0))
            for layer in self.layers
        ]
        loss = self.through(x).square().mean()
        for handle in handles:
            handle.remove()
        return loss + sum(tensor.abs().mean() for tensor in taken)


class LooksAtWhatALayerMade(awkward.Awkward):
    def through(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 100:
                x = -x
        return x


def test_a_hook_that_computes_inside_a_unit_is_refused_by_name() -> None:
    with pytest.raises(DataflowError, match="a hook on layers.[0-3].linear computes with what unit layers.[0-3] made"):
        gradients_where_needed(HooksThatCompute)


def test_python_that_looks_at_what_a_unit_made_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match="must not look at a value that a unit computed: __bool__|computed: __gt__"):
        gradients_where_needed(LooksAtWhatALayerMade)


def test_a_forward_that_takes_another_path_is_an_error() -> None:
    made = example(awkward.BranchesOnTheBatch())
    trace = traced(made)
    made.model.seen += 1.0
    with pytest.raises(DataflowError, match="Python saw .False,. where the trace saw .True,."):
        trace.run(trace.cut(2))
