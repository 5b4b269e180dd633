"""Flops and kept bytes are booked where they belong: forward and backward on the call that caused them."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from shardwise.trace.count import flops_of
from shardwise.trace.profile import trace

torch.set_num_threads(1)
ATEN = torch.ops.aten


def meta(*shape):
    return torch.empty(*shape, device="meta")


@pytest.mark.parametrize(
    "func, args, flops",
    [
        (ATEN.mm.default, (meta(3, 4), meta(4, 5)), 2 * 3 * 4 * 5),
        (ATEN.relu.default, (meta(3, 4),), 0),
        (
            ATEN._scaled_dot_product_flash_attention_for_cpu.default,
            (meta(2, 3, 5, 4), meta(2, 3, 7, 4), meta(2, 3, 7, 6)),
            2 * 2 * 3 * 5 * 7 * (4 + 6),
        ),
        (
            ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
            (meta(2, 3, 5, 6), meta(2, 3, 5, 4), meta(2, 3, 7, 4), meta(2, 3, 7, 6)),
            2 * 2 * 3 * 5 * 7 * (3 * 4 + 2 * 6),
        ),
        (ATEN._grouped_mm.default, (meta(9, 4), meta(3, 4, 5), meta(3)), 2 * 9 * 4 * 5),
        (ATEN._grouped_mm.default, (meta(4, 9), meta(9, 5), meta(3)), 2 * 9 * 4 * 5),
        (ATEN._grouped_mm.default, (meta(3, 2, 4), meta(3, 4, 5)), 2 * 3 * 2 * 4 * 5),
        (ATEN._grouped_mm.default, (meta(3, 2, 4), meta(4, 9), meta(3)), 2 * 2 * 4 * 9),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_flops_of_an_operation(func, args, flops) -> None:
    assert flops_of(func, args, {}, None if flops == 0 else meta(1)) == flops


class Mixed(nn.Module):
    """Units of several kinds, glue with a product of its own, a skip, and a unit that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)
        self.mix = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        hidden = self.conv(x).transpose(1, 2).contiguous()  # (batch, tokens, 8)
        early = self.shared(hidden)
        hidden = F.gelu(early) @ self.mix
        return self.head(self.shared(hidden) + early)


def square(outputs, batch):
    return outputs.pow(2).mean()


def profiled():
    return trace(Mixed(), (torch.randn(2, 4, 6),), loss=square, units=("conv", "shared", "head"))


def test_totals_are_those_of_calls_and_glue() -> None:
    linear, convolution = 2 * 2 * 6 * 8 * 8, 2 * 2 * 6 * 4 * 8 * 3
    profile = profiled()
    assert profile.forward_flops == 3 * linear + linear // 4 + convolution
    assert profile.backward_flops == 2 * (3 * linear + linear // 4) + convolution


def test_every_call_has_its_own_flops_forward_and_backward() -> None:
    linear = 2 * 2 * 6 * 8 * 8  # (batch, tokens, 8) x (8, 8)
    calls = profiled().calls
    found = {f"{call.unit}#{call.call}": (call.forward_flops, call.backward_flops) for call in calls}
    assert found["shared#0"] == (linear, 2 * linear)
    assert found["shared#1"] == (linear, 2 * linear)
    assert found["head#0"] == (linear // 4, linear // 2)
    assert found["conv#0"][0] == 2 * 2 * 6 * 4 * 8 * 3
    assert found["conv#0"][1] == found["conv#0"][0]  # the batch needs no gradient


def test_the_gradient_of_a_weight_takes_as_many_flops_as_the_product_with_it() -> None:
    calls = profiled().calls
    found = {f"{call.unit}#{call.call}": (call.weight_flops, call.forward_flops) for call in calls}
    assert all(weight == forward for weight, forward in found.values())


def test_the_gradient_of_a_weight_is_made_of_what_went_in_and_what_came_out() -> None:
    calls = profiled().calls
    found = {f"{call.unit}#{call.call}": call.weight_bytes for call in calls}
    hidden = 2 * 6 * 8 * 4  # (batch, tokens, 8) float32
    assert found["shared#0"] == 2 * hidden
    assert found["head#0"] == hidden + hidden // 4
    assert found["conv#0"] == hidden // 2 + hidden


class Attends(nn.Module):
    """Products of which one is with a parameter, one with a frozen one, one with none."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        y = self.frozen(self.own(x))
        return y @ y.transpose(1, 2)


def test_products_without_a_trained_parameter_make_no_gradient_of_one() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = Attends()

        def forward(self, x):
            return self.unit(x)

    (call,) = trace(Whole(), (torch.randn(2, 6, 8),), loss=square, units=("unit",)).calls
    linear = 2 * 2 * 6 * 8 * 8
    assert call.weight_flops == linear
    assert call.forward_flops == 2 * linear + 2 * 2 * 6 * 6 * 8


def test_glue_has_its_flops_too() -> None:
    product = 2 * 2 * 6 * 8 * 8
    flops = [(part.forward_flops, part.backward_flops) for part in profiled().glue if part.forward_flops]
    assert flops == [(product, 2 * product)]


def test_kept_bytes_belong_to_who_made_them_once() -> None:
    hidden = 2 * 6 * 8 * 4  # (batch, tokens, 8) float32
    profile = profiled()
    saved = {f"{call.unit}#{call.call}": call.saved_bytes for call in profile.calls}
    assert saved["conv#0"] == 0  # its result is copied by the glue
    assert saved["shared#0"] == hidden  # the input of gelu
    assert saved["shared#1"] == 0  # an addition keeps nothing
    assert saved["head#0"] == 2 * 6 * 2 * 4  # squared by the loss
    glue = sorted(part.saved_bytes for part in profile.glue if part.saved_bytes)
    assert glue == [hidden] * 4  # what enters shared#0, the product, shared#1 and head#0


def test_kept_bytes_are_those_that_autograd_keeps() -> None:
    model, kept = Mixed(), {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    batch = torch.randn(2, 4, 6)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        square(model(batch), None)
    own.add(batch.untyped_storage().data_ptr())
    assert profiled().saved_bytes == sum(s.nbytes() for at, s in kept.items() if at not in own)
