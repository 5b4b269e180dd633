"""Mixtral with its experts divided is the model on one device; what cannot be divided is said before ranks start."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from shardwise.errors import LayoutError
from shardwise.launch import RankStarter
from shardwise.verify import verify


def mixtral() -> hf.MixtralForCausalLM:
    """Four experts, of which two see a token; the router's balance is part of the loss."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        use_cache=False,
    )
    model = hf.MixtralForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :5] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(
    "layout",
    [
        "ep=2",
        "ep=2,dp=2",
        pytest.param("ep=2,pp=2", marks=pytest.mark.slow),
        pytest.param("ep=2,tp=2", marks=pytest.mark.slow),
        "ep=2,tp=2,pp=2",
    ],
)
def test_mixtral_with_divided_experts_is_mixtral(layout: str, starter: RankStarter) -> None:
    comparison = verify(mixtral(), batch(), layout=layout, starter=starter, timeout_s=100)
    assert comparison.equal, str(comparison)
    assert comparison.gradient_error <= 1e-5
    divided, exchanged = comparison.experts
    assert "4 experts of 2 layers divided among 2 ranks, 2 on each; proven: " in divided
    assert "bytes a step between ranks, for 256 rows of experts" in exchanged
    assert "none is dropped" in str(comparison)


@pytest.mark.parametrize(
    ("layout", "match"), [("ep=6", "there are 4 experts and ep=6; use ep=4 or less"), ("ep=9", "9 .*samples|8 samples")]
)
def test_a_wrong_ep_is_refused_before_ranks_start(layout: str, match: str) -> None:
    with pytest.raises(LayoutError, match=match):
        verify(mixtral(), batch(), layout=layout)


def test_a_model_without_experts_is_refused_before_ranks_start() -> None:
    config = hf.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    with pytest.raises(LayoutError, match="LlamaForCausalLM has none that can be divided; use dp=2 instead of ep=2"):
        verify(hf.LlamaForCausalLM(config), batch(), layout="ep=2")
