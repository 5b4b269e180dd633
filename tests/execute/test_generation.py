"""Generated tokens on every layout beside `generate` of transformers on one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tf

from shardwise.errors import BatchError, LayoutError, ModelError
from shardwise.execute.assemble import assemble
from shardwise.execute.generate_tokens import Choice
from shardwise.execute.generation import Generated, generate
from shardwise.execute.program import Program
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks

TOKENS, VOCABULARY, HEADS = 14, 61, 4
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def llama() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(num_hidden_layers=3, **SIZES))


def mistral() -> Any:
    """Every layer sees the last 12 tokens: more than a prompt has."""
    return tf.MistralForCausalLM(tf.MistralConfig(num_hidden_layers=2, sliding_window=12, **SIZES))


def gemma() -> Any:
    """Layers with a window and layers without one, in turns."""
    kinds = ["sliding_attention", "full_attention"]
    config = tf.Gemma3TextConfig(num_hidden_layers=2, sliding_window=12, head_dim=8, layer_types=kinds, **SIZES)
    return tf.Gemma3ForCausalLM(config)


def lfm() -> Any:
    """Layers that keep a state, and layers with attention."""
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"], **SIZES))


def marian() -> Any:
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in
             (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", 48))}  # fmt: skip
    tokens: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "forced_eos_token_id": None,
        "tie_word_embeddings": False,
        "scale_embedding": True,
    }
    return tf.MarianMTModel(
        tf.MarianConfig(d_model=32, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **tokens)
    )


def t5() -> Any:
    """Its first layer computes a bias for all tokens so far, which the others add."""
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": HEADS, "vocab_size": VOCABULARY}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **tokens, tie_word_embeddings=False))


@cache
def settled(make: Callable[[], Any]) -> Any:
    """The model with weights so large that what it says depends on what it has read."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, {marian: 0.15, t5: 0.6}.get(make, 0.3))
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


def prompts(*, padded: bool, on_the_right: bool = False) -> dict[str, torch.Tensor]:
    """Four prompts of up to 9 tokens."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, VOCABULARY, (4, 9), generator=generator)
    mask = torch.ones_like(tokens)
    for row, missing in enumerate((0, 2, 5, 3) if padded else ()):
        empty = slice(9 - missing, 9) if on_the_right else slice(0, missing)
        tokens[row, empty] = mask[row, empty] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def wanted(model: Any, batch: dict[str, torch.Tensor], tokens: int = TOKENS) -> list[tuple[int, ...]]:
    """What transformers generates."""
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    begun = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    return [tuple(row) for row in out[:, begun:].tolist()]


def program_of(model: Any, layout: str, rank: int) -> Program:
    tokens = torch.arange(3, 19).view(2, 8)
    inputs = {"input_ids": tokens, "labels": tokens}
    return assemble(copy.deepcopy(model), inputs, layout=Layout.parse(layout), rank=rank)


def generated(model: Any, layout: str, rank: int, batch: dict[str, torch.Tensor], **options: Any) -> Generated:
    program = program_of(model, layout, rank)
    try:
        return generate(program, batch, **{"max_new_tokens": TOKENS, **options})
    finally:
        program.close()


def assert_tokens_of_transformers(make: Callable[[], Any], layout: str, rank: int, *, padded: bool = True) -> Generated:
    model = settled(make)
    batch = prompts(padded=padded, on_the_right=model.config.is_encoder_decoder)
    expected = wanted(model, batch)
    assert len({row[-6:] for row in expected}) > 1, "texts that end alike would also with the cache of another"
    got = generated(model, layout, rank, batch)
    assert list(got.tokens) == expected
    return got


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("make", [llama, mistral, gemma, lfm, marian, t5])
def test_one_device_generates_what_transformers_does(make: Callable[[], Any], padded: bool) -> None:
    assert_tokens_of_transformers(make, "", 0, padded=padded)


@on_ranks(2, timeout_s=240)
@pytest.mark.parametrize("layout", ["tp=2", "pp=2", "dp=2"])
def test_two_ranks_generate_what_transformers_does(rank: RankContext, layout: str) -> None:
    assert_tokens_of_transformers(llama, layout, rank.rank)


@on_ranks(2, timeout_s=240)
@pytest.mark.parametrize(
    "make", [gemma, t5, pytest.param(lfm, marks=pytest.mark.slow), pytest.param(marian, marks=pytest.mark.slow)]
)
def test_windows_states_and_encoders_are_kept_by_the_stage_of_their_layer(
    rank: RankContext, make: Callable[[], Any]
) -> None:
    got = assert_tokens_of_transformers(make, "pp=2", rank.rank)
    if rank.rank == 0:
        batch = prompts(padded=True, on_the_right=make in (marian, t5))
        whole = generated(settled(make), "", 0, batch, num_micro_batches=2)
        assert sum(each.cache_bytes for each in got.rates) == whole.rates[0].cache_bytes


@pytest.mark.slow
@on_ranks(4, timeout_s=240)
def test_shards_of_stages_generate_what_transformers_does(rank: RankContext) -> None:
    got = assert_tokens_of_transformers(llama, "tp=2,pp=2", rank.rank)
    assert len({each.cache_bytes for each in got.rates[:2]}) == 1


@on_ranks(2, timeout_s=240)
def test_texts_that_end_are_left_while_others_go_on(rank: RankContext) -> None:
    model, batch = settled(llama), prompts(padded=True)
    whole = wanted(model, batch)
    end = whole[1][3]
    assert end not in whole[0][:10]
    expected = [row[: row.index(end) + 1] if end in row else row for row in whole]
    told: dict[int, list[int]] = {}
    got = generated(
        model,
        "pp=2",
        rank.rank,
        batch,
        ends=(end,),
        told=lambda sample, token: told.setdefault(sample, []).append(token),
    )
    assert list(got.tokens) == expected
    assert {sample: tuple(row) for sample, row in told.items()} == dict(enumerate(expected))


@on_ranks(2, timeout_s=240)
def test_draws_do_not_know_the_layout(rank: RankContext) -> None:
    model, batch = settled(llama), prompts(padded=True)
    choice = Choice(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=5)
    expected = generated(model, "", 0, batch, choice=choice) if rank.rank == 0 else None
    for layout in ("tp=2", "pp=2"):
        got = generated(model, layout, rank.rank, batch, choice=choice)
        assert expected is None or got.tokens == expected.tokens, layout
    greedy = wanted(model, batch)
    assert expected is None or list(expected.tokens) != greedy


@on_ranks(2, timeout_s=240)
def test_the_micro_batches_do_not_matter(rank: RankContext) -> None:
    model, batch = settled(llama), prompts(padded=True)
    program = program_of(model, "pp=2", rank.rank)
    tokens = [generate(program, batch, max_new_tokens=6, num_micro_batches=parts).tokens for parts in (1, 3)]
    program.close()
    assert tokens[0] == tokens[1]
    assert [row[:6] for row in wanted(model, batch, 6)] == list(tokens[0])


@on_ranks(2, timeout_s=240)
def test_what_replicas_must_do_together_is_refused(rank: RankContext) -> None:
    program = program_of(settled(llama), "fsdp=2", rank.rank)
    with pytest.raises(LayoutError, match="generate from the checkpoint under a layout of dp, tp and pp"):
        generate(program, prompts(padded=False), max_new_tokens=2)
    program.close()


def test_wrong_prompts_are_named() -> None:
    program = program_of(settled(llama), "", 0)
    tokens = prompts(padded=False)["input_ids"]
    with pytest.raises(BatchError, match="max_new_tokens=0"):
        generate(program, {"input_ids": tokens}, max_new_tokens=0)
    with pytest.raises(BatchError, match=r"of shape \(prompts, tokens\)"):
        generate(program, {"input_ids": tokens[0]}, max_new_tokens=2)
    with pytest.raises(BatchError, match="attention_mask has the shape of input_ids"):
        generate(program, {"input_ids": tokens, "attention_mask": tokens[:2]}, max_new_tokens=2)
    program.close()


def test_a_model_that_cannot_generate_is_refused() -> None:
    model = tf.LlamaModel(tf.LlamaConfig(num_hidden_layers=2, **SIZES))
    tokens = torch.arange(3, 19).view(2, 8)
    program = assemble(
        model, {"input_ids": tokens}, layout=Layout(), rank=0, loss=lambda outputs, batch: outputs[0].float().mean()
    )
    with pytest.raises(ModelError, match="one of transformers with a head for it, but this is a LlamaModel"):
        generate(program, {"input_ids": tokens}, max_new_tokens=2)
    program.close()


def test_states_in_modules_are_not_mixed_by_micro_batches() -> None:
    config = tf.RecurrentGemmaConfig(num_hidden_layers=3, lru_width=32, attention_window_size=12, **SIZES)
    model = settled(lambda: tf.RecurrentGemmaForCausalLM(config))
    program, batch = program_of(model, "", 0), prompts(padded=False)
    assert list(generate(program, batch, max_new_tokens=4).tokens) == wanted(model, batch, 4)
    with pytest.raises(ModelError, match="leaves states in its modules, such as .*; use micro_batches=1"):
        generate(program, batch, max_new_tokens=4, num_micro_batches=2)
    program.close()
