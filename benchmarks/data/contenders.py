"""The contenders: each trains on its rank's share of a batch, one whole step at a time, the optimizer's included.

A contender is made on every rank, from its own copy of the model. It knows neither clocks nor other contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.data.deepspeed_peer import DeepSpeedZero
from benchmarks.data.megatron_peer import MegatronData
from benchmarks.data.setting import ADAMW, CLIP, RANKS, Setting
from benchmarks.pipeline.model import Decoder
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.scaled_step import step_scaled
from shardwise.execute.weights import weigher
from shardwise.layout import Layout
from shardwise.parallel.states import State

__all__ = ["CONTENDERS", "GROUPS", "OPTIONAL", "Contender", "Ours", "TorchData"]

Batch = Mapping[str, torch.Tensor]


class Contender(Protocol):
    """Takes a rank's share of a batch; the loss is that of the share, or of the whole batch (`of_all`)."""

    of_all: bool

    def step(self, share: Batch) -> float:
        """Forward, backward, sums, clipping, AdamW; the loss before it."""

    def close(self) -> None:
        """Give groups and hooks back."""


class Ours:
    """shardwise: the whole model is given, and a layout."""

    of_all = True

    def __init__(self, model: Decoder, setting: Setting, rank: int, layout: str) -> None:
        sample = torch.zeros(setting.sequences, setting.shape.sequence, dtype=torch.int64)
        self.program = assemble(
            model, {"ids": sample, "labels": sample}, layout=Layout.parse(layout + ",micro_batches=1"), rank=rank
        )
        self._optimizer = adamw(self.program.states)
        self._weights = weigher(model)
        self._steps = 0

    def step(self, share: Batch) -> float:
        (mine,) = split(share, micro_batches=1, replicas=1, weights=self._weights)
        self._steps += 1
        loss = self.program.step(mine, step=self._steps).loss
        norm = self.program.gradient_norm()
        step_scaled(self.program, self._optimizer, CLIP / norm if norm > CLIP else 1.0)
        self.program.updated()
        for state in self.program.states.values():
            state.parameter.grad = None
        return loss

    def close(self) -> None:
        self.program.close()


def adamw(states: Mapping[str, State]) -> torch.optim.Optimizer:
    """As the peers': all parameters decay."""
    return torch.optim.AdamW([state.parameter for state in states.values()], **ADAMW)  # type: ignore[arg-type]


class TorchData:
    """A model of torch's that reduces its gradients itself, behind or within `backward`."""

    of_all = False

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.model = model
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, **ADAMW)  # type: ignore[arg-type]

    def step(self, share: Batch) -> float:
        loss: torch.Tensor = self.model(**share)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(self._parameters, CLIP)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.item())

    def close(self) -> None:
        """The default group is all that it used."""


def alone(model: Decoder, setting: Setting, rank: int) -> TorchData:
    """One process for itself: nothing is exchanged."""
    return TorchData(model, list(model.parameters()))


def ddp(model: Decoder, setting: Setting, rank: int) -> TorchData:
    """torch's DistributedDataParallel; gradients are views of its buckets."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return TorchData(wrapped, list(wrapped.parameters()))


def fsdp2(model: Decoder, setting: Setting, rank: int, *, reshard: bool) -> TorchData:
    """torch's `fully_shard` around every block, then around the whole; blocks are whole until the backward unless
    `reshard`."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return TorchData(model, list(model.parameters()))


Maker = Callable[[Decoder, Setting, int], Contender]


def _ours(layout: str) -> Maker:
    return lambda model, setting, rank: Ours(model, setting, rank, layout)


def _deepspeed(stage: int) -> Maker:
    return lambda model, setting, rank: DeepSpeedZero(model, setting, rank, stage=stage)


CONTENDERS: Mapping[str, Maker] = {
    "one process": alone,
    "shardwise dp2": _ours("dp=2"),
    "shardwise zero1": _ours("fsdp=2,zero=1"),
    "shardwise zero2": _ours("fsdp=2,zero=2"),
    "shardwise zero3": _ours("fsdp=2,zero=3"),
    "ddp": ddp,
    "fsdp2 zero2": lambda model, setting, rank: fsdp2(model, setting, rank, reshard=False),
    "fsdp2 zero3": lambda model, setting, rank: fsdp2(model, setting, rank, reshard=True),
    "megatron": lambda model, setting, rank: MegatronData(model, setting, rank),
    "deepspeed zero1": _deepspeed(1),
    "deepspeed zero2": _deepspeed(2),
    "deepspeed zero3": _deepspeed(3),
}
GROUPS: Mapping[str, tuple[str, ...]] = {  # that take steps in turn: all copies of a model fit into memory
    "dp2": ("shardwise dp2", "ddp", "megatron", "one process"),
    "zero1": ("shardwise zero1", "deepspeed zero1", "ddp", "one process"),
    "zero2": ("shardwise zero2", "fsdp2 zero2", "deepspeed zero2", "one process"),
    "zero3": ("shardwise zero3", "fsdp2 zero3", "deepspeed zero3", "one process"),
}
OPTIONAL = ("megatron", "deepspeed zero1", "deepspeed zero2", "deepspeed zero3")


def mean_over_ranks(loss: float) -> float:
    """Of shares of one size."""
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total.item()) / RANKS
