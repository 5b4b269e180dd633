"""transformers' Llama in the sizes of this benchmark, and batches. Knows no parallelism.

transformers is imported when a model is made.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

__all__ = ["SHAPES", "Shape", "batch_of", "llama_of"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model, and the sequence that one device has."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    width: int  # of the SwiGLU
    blocks: int
    vocabulary: int
    sequence: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="quick", hidden=64, heads=4, kv_heads=2, width=176, blocks=2, vocabulary=256, sequence=64),
        Shape(name="full", hidden=256, heads=8, kv_heads=4, width=704, blocks=4, vocabulary=2048, sequence=1024),
    )
}


def llama_of(shape: Shape, longest: int) -> nn.Module:
    """`LlamaForCausalLM` for sequences of up to `longest` tokens, the same on every rank."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=longest,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def batch_of(shape: Shape, sequence: int) -> dict[str, torch.Tensor]:
    """One sample: `input_ids` and `labels`, (1, sequence) each."""
    ids = torch.randint(0, shape.vocabulary, (1, sequence), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}
