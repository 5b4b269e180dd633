"""A step with scaled gradients is a step behind scaling them, whatever the optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from shardwise.execute.held import Held
from shardwise.execute.place import Place
from shardwise.execute.scaled_step import step_scaled
from shardwise.parallel.precision.numerics import Numerics

Made = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Made] = {
    "fused adamw": lambda own: torch.optim.AdamW(own, lr=0.1, weight_decay=0.1, fused=True),
    "fused adam": lambda own: torch.optim.Adam(own, lr=0.1, fused=True),
    "fused momentum": lambda own: torch.optim.SGD(own, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adamw": lambda own: torch.optim.AdamW(own, lr=0.1),
    "one fused group of two": lambda own: torch.optim.SGD(
        [{"params": own[:1], "fused": True}, {"params": own[1:], "fused": False}], lr=0.1
    ),
    "another": lambda own: torch.optim.RMSprop(own, lr=0.1),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Linear(5, 3)
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)
    return made


def held(of: nn.Module) -> Held:
    return Held(
        of,
        place=Place(rank=0, dp=1, pp=1),
        holders={name: (0,) for name, _ in of.named_parameters()},
        device=torch.device("cpu"),
        divided=None,
        experts=None,
        divided_states=None,
        numerics=Numerics(of),
    )


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_and_gradients_are_those_of_scaling_first(name: str, factor: float) -> None:
    ours, theirs = model(), model()
    optimizer, reference = (OPTIMIZERS[name](list(each.parameters())) for each in (ours, theirs))
    for _ in range(2):
        step_scaled(held(ours), optimizer, factor)
        for parameter in theirs.parameters():
            parameter.grad.mul_(factor)
        reference.step()
        for own, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, wanted.grad)
            torch.testing.assert_close(own, wanted)


def test_the_next_step_is_not_scaled() -> None:
    ours, theirs = model(), model()
    optimizer, reference = (OPTIMIZERS["fused adamw"](list(each.parameters())) for each in (ours, theirs))
    step_scaled(held(ours), optimizer, 0.5)
    held(theirs).scale_gradients(0.5)
    reference.step()
    optimizer.step()
    reference.step()
    for own, wanted in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)


def test_a_step_that_fails_leaves_nothing_in_the_optimizer() -> None:
    ours = model()
    optimizer = OPTIMIZERS["fused adamw"](list(ours.parameters()))
    next(ours.parameters()).grad = torch.zeros(3, 5).to_sparse()
    with pytest.raises(RuntimeError):
        step_scaled(held(ours), optimizer, 0.5)
    assert "grad_scale" not in vars(optimizer)
