"""Torch's own multi-head attention and encoder layers, divided by heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from parallel.tensor.blocks import Model
from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import twin
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.threads import on_threads

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
PACKED = Slice.even(0, 48, 2, (16, 16, 16))


def planned(*blocks: nn.Module, tp: int = 2) -> tuple[TensorPlan, UnitPlan]:
    plan = plan_tensor(Model(*blocks), (X,), tp=tp)
    return plan, plan.units["blocks.0"]


@pytest.mark.parametrize("settings", [{"batch_first": True}, {"dropout": 0.0, "norm_first": True, "bias": False}])
@pytest.mark.parametrize("tp", [2, 4])
def test_an_encoder_layer_of_torch_is_divided_whole(settings: dict[str, Any], tp: int) -> None:
    plan, found = planned(*[nn.TransformerEncoderLayer(16, 4, 32, **settings) for _ in range(2)], tp=tp)

    assert plan.sharded_share == 1.0
    assert (found.heads, found.reduces) == (("self_attn.out_proj.weight",), ("linear2",))
    assert found.slices["self_attn.in_proj_weight"] == Slice.even(0, 48, tp, (16, 16, 16))
    assert found.slices["self_attn.out_proj.weight"] == Slice.even(1, 16, tp)


def test_heads_that_do_not_divide_stay_whole_and_say_so() -> None:
    plan = plan_tensor(Model(nn.TransformerEncoderLayer(14, 7, 32)), (torch.randn(2, 3, 14),), tp=2)

    assert plan.reasons == {"blocks.0": "self_attn.out_proj: 7 heads cannot be divided by 2"}
    assert plan.units["blocks.0"].reduces == ("linear2",)


class Weighed(nn.Module):
    """Attention of one sequence to another that returns its weights, with biases and other widths of keys."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **settings)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x[..., : self.attention.kdim]
        out, weights = self.attention(x, other, other, average_attn_weights=False)
        return x + out + weights.square().mean((1, 2, 3), keepdim=True).squeeze(1)


@pytest.mark.parametrize("settings", [{"kdim": 6, "vdim": 6}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_another_width_and_biases_and_weights(settings: dict[str, Any]) -> None:
    plan, found = planned(Weighed(**settings))

    assert plan.reasons == {}
    if "kdim" in settings:
        assert found.slices["attention.k_proj_weight"] == Slice.even(0, 16, 2)
    if "add_bias_kv" in settings:
        assert found.slices["attention.bias_k"] == Slice.even(2, 16, 2)


class Functional(nn.Module):
    """Layers that are never called: torch's function reads their tensors; a bias of heads is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.table = nn.Embedding(5, 4)
        self.gate = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        at = torch.arange(tokens)
        bias = self.table((at[:, None] - at[None]).clamp(-2, 2) + 2).permute(2, 0, 1)  # (heads, tokens, tokens)
        gates = self.gate(x.unflatten(-1, (4, 4))).transpose(1, 2)  # (num, heads, tokens, 1)
        mask = (gates * bias).flatten(0, 1)
        y = x.transpose(0, 1)
        packed = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        rest = {"training": self.training, "attn_mask": mask, "use_separate_proj_weight": True, "need_weights": False}
        weights = {f"{name}_proj_weight": getattr(self, name).weight for name in "qkv"}
        output = (self.o.weight, self.o.bias)
        out, _ = F.multi_head_attention_forward(
            y, y, y, 16, 4, torch.empty(0), packed, None, None, False, 0.1, *output, **rest, **weights
        )
        return x + out.transpose(0, 1)


def test_the_function_with_layers_of_its_own_is_divided() -> None:
    plan, found = planned(Functional())

    assert found.heads == ("o.weight",)
    assert {name: found.slices[f"{name}.bias"] for name in "qkv"} == dict.fromkeys("qkv", Slice.even(0, 16, 2))
    assert plan.sharded_share > 0.98


@pytest.mark.parametrize("heads", [4, 1])
def test_inference_does_not_choose_a_kernel_that_takes_weights_whole(heads: int) -> None:
    torch.manual_seed(0)
    unit = nn.TransformerEncoderLayer(16, heads, 32, batch_first=True)
    plan = plan_tensor(Model(unit), (X,), tp=2).units["blocks.0"]
    assert "linear2" in plan.reduces

    def run(group: TensorGroup) -> torch.Tensor:
        copied = twin(unit).eval()
        shard_unit(copied, plan, group)
        with torch.no_grad():
            out: torch.Tensor = copied(X)
        return out

    with torch.no_grad():
        whole = unit.eval()(X)
    for out in on_threads(2, run):
        torch.testing.assert_close(out, whole)
