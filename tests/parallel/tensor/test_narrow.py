"""Blocks that are too large to be proven whole: narrow instances give the plan that the block's own proof gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

from parallel.tensor.blocks import Block, Model, call_of
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.errors import LayoutError, ModelError
from shardwise.parallel.tensor import check_plan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.lift import lifted
from shardwise.parallel.tensor.narrow_config import narrow_config
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.proof_bytes import bytes_to_prove

TOKENS = torch.arange(2, 22).view(2, 10)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}


def llama() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=99, num_hidden_layers=1, attention_dropout=0.1, **sizes))


def gpt2() -> Any:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=99, n_embd=128, n_layer=1, n_head=8, n_positions=32))


def phi3() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    return hf.Phi3ForCausalLM(hf.Phi3Config(vocab_size=99, num_hidden_layers=1, pad_token_id=0, **sizes))


def gpt_neox() -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}
    return hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=99, num_hidden_layers=1, **sizes))


def deepseek() -> Any:
    config = hf.DeepseekV3Config(
        vocab_size=99, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, n_routed_experts=16, n_group=2, topk_group=1,
        num_experts_per_tok=2, kv_lora_rank=64, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=32,
        v_head_dim=32, first_k_dense_replace=0,
    )  # fmt: skip
    model = hf.DeepseekV3ForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


@pytest.mark.parametrize("made", [llama, gpt2, phi3, gpt_neox, deepseek])
def test_the_narrow_plan_is_the_plan_of_the_block_itself(made: Callable[[], Any]) -> None:
    model = made()
    whole, narrow = plan_tensor(model, TEXT, tp=2), plan_tensor(model, TEXT, tp=2, proof_bytes=1)

    assert narrow.units.keys() == whole.units.keys()
    for unit, plan in narrow.units.items():
        known = whole.units[unit]
        assert known.proof is not None
        assert plan.proof is not None
        if list(model.get_submodule(unit).children()):
            assert plan.proof.on.startswith("two narrow instances (the block has")
            assert plan.proof.error < 1e-9
        assert dataclasses.replace(plan, proof=None) == dataclasses.replace(known, proof=None)


def test_words_of_a_large_block_are_proven_in_narrow_instances_or_refused() -> None:
    model = llama()
    words = dict(model.tp_plan)

    plan = plan_tensor(model, TEXT, tp=2, tp_plan=words, proof_bytes=1)
    assert plan.units["model.layers.0"].slices["self_attn.k_proj.weight"] == Slice.even(0, 64, 2)
    assert plan.units["model.layers.0"].proof is not None
    assert plan.units["model.layers.0"].proof.start_up

    del words["model.layers.*.self_attn.o_proj"]
    with pytest.raises(ModelError, match=r"the plan of model.layers.0 does not run on 2 ranks: it fails in .*o_proj"):
        plan_tensor(model, TEXT, tp=2, tp_plan=words, proof_bytes=1)
    with pytest.raises(ModelError, match=r"that of blocks.0 cannot be: the block has .* no config to narrow"):
        plan_tensor(Model(Block()), (torch.randn(2, 3, 16),), tp=2, tp_plan={"down": "rowwise"}, proof_bytes=1)


def test_a_large_block_s_plan_as_a_value_is_for_its_ranks_to_prove_and_an_altered_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = llama()
    plan = plan_tensor(model, TEXT, tp=2, proof_bytes=1)
    unit = plan.units["model.layers.0"]
    kept = {"model.layers.0": unit}
    monkeypatch.setattr(check_plan, "bytes_to_prove", lambda kind, tp: 2**60)

    again = plan_tensor(model, TEXT, tp=2, tp_plan=dataclasses.replace(plan, units=kept))
    assert again.units["model.layers.0"] == unit

    altered = dataclasses.replace(unit, reduces=unit.reduces[:1])
    with pytest.raises(ModelError, match=r"that of model.layers.0 would take 1024 PiB"):
        plan_tensor(model, TEXT, tp=2, tp_plan=dataclasses.replace(plan, units={"model.layers.0": altered}))


def test_a_block_without_a_config_stays_whole_and_says_what_its_proof_would_take() -> None:
    plan = plan_tensor(Model(Block()), (torch.randn(2, 3, 16),), tp=2, proof_bytes=1)

    assert not plan.units
    assert "its own proof would take" in plan.reasons["blocks.0"]
    assert "the model has no config to narrow" in plan.reasons["blocks.0"]


def test_a_proof_takes_memory_by_parameters_ranks_and_activations() -> None:
    def kind(width: int) -> Kind:
        return Kind(unit="b", module=Block(width), units=["b"], calls=[call_of(2, 3, width)], tied=frozenset())

    few, many = kind(16), kind(64)
    assert 15 * bytes_to_prove(few, 2) < 16 * bytes_to_prove(many, 2)
    assert bytes_to_prove(few, 2) < bytes_to_prove(few, 8)
    assert bytes_to_prove(few, 2) > 8 * 6 * sum(p.numel() for p in few.module.parameters())


class Packed(nn.Module):
    """Parts of one projection that do not grow alike."""

    def __init__(self, *parts: int) -> None:
        super().__init__()
        self.heads = parts[0]
        self.packed = nn.Linear(4, sum(parts))


def packed(*parts: int) -> Kind:
    return Kind(unit="b", module=Packed(*parts), units=["b"], calls=[], tied=frozenset())


def test_what_does_not_grow_to_whole_numbers_is_refused() -> None:
    narrow = UnitPlan(slices={"packed.weight": Slice.even(0, 12, 2, (8, 4))})

    grown = lifted(narrow, packed(8, 4), packed(16, 8)).slices["packed.weight"]
    assert grown == Slice.even(0, 24, 2, (16, 8))
    with pytest.raises(LayoutError, match=r"packed.weight in the narrow instance has no whole number"):
        lifted(narrow, packed(8, 4), packed(8, 5))


def test_attributes_grow_as_their_whole() -> None:
    plan = UnitPlan(attributes={("", "heads"): (4, 4)})
    assert lifted(plan, packed(8, 4), packed(24, 4)).attributes == {("", "heads"): (12, 12)}


def test_the_second_instance_grows_each_kind_of_size_by_another_prime() -> None:
    config = deepseek().config
    one, two = (narrow_config(config, tp=2, num_layers=1, grown=grown) for grown in (False, True))

    assert (one.num_hidden_layers, one.n_routed_experts) == (1, 4)
    assert two.n_routed_experts == 2 * one.n_routed_experts
    assert two.num_attention_heads == 3 * one.num_attention_heads == 3 * 2
    assert two.moe_intermediate_size == 7 * one.moe_intermediate_size
    assert two.kv_lora_rank == 11 * one.kv_lora_rank
