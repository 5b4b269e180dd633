"""Tiny models whose texts are long-winded, and what transformers' own `generate` continues them with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import transformers as tf

from shardwise.execute.assemble import assemble
from shardwise.execute.generate_tokens import Forced
from shardwise.execute.generation import Generated, generate
from shardwise.execute.program import Program
from shardwise.layout import Layout

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


def bart() -> Any:
    """The first and the last token are forced: see `BART_FORCES`."""
    sizes = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in
             (("layers", 2), ("attention_heads", HEADS), ("ffn_dim", 48))}  # fmt: skip
    tokens: dict[str, Any] = {"decoder_start_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    model = tf.BartForConditionalGeneration(
        tf.BartConfig(d_model=32, vocab_size=VOCABULARY, max_position_embeddings=64, **sizes, **tokens)
    )
    model.generation_config.update(forced_bos_token_id=BART_FORCES.first, forced_eos_token_id=BART_FORCES.last)
    return model


BART_FORCES = Forced(first=5, last=2)


@cache
def settled(make: Callable[[], Any]) -> Any:
    """The model with weights so large that what it says depends on what it has read."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, {marian: 0.15, bart: 0.15, t5: 0.6}.get(make, 0.3))
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


def assert_tokens_of_transformers(
    make: Callable[[], Any], layout: str, rank: int, *, padded: bool = True, **options: Any
) -> Generated:
    model = settled(make)
    batch = prompts(padded=padded, on_the_right=model.config.is_encoder_decoder)
    expected = wanted(model, batch)
    assert len({row[-6:] for row in expected}) > 1, "texts that end alike would also with the cache of another"
    got = generated(model, layout, rank, batch, **options)
    assert list(got.tokens) == expected
    return got
