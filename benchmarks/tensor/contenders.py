"""The contenders: each takes the batch and leaves the gradients of the mean loss in its parameters.

A contender is made on every rank, from its own copy of the model. It knows neither clocks nor other contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Shard

from benchmarks.tensor.counted import Counted
from benchmarks.tensor.megatron_peer import MegatronDecoder
from benchmarks.tensor.model import Shape, batch_of, decoder_of, loss_of
from benchmarks.tensor.transformers_peer import llama_of, parallel_llama
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.layout import Layout

__all__ = [
    "CONTENDERS",
    "DTENSOR",
    "MEGATRON",
    "MEGATRON_WORDS",
    "MODELS",
    "OURS",
    "TRANSFORMERS",
    "Contender",
    "Tensors",
]

Tensors = Mapping[str, torch.Tensor]


class Contender(Protocol):
    """A model divided between two ranks."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Those of this rank."""

    def parts(self, wholes: Tensors) -> Tensors:
        """What of a model's whole values (or gradients), by its names, belongs to this rank's parameters."""

    def step(self, batch: Tensors) -> float:
        """Forward and backward; the mean loss."""

    def axes(self, counted: Counted) -> dict[str, int]:
        """Bytes of the collectives of the last step, by axis."""

    def close(self) -> None:
        """Let go of what it started."""


class Ours:
    """shardwise: the model and `tp=2`."""

    def __init__(self, model: nn.Module, shape: Shape, rank: int) -> None:
        self._program = assemble(model, batch_of(shape), layout=Layout(tp=2), rank=rank)
        self._weights = weigher(model)
        self._steps = 0
        self._tensor_bytes = 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._program.parameters

    def parts(self, wholes: Tensors) -> Tensors:
        divided = self._program.divided
        assert divided is not None
        return {name: divided.cut(name, whole) for name, whole in wholes.items()}

    def step(self, batch: Tensors) -> float:
        replicas = split(batch, micro_batches=1, replicas=1, weights=self._weights)
        self._steps += 1
        result = self._program.step(replicas[0], step=self._steps)
        self._tensor_bytes = sum(nbytes for kind, nbytes in result.sent_bytes.items() if kind.startswith("tp."))
        return result.loss

    def axes(self, counted: Counted) -> dict[str, int]:
        return {"tensor": self._tensor_bytes, "world": counted.world_nbytes}

    def close(self) -> None:
        self._program.close()


class Plain:
    """A model that divides its own work: called, and its loss sent backward."""

    def __init__(self, model: nn.Module, rank: int) -> None:
        self.model = model
        self._rank = rank
        self.parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())

    def parts(self, wholes: Tensors) -> Tensors:
        return {name: _part(self.parameters[name], whole, self._rank) for name, whole in wholes.items()}

    def step(self, batch: Tensors) -> float:
        loss = loss_of(self.model(**batch))
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def axes(self, counted: Counted) -> dict[str, int]:
        return {"tensor": counted.nbytes}

    def close(self) -> None:
        """Groups of peers end with their processes."""


class Megatron(Plain):
    """Megatron Core's layers; it packs q, k, v and gate, up, and says itself what of them is where."""

    def __init__(self, model: nn.Module, shape: Shape, rank: int, *, vocabulary: bool) -> None:
        self._decoder = MegatronDecoder(shape, rank, vocabulary=vocabulary)
        super().__init__(self._decoder, rank)
        given = self.parts({name: parameter.detach() for name, parameter in model.named_parameters()})
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(given[name])

    def parts(self, wholes: Tensors) -> Tensors:
        return self._decoder.parts(wholes)


def _part(parameter: nn.Parameter, whole: torch.Tensor, rank: int) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    (placement,) = parameter.placements
    return whole.chunk(2, placement.dim)[rank] if isinstance(placement, Shard) else whole


def _dtensor(model: nn.Module, shape: Shape, rank: int) -> Contender:
    """One all-reduce behind attention and SwiGLU, and one of the gradient of each of their inputs."""
    mesh = init_device_mesh("cpu", (2,))
    attention = PrepareModuleInput(
        input_layouts=(Replicate(), None, None), desired_input_layouts=(Replicate(), None, None)
    )
    mlp = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    columns = ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
    for block in model.get_submodule("layers").children():
        plan = {"attention": attention, "mlp": mlp, **{name: ColwiseParallel() for name in columns}}
        parallelize_module(block, mesh, {**plan, "attention.o": RowwiseParallel(), "mlp.down": RowwiseParallel()})
    return Plain(model, rank)


Maker = Callable[[nn.Module, Shape, int], Contender]

OURS, DTENSOR, TRANSFORMERS = "shardwise", "dtensor", "transformers"
MEGATRON, MEGATRON_WORDS = "megatron", "megatron, vocabulary"  # with whole and with divided embedding and head
CONTENDERS: Mapping[str, Maker] = {
    OURS: Ours,
    DTENSOR: _dtensor,
    MEGATRON: lambda model, shape, rank: Megatron(model, shape, rank, vocabulary=False),
    MEGATRON_WORDS: lambda model, shape, rank: Megatron(model, shape, rank, vocabulary=True),
    TRANSFORMERS: lambda model, shape, rank: Plain(parallel_llama(model), rank),
}
MODELS: Mapping[str, tuple[Callable[[Shape], nn.Module], tuple[str, ...]]] = {
    "decoder": (decoder_of, (OURS, DTENSOR, MEGATRON, MEGATRON_WORDS)),
    "llama": (llama_of, (OURS, TRANSFORMERS)),
}
