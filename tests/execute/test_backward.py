"""A backward that goes to the engine directly gives what torch's public one gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from shardwise.execute.backward import run_backward


def made() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    return model, x, model(x)


def test_gradients_of_several_roots_are_added_to_those_that_are_there() -> None:
    gradients = (torch.full((4, 2), 0.5), torch.tensor(3.0))
    got, expected = made(), made()
    for model, _, y in (got, expected):
        model.weight.grad = torch.ones_like(model.weight)
        roots = (y, y.square().sum())
        if model is got[0]:
            run_backward(roots, gradients)
        else:
            torch.autograd.backward(roots, gradients)
    assert torch.equal(got[0].weight.grad, expected[0].weight.grad)
    assert torch.equal(got[0].bias.grad, expected[0].bias.grad)
    assert torch.equal(got[1].grad, expected[1].grad)


def test_the_graph_is_freed_and_the_gradients_given_are_left_alone() -> None:
    _, _, y = made()
    given = torch.ones(4, 2)
    run_backward([y], [given])
    assert torch.equal(given, torch.ones(4, 2))
    with pytest.raises(RuntimeError, match="second time"):
        run_backward([y], [given])


def test_a_tensor_class_is_asked_how_its_backward_goes() -> None:
    asked = []

    class Asked(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    root = torch.ones(2, requires_grad=True).as_subclass(Asked)
    asked.clear()
    run_backward([root.sum()], [torch.tensor(1.0)])
    assert torch.autograd.backward in asked
