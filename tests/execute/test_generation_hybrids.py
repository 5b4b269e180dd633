"""Models that keep more than keys and values: recurrent states beside attention, blocks that many layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers as tf

from generated_texts import (
    SIZES,
    VOCABULARY,
    assert_tokens_of_transformers,
    gemma,
    generated,
    lfm,
    llama,
    mistral,
    program_of,
    prompts,
    settled,
    wanted,
)
from shardwise.errors import ModelError
from shardwise.execute.generation import generate
from shardwise.launch import RankContext
from shardwise.testing import on_ranks

MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 4}


def recurrent_gemma() -> Any:
    """Keeps its states in attributes of its modules."""
    config = tf.RecurrentGemmaConfig(
        num_hidden_layers=4, lru_width=32, attention_window_size=12, block_types=["recurrent", "attention"], **SIZES
    )
    return tf.RecurrentGemmaForCausalLM(config)


def zamba() -> Any:
    """Layers with a state, and one attention block that two of them share."""
    config = tf.ZambaConfig(
        num_hidden_layers=5, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False, **SIZES
    )
    return tf.ZambaForCausalLM(config)


def zamba2() -> Any:
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    config = tf.Zamba2Config(
        num_hidden_layers=4, layers_block_type=kinds, mamba_d_state=8, n_mamba_heads=4, chunk_size=4,
        use_mamba_kernels=False, adapter_rank=4, num_mem_blocks=1, **SIZES,
    )  # fmt: skip
    return tf.Zamba2ForCausalLM(config)


def jamba() -> Any:
    """Layers with a state, attention, experts."""
    config = tf.JambaConfig(
        num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, num_experts=4, mamba_d_state=8,
        use_mamba_kernels=False, **SIZES,
    )  # fmt: skip
    return grouped(tf.JambaForCausalLM(config))


def qwen3_next() -> Any:
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    config = tf.Qwen3NextConfig(
        num_hidden_layers=4, layer_types=kinds, head_dim=8, linear_key_head_dim=8, linear_value_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, **SIZES,
    )  # fmt: skip
    return grouped(tf.Qwen3NextForCausalLM(config))


def mamba() -> Any:
    config = tf.MambaConfig(num_hidden_layers=3, hidden_size=32, state_size=8, vocab_size=VOCABULARY)
    return tf.MambaForCausalLM(config)


def mamba2() -> Any:
    config = tf.Mamba2Config(
        num_hidden_layers=3, hidden_size=32, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=4,
        vocab_size=VOCABULARY,
    )  # fmt: skip
    return tf.Mamba2ForCausalLM(config)


def falcon_h1() -> Any:
    """Attention and a state in every layer."""
    return tf.FalconH1ForCausalLM(tf.FalconH1Config(num_hidden_layers=2, mamba_d_ssm=64, **MAMBA2, **SIZES))


def bamba() -> Any:
    return tf.BambaForCausalLM(tf.BambaConfig(num_hidden_layers=4, attn_layer_indices=[1, 3], **MAMBA2, **SIZES))


def granite() -> Any:
    kinds = ["linear_attention", "full_attention"]
    config = tf.GraniteMoeHybridConfig(
        num_hidden_layers=2, layer_types=kinds, shared_intermediate_size=16, num_local_experts=4, **MAMBA2, **SIZES
    )
    return grouped(tf.GraniteMoeHybridForCausalLM(config))


def nemotron() -> Any:
    kinds = ["linear_attention", "mlp", "full_attention", "moe"]
    config = tf.NemotronHConfig(
        layers_block_type=kinds, head_dim=8, ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=2,
        chunk_size=4, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, n_routed_experts=4,
        use_mamba_kernels=False, **SIZES,
    )  # fmt: skip
    return grouped(tf.NemotronHForCausalLM(config))


def grouped(model: Any) -> Any:
    """Experts whose shapes do not depend on the routing."""
    model.set_experts_implementation("grouped_mm")
    return model


STATES_IN_MODULES, OTHERS = (
    [recurrent_gemma],
    [zamba, zamba2, jamba, qwen3_next, mamba, mamba2, falcon_h1, bamba, granite, nemotron],
)
MODELS = [*STATES_IN_MODULES, *(pytest.param(make, marks=pytest.mark.slow) for make in OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize("make", [*STATES_IN_MODULES, *OTHERS])
def test_one_device_generates_what_transformers_does(make: Callable[[], Any]) -> None:
    assert_tokens_of_transformers(make, "", 0)


@on_ranks(2, timeout_s=240)
@pytest.mark.parametrize("make", MODELS)
def test_two_stages_generate_what_transformers_does(rank: RankContext, make: Callable[[], Any]) -> None:
    assert_tokens_of_transformers(make, "pp=2", rank.rank)


@pytest.mark.slow
@on_ranks(2, timeout_s=240)
@pytest.mark.parametrize("make", [*STATES_IN_MODULES, *OTHERS])
def test_two_shards_generate_what_transformers_does(rank: RankContext, make: Callable[[], Any]) -> None:
    assert_tokens_of_transformers(make, "tp=2", rank.rank)


@pytest.mark.slow
@pytest.mark.timeout(600)
@on_ranks(2, timeout_s=580)
@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
@pytest.mark.parametrize("make", [llama, mistral, gemma, lfm, recurrent_gemma, jamba])
def test_256_tokens_behind_padded_prompts_are_those_of_transformers(
    rank: RankContext, make: Callable[[], Any], layout: str
) -> None:
    model, batch = settled(make), prompts(padded=True)
    assert list(generated(model, layout, rank.rank, batch, max_new_tokens=256).tokens) == wanted(model, batch, 256)


def test_states_in_modules_are_those_of_their_micro_batch_and_leave_the_model_as_it_was() -> None:
    model, batch = settled(recurrent_gemma), prompts(padded=False)
    program = program_of(model, "", 0)
    state = program.model.model.layers[0].temporal_block
    expected = [row[:4] for row in wanted(program.model, batch, 4)]  # leaves its states in the model
    assert state.conv1d_state is not None
    got = generate(program, batch, max_new_tokens=4, num_micro_batches=2)
    assert list(got.tokens) == expected
    assert state.conv1d_state is None
    assert state.rg_lru.recurrent_states is None
    program.close()


class _Remembers(tf.LlamaForCausalLM):
    """Keeps what it has seen in a dictionary."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        self.__dict__.setdefault("seen", {})["logits"] = outputs.logits
        return outputs


def test_states_in_containers_of_modules_are_refused() -> None:
    program = program_of(_Remembers(tf.LlamaConfig(num_hidden_layers=1, **SIZES)).eval(), "", 0)
    with pytest.raises(ModelError, match=r"an attribute that is a tensor, but .*seen\['logits'\] is one inside"):
        generate(program, prompts(padded=False), max_new_tokens=2)
    program.close()
