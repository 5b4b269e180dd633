"""The contenders of real compute: every schedule of shardwise, torch's, other pipelines, and two bounds.

A contender is made on every rank, from its own copy of the model. It knows neither clocks nor other contenders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

from benchmarks.common.steps import Contender
from benchmarks.pipeline.deepspeed_peer import DeepSpeedPipeline
from benchmarks.pipeline.megatron_peer import MegatronPipeline
from benchmarks.pipeline.model import Decoder, Shape, loss_of
from benchmarks.schedules.model import Stage, unit_names
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.layout import Layout
from shardwise.schedule import GENERATORS, Placement, chunks_of
from shardwise.schedule.placement import stages_of_ranks
from shardwise.trace.timing import measure

__all__ = ["HALVES", "ONE", "OURS", "PEERS", "TORCH", "TorchSchedule", "make"]

Batch = Mapping[str, torch.Tensor]

NUM_RANKS = 2
# name -> schedule of a layout, stages a rank
OURS: Mapping[str, tuple[str, int]] = {
    **{name: (name, chunks_of(name)) for name, family in GENERATORS.items() if family.flushes},
    "interleaved-zb": ("zb-h1", 2),
    "searched": ("searched", 1),
    "searched-2": ("searched", 2),  # in a loop or as a V
}
ONE, HALVES = "one process", "unconnected halves"


@dataclass(frozen=True, kw_only=True)
class TorchSchedule:
    """A schedule of torch: its class, stages a rank, and where they lie."""

    kind: Any
    chunks: int = 1
    placement: Placement = Placement.LOOP


TORCH: Mapping[str, TorchSchedule] = {
    "gpipe": TorchSchedule(kind=ScheduleGPipe),
    "1f1b": TorchSchedule(kind=Schedule1F1B),
    "interleaved": TorchSchedule(kind=ScheduleInterleaved1F1B, chunks=2),
    "looped-bfs": TorchSchedule(kind=ScheduleLoopedBFS, chunks=2),
    "zb-h1": TorchSchedule(kind=ScheduleInterleavedZeroBubble),
    "interleaved-zb": TorchSchedule(kind=ScheduleInterleavedZeroBubble, chunks=2),
    "zb-v": TorchSchedule(kind=ScheduleZBVZeroBubble, chunks=2, placement=Placement.V),
    "dualpipe-v": TorchSchedule(kind=ScheduleDualPipeV, chunks=2, placement=Placement.V),
}
_PIPELINES: Mapping[str, Callable[[Decoder, Shape, int], Contender]] = {
    "megatron 1f1b": lambda model, shape, rank: MegatronPipeline(model, shape, rank),
    "deepspeed 1f1b": lambda model, shape, rank: DeepSpeedPipeline(model, shape, rank),
}
PEERS = tuple(_PIPELINES)


def make(name: str, model: Decoder, shape: Shape, rank: int) -> Contender:
    """The contender of that name: "shardwise NAME", "torch NAME", a peer, or a bound."""
    if name in _PIPELINES:
        return _PIPELINES[name](model, shape, rank)
    if name == ONE:
        return OneProcess(model, rank)
    if name == HALVES:
        return UnconnectedHalves(model, shape, rank)
    library, _, schedule = name.partition(" ")
    return Ours(model, shape, rank, schedule) if library == "shardwise" else TorchPipeline(model, shape, rank, schedule)


class Ours:
    """shardwise: the whole model is given, the stages are named in the layout."""

    def __init__(self, model: Decoder, shape: Shape, rank: int, schedule: str) -> None:
        chosen, chunks = OURS[schedule]
        layout = Layout(
            pp=NUM_RANKS,
            micro_batches=shape.micro_batches,
            schedule=chosen,
            chunks=chunks,
            stages=unit_names(shape, NUM_RANKS * chunks),
        )
        sample = torch.zeros(1, shape.sequence, dtype=torch.int64)
        inputs = {"ids": sample, "labels": sample}
        measured = measure(model, inputs) if chosen == "searched" else None  # on both ranks at once, as they will run
        self.program = assemble(model, inputs, layout=layout, rank=rank, measured=measured)
        self._weights = weigher(model)
        self._micro_batches = shape.micro_batches
        self._steps = 0

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.program.parameters

    def step(self, batch: Batch) -> float | None:
        replicas = split(batch, micro_batches=self._micro_batches, replicas=1, weights=self._weights)
        self._steps += 1
        return self.program.step(replicas[0], step=self._steps).loss


class TorchPipeline:
    """torch.distributed.pipelining, with the stages that this rank runs."""

    def __init__(self, model: Decoder, shape: Shape, rank: int, schedule: str) -> None:
        chosen = TORCH[schedule]
        num_stages = NUM_RANKS * chosen.chunks
        mine = stages_of_ranks(chosen.placement, num_ranks=NUM_RANKS, chunks=chosen.chunks)[rank]
        parts = {index: Stage(model, index, num_stages) for index in mine}
        stages = [PipelineStage(part, index, num_stages, torch.device("cpu")) for index, part in parts.items()]
        single = chosen.kind in (ScheduleGPipe, Schedule1F1B)
        self._schedule = chosen.kind(
            stages[0] if single else stages, n_microbatches=shape.micro_batches, loss_fn=loss_of
        )
        self._first, self._last = 0 in mine, num_stages - 1 in mine
        self.parameters = {name: p for part in parts.values() for name, p in part.named_parameters()}

    def step(self, batch: Batch) -> float | None:
        inputs = (batch["ids"],) if self._first else ()
        if not self._last:
            self._schedule.step(*inputs)
            return None
        losses: list[torch.Tensor] = []
        self._schedule.step(*inputs, target=batch["labels"], losses=losses, return_outputs=False)
        return float(torch.stack(losses).mean().item())


class OneProcess:
    """Plain torch on rank 0, one micro-batch behind the other; rank 1 does nothing."""

    def __init__(self, model: Decoder, rank: int) -> None:
        self._model = model if rank == 0 else None
        self.parameters = {} if rank else dict(model.named_parameters())

    def step(self, batch: Batch) -> float | None:
        if self._model is None:
            return None
        total = 0.0
        count = len(batch["ids"])
        for ids, labels in zip(torch.split(batch["ids"], 1), torch.split(batch["labels"], 1), strict=True):
            loss = self._model(ids, labels) / count
            loss.backward()
            total += float(loss.item())
        return total


class UnconnectedHalves:
    """Each rank runs half of the layers on all micro-batches, and neither waits for the other.

    No pipeline can be faster that computes as plain torch does. Gradients are those of made-up inputs.
    """

    def __init__(self, model: Decoder, shape: Shape, rank: int) -> None:
        self._part = Stage(model, rank, NUM_RANKS)
        self.parameters = dict(self._part.named_parameters())
        self._between: Sequence[torch.Tensor] = torch.randn(
            shape.micro_batches, 1, shape.sequence, shape.hidden
        ).unbind()  # activations into the second half, gradients into the first
        self._first = rank == 0

    def step(self, batch: Batch) -> float | None:
        micro_batches = zip(torch.split(batch["ids"], 1), torch.split(batch["labels"], 1), self._between, strict=True)
        for ids, labels, between in micro_batches:
            if self._first:
                torch.autograd.backward(self._part(ids), between)
            else:
                torch.autograd.backward(loss_of(self._part(between.detach().requires_grad_()), labels))
        return None
