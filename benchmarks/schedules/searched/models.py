"""What the units of published models cost: counted from their configurations. Knows neither stages nor ranks.

A unit is an embedding, a block or a head. Multiplications by a weight are counted with 2 flops a multiply-add: as many
for the input gradient and for the weight gradient as for the forward. Attention (scores and values, 4 x tokens^2 x
width of all heads, half of it where causal) has no weights: its backward is twice its forward and belongs to the input
gradient. What is bound by memory instead, the look-up and the update of embeddings and the cross-entropy over the
vocabulary, is counted in bytes. bfloat16, attention that does not keep its scores.

Kept from forward to backward (Korthikanti et al., arXiv:2205.05198, without the attention matrix): 34 bytes a token
and hidden unit, of which W reads 32 (Qi et al., arXiv:2401.10241, table 2); the head keeps its input and the logits'
gradient, both of which W reads, and the logits in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MODELS", "Model", "Unit"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """flops and bytes moved of F, I and W; bytes kept, and the part that W reads; bytes sent to the next unit."""

    flops: tuple[float, float, float]
    moved_bytes: tuple[float, float, float] = (0.0, 0.0, 0.0)
    kept_bytes: float
    late_bytes: float
    sent_bytes: float


@dataclass(frozen=True, kw_only=True)
class Model:
    """The units of one micro-batch in order, and where the numbers are from."""

    name: str
    source: str
    units: tuple[Unit, ...]


def _block(*, tokens: int, hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int, causal: bool) -> Unit:
    """mlp: the widths of its matrices, added up: two of them, or three where it is gated."""
    width = heads * head_dim
    weights = hidden * (2 * width + 2 * kv_heads * head_dim) + hidden * mlp
    linear = 2.0 * tokens * weights
    attention = 4.0 * tokens * tokens * width / (2 if causal else 1)
    kept = float(tokens * hidden)
    return Unit(
        flops=(linear + attention, linear + 2 * attention, linear),
        kept_bytes=34 * kept,
        late_bytes=32 * kept,
        sent_bytes=2 * kept,
    )


def _embedding(*, tokens: int, hidden: int) -> Unit:
    moved = 4.0 * tokens * hidden
    return Unit(
        flops=(0.0, 0.0, 0.0),
        moved_bytes=(moved, 0.0, 2 * moved),
        kept_bytes=8.0 * tokens,
        late_bytes=8.0 * tokens,
        sent_bytes=2.0 * tokens * hidden,
    )


def _head(*, tokens: int, hidden: int, vocabulary: int) -> Unit:
    linear = 2.0 * tokens * hidden * vocabulary
    logits = float(tokens * vocabulary)
    return Unit(
        flops=(linear, linear, linear),
        moved_bytes=(10 * logits, 6 * logits, 0.0),  # cast, log-sum-exp; gradient of the logits
        kept_bytes=6 * logits + 2.0 * tokens * hidden,
        late_bytes=2 * logits + 2.0 * tokens * hidden,
        sent_bytes=0.0,
    )


def _patches(*, tokens: int, hidden: int, patch: int) -> Unit:
    linear = 2.0 * tokens * hidden * 3 * patch * patch
    return Unit(
        flops=(linear, 0.0, linear),
        kept_bytes=6.0 * tokens * patch * patch,
        late_bytes=6.0 * tokens * patch * patch,
        sent_bytes=2.0 * tokens * hidden,
    )


def _join(*, tokens: int, inputs: int, hidden: int, text: int) -> Unit:
    """The projection of image tokens, and the embedding of the text beside them."""
    linear = 2.0 * tokens * (inputs * hidden + hidden * hidden)
    words = _embedding(tokens=text, hidden=hidden)
    kept = 2.0 * tokens * (inputs + 2 * hidden)
    return Unit(
        flops=(linear, linear, linear),
        moved_bytes=words.moved_bytes,
        kept_bytes=kept,
        late_bytes=kept,
        sent_bytes=2.0 * (tokens + text) * hidden,
    )


def _model(name: str, source: str, *parts: Sequence[Unit]) -> Model:
    return Model(name=name, source=source, units=tuple(unit for part in parts for unit in part))


def _gpt2() -> Model:
    tokens, hidden = 1024 * 8, 768
    block = _block(tokens=1024, hidden=hidden, heads=12, kv_heads=12, head_dim=64, mlp=2 * 3072, causal=True)
    return _model(
        "gpt2",
        "openai-community/gpt2, config.json: 12 blocks of 768, vocabulary 50257; 8 sequences of 1024",
        [_embedding(tokens=tokens, hidden=hidden)],
        [_times(block, 8)] * 12,
        [_head(tokens=tokens, hidden=hidden, vocabulary=50257)],
    )


def _gemma() -> Model:
    tokens, hidden = 4096, 2048
    block = _block(tokens=tokens, hidden=hidden, heads=8, kv_heads=1, head_dim=256, mlp=3 * 16384, causal=True)
    return _model(
        "gemma-2b",
        "google/gemma-2b, config.json: 18 blocks of 2048, 1 key-value head, MLP 16384, vocabulary 256000; 4096 tokens",
        [_embedding(tokens=tokens, hidden=hidden)],
        [block] * 18,
        [_head(tokens=tokens, hidden=hidden, vocabulary=256000)],
    )


def _llama() -> Model:
    tokens, hidden = 4096, 4096
    block = _block(tokens=tokens, hidden=hidden, heads=32, kv_heads=8, head_dim=128, mlp=3 * 14336, causal=True)
    return _model(
        "llama-3-8b",
        "meta-llama/Meta-Llama-3-8B, config.json: 32 blocks of 4096, 8 key-value heads, MLP 14336, vocabulary 128256; "
        "4096 tokens",
        [_embedding(tokens=tokens, hidden=hidden)],
        [block] * 32,
        [_head(tokens=tokens, hidden=hidden, vocabulary=128256)],
    )


def _llava() -> Model:
    patches, text = 576, 1472
    tower = _block(tokens=577, hidden=1024, heads=16, kv_heads=16, head_dim=64, mlp=2 * 4096, causal=False)
    tokens, hidden = patches + text, 4096
    block = _block(tokens=tokens, hidden=hidden, heads=32, kv_heads=32, head_dim=128, mlp=3 * 11008, causal=True)
    return _model(
        "llava-1.5-7b",
        "llava-hf/llava-1.5-7b-hf, config.json: 24 blocks of 1024 on 577 patches, then 32 blocks of 4096, MLP 11008, "
        "vocabulary 32064; 2048 tokens of which one image",
        [_patches(tokens=577, hidden=1024, patch=14)],
        [tower] * 24,
        [_join(tokens=patches, inputs=1024, hidden=hidden, text=text)],
        [block] * 32,
        [_head(tokens=tokens, hidden=hidden, vocabulary=32064)],
    )


def _qwen2_vl() -> Model:
    patches, text = 4096, 1024
    tower = _block(tokens=patches, hidden=1280, heads=16, kv_heads=16, head_dim=80, mlp=2 * 5120, causal=False)
    tokens, hidden = patches // 4 + text, 1536
    block = _block(tokens=tokens, hidden=hidden, heads=12, kv_heads=2, head_dim=128, mlp=3 * 8960, causal=True)
    return _model(
        "qwen2-vl-2b",
        "Qwen/Qwen2-VL-2B-Instruct, config.json: 32 blocks of 1280 on 4096 patches, merged by 4, then 28 blocks of "
        "1536, 2 key-value heads, MLP 8960, vocabulary 151936; 2048 tokens of which one image of 896 x 896",
        [_patches(tokens=patches, hidden=1280, patch=14)],
        [tower] * 32,
        [_join(tokens=patches // 4, inputs=5120, hidden=hidden, text=text)],
        [block] * 28,
        [_head(tokens=tokens, hidden=hidden, vocabulary=151936)],
    )


def _times(unit: Unit, count: int) -> Unit:
    """So many sequences at once."""
    f, i, w = (count * x for x in unit.flops)
    return Unit(
        flops=(f, i, w),
        kept_bytes=count * unit.kept_bytes,
        late_bytes=count * unit.late_bytes,
        sent_bytes=count * unit.sent_bytes,
    )


MODELS = {model.name: model for model in (_gpt2(), _gemma(), _llama(), _llava(), _qwen2_vl())}
