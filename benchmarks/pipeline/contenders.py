"""The contenders: each takes the whole batch and leaves the gradients of the mean loss in its parameters.

A contender is made on every rank, from its own copy of the model. It knows neither clocks nor other contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn as nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks.common.steps import Contender
from benchmarks.pipeline.deepspeed_peer import DeepSpeedPipeline
from benchmarks.pipeline.megatron_peer import MegatronPipeline
from benchmarks.pipeline.model import Decoder, Part, Shape, loss_of
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.layout import Layout

__all__ = ["CONTENDERS", "OURS", "PEERS", "TORCH"]

Batch = Mapping[str, torch.Tensor]


class Ours:
    """shardwise: the whole model is given, the halves are named in the layout."""

    def __init__(self, model: Decoder, shape: Shape, rank: int, schedule: str) -> None:
        half = shape.blocks // 2
        blocks = [f"layers.{index}" for index in range(shape.blocks)]
        layout = Layout(
            pp=2,
            micro_batches=shape.micro_batches,
            schedule=schedule,
            stages=(("embed", *blocks[:half]), (*blocks[half:], "norm", "head")),
        )
        sample = torch.zeros(1, shape.sequence, dtype=torch.int64)
        inputs = {"ids": sample, "labels": sample}
        self._program = assemble(model, inputs, layout=layout, rank=rank)
        self._weights = weigher(model)
        self._micro_batches = shape.micro_batches
        self._steps = 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._program.parameters

    def step(self, batch: Batch) -> float | None:
        replicas = split(batch, micro_batches=self._micro_batches, replicas=1, weights=self._weights)
        self._steps += 1
        return self._program.step(replicas[0], step=self._steps).loss


class TorchPipeline:
    """torch.distributed.pipelining, with the half that this rank runs."""

    def __init__(self, model: Decoder, shape: Shape, rank: int, kind: type[Schedule1F1B] | type[ScheduleGPipe]) -> None:
        self._part = Part(model, rank)
        stage = PipelineStage(self._part, rank, 2, torch.device("cpu"))
        self._schedule = kind(stage, n_microbatches=shape.micro_batches, loss_fn=loss_of)
        self._first = rank == 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return dict(self._part.named_parameters())

    def step(self, batch: Batch) -> float | None:
        if self._first:
            self._schedule.step(batch["ids"])
            return None
        losses: list[torch.Tensor] = []
        self._schedule.step(target=batch["labels"], losses=losses, return_outputs=False)
        return float(torch.stack(losses).mean().item())


Maker = Callable[[Decoder, Shape, int], Contender]

OURS = "shardwise 1f1b"
CONTENDERS: Mapping[str, Maker] = {
    OURS: lambda model, shape, rank: Ours(model, shape, rank, "1f1b"),
    "shardwise gpipe": lambda model, shape, rank: Ours(model, shape, rank, "gpipe"),
    "torch 1f1b": lambda model, shape, rank: TorchPipeline(model, shape, rank, Schedule1F1B),
    "torch gpipe": lambda model, shape, rank: TorchPipeline(model, shape, rank, ScheduleGPipe),
    "megatron 1f1b": lambda model, shape, rank: MegatronPipeline(model, shape, rank),
    "deepspeed 1f1b": lambda model, shape, rank: DeepSpeedPipeline(model, shape, rank),
}
TORCH = ("torch 1f1b", "torch gpipe")
PEERS = (*TORCH, "megatron 1f1b", "deepspeed 1f1b")
