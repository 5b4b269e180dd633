"""Plans that someone wrote: right ones get a proof, wrong ones are refused by name before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

from parallel.tensor.blocks import Block, Model, hand_plan
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import LayoutError, ModelError
from shardwise.parallel.tensor.check_plan import check_plan
from shardwise.parallel.tensor.written_plan import written_plan

TOKENS = torch.arange(2, 22).view(2, 10)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}
UNITS = ("model.layers.0", "model.layers.1")


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )


def checked(model: nn.Module, **changes: Any) -> TensorPlan:
    words = {**model.config.base_model_tp_plan, **changes}
    kept = {pattern: style for pattern, style in words.items() if style}
    return check_plan(model, TEXT, written_plan(model, kept, UNITS, tp=2))


def test_the_plan_that_a_model_carries_is_proven() -> None:
    plan = checked(qwen3())

    assert all("error" in str(unit.proof) for unit in plan.units.values())
    assert len(plan.units["model.layers.0"].slices) == 7


def test_rows_and_columns_swapped_are_refused_by_name() -> None:
    swapped = {"layers.*.mlp.up_proj": "rowwise", "layers.*.mlp.down_proj": "colwise"}

    with pytest.raises(ModelError, match=r"the plan of model.layers.0 (on 2 ranks|does not run)"):
        checked(qwen3(), **swapped)


def test_a_norm_whose_gradient_is_not_summed_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"model.layers.0 .* gradient of self_attn.q_norm.weight differs"):
        checked(qwen3(), **{"layers.*.self_attn.q_norm": ""})


def test_a_row_left_out_is_refused() -> None:
    with pytest.raises(ModelError, match=r"the plan of model.layers.0 does not run on 2 ranks"):
        checked(qwen3(), **{"layers.*.self_attn.o_proj": ""})


def test_a_width_that_does_not_divide_is_refused() -> None:
    model = qwen3()

    with pytest.raises(LayoutError, match=r"\(64,\) of 64 are divided evenly among 3"):
        written_plan(model, {"layers.*.mlp.down_proj": "rowwise"}, UNITS, tp=3)


def test_unknown_styles_and_modules_are_refused() -> None:
    model = qwen3()

    with pytest.raises(ModelError, match="'spiral'"):
        written_plan(model, {"layers.*.mlp.down_proj": "spiral"}, UNITS, tp=2)
    with pytest.raises(ModelError, match="no module is called 'layers.*.nothing'"):
        written_plan(model, {"layers.*.nothing": "rowwise"}, UNITS, tp=2)


def test_a_unit_that_is_not_there_is_refused() -> None:
    plan = TensorPlan(tp=2, units={"blocks.7": hand_plan()}, reasons={}, sharded_share=0.0)

    with pytest.raises(ModelError, match="'blocks.7' is none"):
        check_plan(Model(Block()), (torch.randn(2, 3, 16),), plan)
