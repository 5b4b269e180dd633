"""The decoder of Megatron Core's layers, on CPU tensors. Megatron is imported when one is made: it lives in an
environment of its own.

    qkv  [q of rank t | k of rank t | v of rank t]      fc1  [gate of rank t | up of rank t]

With `vocabulary`, embedding and head are divided too, and the cross-entropy is Megatron's, of divided logits.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.tensor.model import Decoder, Shape, attended

__all__ = ["MegatronDecoder", "packed"]

_PACKED = {"attention.qkv": ("attention.q", "attention.k", "attention.v"), "mlp.fc1": ("mlp.gate", "mlp.up")}
_ROWS = {"attention.proj": "attention.o", "mlp.fc2": "mlp.down"}


class _Attention(nn.Module):
    def __init__(self, shape: Shape, make: _Layers) -> None:
        super().__init__()
        self.head_dim = shape.hidden // shape.heads
        self.qkv = make.column(shape.hidden, 3 * shape.hidden)
        self.proj = make.row(shape.hidden, shape.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x)[0].chunk(3, dim=-1)
        out: torch.Tensor = self.proj(attended(query, key, value, self.head_dim, cos, sin))[0]
        return out


class _SwiGLU(nn.Module):
    def __init__(self, shape: Shape, make: _Layers) -> None:
        super().__init__()
        self.fc1 = make.column(shape.hidden, 2 * shape.width)
        self.fc2 = make.row(shape.width, shape.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc1(x)[0].chunk(2, dim=-1)
        out: torch.Tensor = self.fc2(F.silu(gate) * up)[0]
        return out


class _Layers:
    """Makes Megatron's layers for two ranks, without biases, their values to be given."""

    def __init__(self) -> None:
        parallel_state: Any = importlib.import_module("megatron.core.parallel_state")
        self._layers: Any = importlib.import_module("megatron.core.tensor_parallel.layers")
        config: Any = importlib.import_module("megatron.core.model_parallel_config").ModelParallelConfig
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, create_gloo_process_groups=False)
        self.cross_entropy: Any = importlib.import_module("megatron.core.tensor_parallel").vocab_parallel_cross_entropy
        self._options: dict[str, Any] = {
            "config": config(
                tensor_model_parallel_size=2,
                use_cpu_initialization=True,
                perform_initialization=False,
                gradient_accumulation_fusion=False,
                async_tensor_model_parallel_allreduce=True,
            ),
            "init_method": nn.init.zeros_,
        }

    def embedding(self, vocabulary: int, width: int) -> nn.Module:
        layer: nn.Module = self._layers.VocabParallelEmbedding(vocabulary, width, **self._options)
        return layer

    def column(self, width_in: int, width_out: int) -> nn.Module:
        layer: nn.Module = self._layers.ColumnParallelLinear(
            width_in, width_out, bias=False, gather_output=False, **self._options
        )
        return layer

    def row(self, width_in: int, width_out: int) -> nn.Module:
        layer: nn.Module = self._layers.RowParallelLinear(
            width_in, width_out, bias=False, input_is_parallel=True, skip_bias_add=False, **self._options
        )
        return layer


class MegatronDecoder(Decoder):
    """A `Decoder` whose blocks are divided by Megatron's layers; norms are whole, the vocabulary is if it is to be."""

    def __init__(self, shape: Shape, rank: int, *, vocabulary: bool) -> None:
        super().__init__(shape)
        make = _Layers()
        self._rank = rank
        self._cross_entropy = make.cross_entropy if vocabulary else None
        for layer in self.layers:
            layer.attention = _Attention(shape, make)
            layer.mlp = _SwiGLU(shape, make)
        if vocabulary:
            self.embed = make.embedding(shape.vocabulary, shape.hidden)
            self.head = make.column(shape.hidden, shape.vocabulary)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._cross_entropy is None:
            return super().forward(input_ids, labels)
        x = self.norm(self.hidden(input_ids))
        losses: torch.Tensor = self._cross_entropy(self.head(x)[0], labels)
        return losses.mean()

    def parts(self, wholes: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of a `Decoder`'s whole tensors stands where in this rank's parameters."""
        sizes = {name: parameter.shape[0] for name, parameter in self.named_parameters()}
        found = {name: packed(name, wholes, rank=self._rank) for name in sizes}
        return {name: part if len(part) == sizes[name] else part.chunk(2)[self._rank] for name, part in found.items()}


def packed(name: str, wholes: Mapping[str, torch.Tensor], *, rank: int) -> torch.Tensor:
    """What of a `Decoder`'s whole tensors the parameter `name` of a `MegatronDecoder` holds on `rank`."""
    names = name.split(".")
    block, kind = ".".join(names[:2]), ".".join(names[2:4])
    if kind in _PACKED:
        return torch.cat([wholes[f"{block}.{of}.weight"].chunk(2, 0)[rank] for of in _PACKED[kind]])
    if kind in _ROWS:
        return wholes[f"{block}.{_ROWS[kind]}.weight"].chunk(2, 1)[rank]
    return wholes[name]
