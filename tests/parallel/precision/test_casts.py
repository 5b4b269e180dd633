"""Activations change their dtype where they should, inside `on()` alone; copies of a module have casts of theirs."""

from __future__ import annotations

import copy

import torch
import torch.nn as nn

from shardwise.parallel.precision.casts import Casts

BFLOAT16 = torch.bfloat16


class Model(nn.Module):
    def __init__(self, table: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4).to(BFLOAT16)
        self.norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4).to(BFLOAT16)
        self.register_buffer("table", torch.full((4,), 0.5) if table else None)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.table is not None:
            x = x + self.table
        self.seen.append(x.dtype)
        x = self.norm(x)
        self.seen.append(x.dtype)
        out: torch.Tensor = self.second(x)
        return out


def test_inputs_are_narrow_norms_compute_in_float32_and_logits_are_wide() -> None:
    model = Model()
    inside: list[torch.dtype] = []
    model.norm.register_forward_hook(lambda module, args, out: inside.append(out.dtype))
    casts = Casts(model, BFLOAT16, kept=[model.norm], head=model.second)
    with casts.on():
        out = model(torch.randn(2, 4))
    assert model.seen == [BFLOAT16, BFLOAT16]
    assert inside == [BFLOAT16]  # what leaves it
    assert out.dtype == torch.float32
    normed = model.norm(torch.randn(2, 4))  # outside of on(): as it ever was
    assert normed.dtype == torch.float32
    casts.close()
    assert "forward" not in vars(model.norm)


def test_a_layer_that_is_given_float32_is_learnt_and_the_others_pay_nothing() -> None:
    model = Model(table=True)
    casts = Casts(model, BFLOAT16)
    model.norm.to(BFLOAT16)
    model.norm = nn.Identity()  # type: ignore[assignment]
    with casts.learning():
        model(torch.randn(2, 4))
    assert len(model.second._forward_pre_hooks) == 1
    assert len(model.first._forward_pre_hooks) == 0
    with casts.on():
        assert model(torch.randn(2, 4)).dtype == BFLOAT16
    casts.close()
    assert not model.second._forward_pre_hooks


def test_a_copy_of_a_kept_module_computes_with_its_own_values() -> None:
    model = Model()
    casts = Casts(model, BFLOAT16, kept=[model.norm])
    twin = copy.deepcopy(model.norm).double()
    nn.init.constant_(twin.bias, 3.0)
    assert torch.allclose(twin(torch.ones(2, 4, dtype=torch.float64)), torch.full((2, 4), 3.0, dtype=torch.float64))
    assert not model.norm.bias.any()
    casts.close()
