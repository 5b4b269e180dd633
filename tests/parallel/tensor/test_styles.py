"""Every style of transformers is known by name: what it divides, or why it is refused and what to write instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import transformers as hf
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

from parallel.tensor.blocks import Model
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.errors import LayoutError, ModelError
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.styles import STYLES, with_style

TOKENS = torch.arange(2, 22).view(2, 10)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)
        self.table = nn.Embedding(7, 4, padding_idx=5)
        self.stacked = nn.Parameter(torch.zeros(3, 8, 4))


def said(name: str, style: str, leaf: str = "") -> UnitPlan:
    return with_style(UnitPlan(), Unit(), name, style, tp=2, leaf=leaf, within="blocks.0")


@pytest.mark.parametrize("style", sorted(ALL_PARALLEL_STYLES.keys()))
def test_a_style_is_mapped_or_refused_with_a_repair(style: str) -> None:
    if style in STYLES:
        return
    with pytest.raises(ModelError, match=rf"blocks.0.layer is '{style}': .*(take this line out|leave the plan out)"):
        said("layer", style)


def test_columns_and_rows() -> None:
    columns, rows = said("layer", "colwise"), said("layer", "rowwise")

    assert columns.slices == {"layer.weight": Slice.even(0, 12, 2), "layer.bias": Slice.even(0, 12, 2)}
    assert rows.slices == {"layer.weight": Slice.even(1, 8, 2)}
    assert rows.reduces == ("layer",)


def test_packed_columns_have_a_run_of_each_half() -> None:
    part = said("layer", "packed_colwise").slices["layer.weight"]
    assert part.ranges == (((0, 3), (6, 9)), ((3, 6), (9, 12)))


def test_tables_are_divided_by_rows_of_any_number_and_know_their_padding() -> None:
    plan = said("table", "embedding_rowwise")
    assert plan.slices["table.weight"].ranges == (((0, 3),), ((3, 7),))
    assert plan.attributes["table", "padding_idx"] == (None, 2)


def test_parameters_of_experts_are_cut_behind_the_experts() -> None:
    assert said("", "packed_colwise", "stacked").slices["stacked"] == Slice.even(1, 8, 2, (4, 4))
    assert said("", "rowwise", "stacked").slices["stacked"] == Slice.even(2, 4, 2)


def test_a_layer_that_does_not_divide_and_a_table_that_is_none_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"blocks.0.stacked is 'colwise' on 3 ranks: parts \(8,\) of 8"):
        with_style(UnitPlan(), Unit(), "", "colwise", tp=3, leaf="stacked", within="blocks.0")
    with pytest.raises(ModelError, match=r"only tables are embedding_rowwise; blocks.0.layer is a Linear"):
        said("layer", "embedding_rowwise")


def test_columns_joined_and_rows_of_whole_inputs_prove_a_block_that_takes_its_input_apart() -> None:
    class Chunked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up, self.down = nn.Linear(8, 24), nn.Linear(12, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up(x).chunk(2, -1)
            return x + self.down(torch.relu(gate) * up)

    words = {"gate_up": "colwise_gather_output", "down": "rowwise_split_input"}
    plan = plan_tensor(Model(Chunked()), (torch.randn(3, 8),), tp=2, tp_plan=words)
    assert plan.sharded_share == 1.0


def test_the_plan_that_experts_with_compressed_keys_carry_is_proven() -> None:
    config = hf.DeepseekV3Config(
        vocab_size=99, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=0,
    )  # fmt: skip
    model = hf.DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    attention = {
        "layers.*.self_attn.q_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
        "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }

    plan = plan_tensor(model, TEXT, tp=2, tp_plan={**model.tp_plan, **attention})

    assert {"mlp.experts.gate_up_proj", "self_attn.kv_b_proj.weight"} <= plan.units["model.layers.0"].slices.keys()
