"""Caches on a rank that runs a part of the units: lengths and windows advance for layers that are elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from shardwise.execute.generate_caches import (
    _JoiningShapes,
    copied,
    describe,
    empty_cache,
    held_bytes,
    recording,
    replay,
    stand_in,
)

CPU = torch.device("cpu")


def cache() -> Any:
    """A layer with a window of 4 tokens, and one without."""
    kinds = ["sliding_attention", "full_attention"]
    return tf.DynamicCache(config=tf.Gemma3TextConfig(num_hidden_layers=2, sliding_window=4, layer_types=kinds))


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(2, 3, tokens, 8), torch.ones(2, 3, tokens, 8)


def filled(*lengths: int) -> Any:
    made = cache()
    for tokens in lengths:
        for layer in range(2):
            made.update(*states(tokens), layer)
    return made


def test_what_was_noted_of_one_cache_advances_another_without_memory() -> None:
    known, elsewhere = cache(), cache()
    noted = recording(known, lambda: 7)
    for tokens in (3, 1, 1):
        noted.clear()
        for layer in range(2):
            known.update(*states(tokens), layer)
        assert list(noted) == [7]
        replay(noted[7], elsewhere)
    beside = filled(3, 1, 1)
    assert held_bytes([elsewhere]) == 0 < held_bytes([beside])
    assert elsewhere.get_seq_length() == beside.get_seq_length() == 5
    for layer in range(2):
        assert elsewhere.get_mask_sizes(1, layer) == beside.get_mask_sizes(1, layer)
        assert elsewhere.layers[layer].keys.shape == beside.layers[layer].keys.shape


def test_tensors_without_values_are_joined_as_torch_joins_them() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for tensors, dim in (
        ([meta(2, 3, 4, 8), meta(2, 3, 1, 8)], -2),
        ([meta(2, 3), meta(1, 3), meta(4, 3)], 0),
        ([meta(0), meta(2, 3, dtype=torch.bfloat16)], 0),  # what torch does with an empty one
        ([meta(2, 3), meta(2, 3, dtype=torch.bfloat16)], 1),
    ):
        expected = torch.cat(tensors, dim)
        with _JoiningShapes():
            got = torch.cat(tensors, dim=dim)
        assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    with _JoiningShapes(), pytest.raises(RuntimeError):
        torch.cat([meta(2, 3), meta(2, 4)], dim=0)
    with _JoiningShapes():
        assert torch.cat([torch.ones(2), torch.zeros(1)]).tolist() == [1, 1, 0]


def test_ticks_of_a_cache_are_noted_too() -> None:
    known = tf.EncoderDecoderCache(cache(), cache())
    elsewhere = copied(known)
    noted = recording(known, lambda: 1)
    known.cross_attention_cache.update(*states(6), 0)
    known.is_updated[0] = True
    replay(noted[1], elsewhere)
    assert elsewhere.is_updated[0]
    assert elsewhere.cross_attention_cache.get_seq_length(0) == 6
    assert elsewhere.self_attention_cache.get_seq_length(0) == 0


def test_a_stand_in_has_the_lengths_and_its_own_layers() -> None:
    known = filled(3)
    made = stand_in(known, CPU)
    made.update(*states(1), 0)
    assert (known.get_seq_length(), made.get_seq_length()) == (3, 4)
    assert held_bytes([stand_in(filled(1000), CPU)]) < held_bytes([filled(10)])


def test_passes_are_told_apart_by_windows_that_are_full_and_not_by_lengths() -> None:
    assert describe(filled(1)) == describe(filled(2))
    assert describe(filled(2)) != describe(filled(3))
    assert describe(filled(9)) == describe(filled(12))
    assert describe(cache()) != describe(filled(1))


def test_an_encoder_decoder_gets_a_cache_for_each_half() -> None:
    model = tf.T5ForConditionalGeneration(tf.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    made = empty_cache(model)
    assert len(made.self_attention_cache.layers) == len(made.cross_attention_cache.layers) == 2
