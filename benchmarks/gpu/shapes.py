"""The models of the benchmark, and what a step of one costs in floating-point operations. Arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["SHAPES", "Shape", "peak_flops"]

# Dense bfloat16 products a second, from data sheets; the first name counts that a device's name contains.
_PEAKS = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("B200", 2250e12),
    ("L40", 181e12),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama-like decoder, and the batch of a step: `batch` samples of `sequence` tokens."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    sequence: int
    batch: int

    @property
    def config(self) -> dict[str, Any]:
        """As transformers' LlamaConfig takes it; embedding and head share a table."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.sequence,
            "tie_word_embeddings": True,
            "use_cache": False,
            "attn_implementation": "sdpa",
        }

    @property
    def num_multiplied(self) -> int:
        """Parameters that every token is multiplied with: those of blocks, and the head."""
        size = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * size * self.key_value_heads
        block = attention + 3 * self.hidden * self.intermediate
        return self.layers * block + self.hidden * self.vocabulary

    @property
    def flops_a_token(self) -> float:
        """Forward and backward: 6 a parameter, and 12 * layers * hidden * sequence for attention, which is counted
        whole though half of it is masked (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)."""
        return 6.0 * self.num_multiplied + 12.0 * self.layers * self.hidden * self.sequence

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.sequence


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tiny": Shape(
            hidden=32, intermediate=64, layers=2, heads=4, key_value_heads=2, vocabulary=128, sequence=16, batch=2
        ),
        "1b": Shape(
            hidden=2048,
            intermediate=8192,
            layers=16,
            heads=32,
            key_value_heads=8,
            vocabulary=128256,
            sequence=4096,
            batch=4,
        ),
        "3b": Shape(
            hidden=3072,
            intermediate=8192,
            layers=28,
            heads=24,
            key_value_heads=8,
            vocabulary=128256,
            sequence=4096,
            batch=2,
        ),
    }
)


def peak_flops(device: str) -> float | None:
    """Products in bfloat16 that a device of this name can do in a second; None where nobody has written it down."""
    return next((peak for name, peak in _PEAKS if name.lower() in device.lower()), None)
