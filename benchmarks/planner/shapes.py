"""The numbers of a decoder, and of the shard of it that one rank computes. Arithmetic alone."""

from __future__ import annotations

import dataclasses
import math

__all__ = ["Architecture", "Shard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """A decoder of equal layers; mats: matrices of its MLP (3 where it is gated). experts: of every layer's MLP, of
    which each token sees `top_k`, beside `shared` width that all see; 0: dense."""

    layers: int
    hidden: int
    ffn: int
    mats: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared: int = 0

    @property
    def rotary(self) -> bool:
        """Whether positions are rotated into queries and keys: decoders with a gated MLP all do."""
        return self.mats == 3

    def tensors(self, layers: int) -> int:
        """Of so many layers, an embedding and a head: products and norms, with biases where the MLP is not gated."""
        return (6 if self.rotary else 12) * layers + 3

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp_parameters(self) -> int:
        """Of one layer, experts left out."""
        return self.hidden * self.mats * (self.shared if self.experts else self.ffn)

    @property
    def expert_parameters(self) -> int:
        """Of one layer, all experts."""
        return self.experts * self.hidden * self.mats * self.expert_ffn

    @property
    def layer_parameters(self) -> int:
        """All of one layer; two norms of a scale (and a shift where the MLP is not gated)."""
        norms = 2 * self.hidden * (1 if self.rotary else 2)
        return self.attention_parameters + self.mlp_parameters + self.expert_parameters + norms

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.layers * self.layer_parameters + self.vocab * self.hidden * (1 if self.tied else 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank of the tensor and context axes computes of a micro-batch. sequence: tokens of a sample that it has;
    whole: of all its context ranks; sp: whether tokens are divided among shards between the products."""

    arch: Architecture
    samples: int
    sequence: int
    whole: int
    tp: int
    cp: int
    ep: int
    sp: bool

    @property
    def tokens(self) -> int:
        """Of a micro-batch, on this rank of the context axis."""
        return self.samples * self.sequence

    @property
    def between(self) -> int:
        """Tokens that a shard has between the products."""
        return math.ceil(self.tokens / self.tp) if self.sp else self.tokens

    @property
    def heads(self) -> int:
        return max(1, self.arch.heads // self.tp)

    @property
    def kv_heads(self) -> int:
        return max(1, self.arch.kv_heads // self.tp)

    @property
    def ffn(self) -> int:
        return math.ceil(self.arch.ffn / self.tp)

    def vocab(self, padded: int) -> int:
        """Rows of the embedding on this shard; the whole is filled up to a multiple of `padded` times the shards."""
        step = padded * self.tp
        return math.ceil(self.arch.vocab / step) * step // self.tp
