"""A loss may look at what the model made, as matchings and masks do: stages have the gradients of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from models import Example
from scipy.optimize import linear_sum_assignment

from one_process import Traced, run_whole, traced, worst_error
from shardwise.trace.objective import objective

WIDTH = 8


class Layers(nn.Module):
    """Four layers; targets are for the loss alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))

    def forward(self, x: torch.Tensor, **others: object) -> dict[str, torch.Tensor]:
        assert not others
        for layer in self.layers:
            x = x + layer(x)
        return {"logits": x, "twice": 2 * x}


Outputs = Mapping[str, torch.Tensor]


def masks(outputs: Outputs, batch: Any) -> torch.Tensor:
    counted = batch["target_labels"] >= 0
    return F.cross_entropy(outputs["logits"][counted], batch["target_labels"][counted])


def looks(outputs: Outputs, batch: Any) -> torch.Tensor:
    total = outputs["twice"].square().mean()
    for row, best in enumerate(outputs["logits"].argmax(-1).tolist()):
        total = total + outputs["logits"][row, best] * (1.0 if float(outputs["logits"].detach()[row, 0]) > 0 else 2.0)
    return total


def matches(outputs: Outputs, batch: Any) -> torch.Tensor:
    rows, columns = linear_sum_assignment(outputs["logits"].detach().cpu().numpy())
    return outputs["logits"][rows, columns].square().sum()


class Best(torch.autograd.Function):
    """The columns of an assignment, found in numpy."""

    @staticmethod
    def forward(ctx: Any, costs: torch.Tensor) -> torch.Tensor:
        columns = torch.from_numpy(linear_sum_assignment(costs.numpy())[1])
        ctx.mark_non_differentiable(columns)
        return columns

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> None:
        return None


def sets_apart(outputs: Outputs, batch: Any) -> torch.Tensor:
    columns = Best.apply(outputs["logits"])
    return outputs["logits"].gather(1, columns[:, None]).square().sum()


def plain(outputs: Outputs, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs["logits"], batch["target_labels"], ignore_index=-100)


def example(loss: Callable[[Outputs, Any], torch.Tensor]) -> Example:
    x = torch.linspace(-2, 2, 6 * WIDTH).sin().view(6, WIDTH)
    labels = torch.tensor([0, -100, 3, 2, -100, 7])
    return Example(model=Layers(), batch={"x": x, "target_labels": labels}, loss=loss)


def names(trace: Traced) -> list[str]:
    return [node.name for node in trace.tape.flow.nodes]


@pytest.mark.parametrize("loss", [masks, looks, matches, sets_apart, plain])
def test_stages_of_a_model_have_its_gradients_whatever_its_loss_looks_at(loss: Callable[..., torch.Tensor]) -> None:
    made = example(loss)
    wanted, wanted_gradients = run_whole(made)
    trace = traced(made)
    assert ("loss_of" in names(trace)) == (loss in (masks, looks, matches))
    assert ("Best" in names(trace)) == (loss is sets_apart)
    for num_stages in (1, 2, 3):
        value, gradients = trace.run(trace.cut(num_stages))
        assert value == pytest.approx(wanted, rel=1e-6)
        assert worst_error(gradients, wanted_gradients) <= 1e-6


class Rounded(nn.Linear):
    """A layer that asks numpy."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float(np.rint(x.detach().numpy()).max())


def test_a_unit_that_asks_numpy_is_run_on_real_numbers_while_it_is_recorded() -> None:
    made = example(plain)
    made.model.get_submodule("layers")[1] = Rounded(WIDTH, WIDTH)
    wanted, wanted_gradients = run_whole(made)
    trace = traced(made)
    value, gradients = trace.run(trace.cut(2))
    assert value == pytest.approx(wanted, rel=1e-6)
    assert worst_error(gradients, wanted_gradients) <= 1e-6


class Listing(Layers):
    def forward(self, x: torch.Tensor, target_labels: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return super().forward(x + target_labels.clamp(min=0)[:, None])


def test_a_target_that_forward_lists_is_given_to_the_model_too() -> None:
    made = example(plain)
    listing = Listing()
    listing.load_state_dict(made.model.state_dict())
    found = objective(listing, made.batch, plain)
    assert float(found.detach()) != pytest.approx(float(objective(made.model, made.batch, plain).detach()))


def test_a_loss_that_looks_is_one_function_whatever_it_finds() -> None:
    made = example(looks)
    trace = traced(made)
    with torch.no_grad():
        made.model.get_parameter("layers.3.0.bias").add_(3.0)  # other places are best now
    wanted, _ = run_whole(made)
    value, _ = trace.run(trace.cut(2))
    assert value == pytest.approx(wanted, rel=1e-6)


def test_work_of_the_backward_behind_a_loss_that_looks_is_counted_as_behind_any() -> None:
    counted = {loss: traced(example(loss)).profile for loss in (matches, plain)}
    flops = {loss: [call.backward_flops for call in profile.calls] for loss, profile in counted.items()}
    assert flops[matches] == flops[plain]
    assert all(each > 0 for each in flops[plain])
