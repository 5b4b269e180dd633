"""Generated tokens on every layout beside `generate` of transformers on one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf

from generated_texts import (
    BART_FORCES,
    SIZES,
    assert_tokens_of_transformers,
    bart,
    gemma,
    generated,
    lfm,
    llama,
    marian,
    mistral,
    program_of,
    prompts,
    settled,
    t5,
    wanted,
)
from shardwise.errors import BatchError, LayoutError, ModelError
from shardwise.execute.assemble import assemble
from shardwise.execute.generate_tokens import Choice, Forced
from shardwise.execute.generation import check_class, generate
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.testing import on_ranks


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
@on_ranks(2, timeout_s=240)
@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
@pytest.mark.parametrize(("make", "forced"), [(t5, None), (marian, None), (bart, BART_FORCES)])
def test_both_halves_of_an_encoder_decoder_are_divided(
    rank: RankContext, make: Callable[[], Any], forced: Forced | None, layout: str
) -> None:
    assert_tokens_of_transformers(make, layout, rank.rank, forced=forced)
    batch = prompts(padded=True, on_the_right=True)
    drawn = {"choice": Choice(temperature=1.3, top_p=0.9, seed=5), "forced": forced}
    tokens = generated(settled(make), layout, rank.rank, batch, **drawn).tokens
    if rank.rank == 0:
        assert tokens == generated(settled(make), "", 0, batch, **drawn).tokens


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


@pytest.mark.parametrize("kind", [tf.RwkvForCausalLM, tf.XLNetLMHeadModel, tf.ReformerModelWithLMHead])
def test_models_with_caches_of_their_own_are_refused_by_name(kind: type) -> None:
    with pytest.raises(ModelError, match=f"keeps a cache of transformers, but {kind.__name__} keeps another"):
        check_class(kind)


def test_a_model_that_cannot_generate_is_refused() -> None:
    model = tf.LlamaModel(tf.LlamaConfig(num_hidden_layers=2, **SIZES))
    tokens = torch.arange(3, 19).view(2, 8)
    program = assemble(
        model, {"input_ids": tokens}, layout=Layout(), rank=0, loss=lambda outputs, batch: outputs[0].float().mean()
    )
    with pytest.raises(ModelError, match="one of transformers with a head for it, but this is a LlamaModel"):
        generate(program, {"input_ids": tokens}, max_new_tokens=2)
    program.close()
