"""A model of some blocks as a program of replicas: seconds of its forwards and backwards beside their kernels, and what
a rank's process holds at the peak of a step beside what a count says.

    measured seconds   =   kernels, as they are where everything else of a step lies between two of them
    measured bytes     =   before any model   +   states   +   (1 + slack) · what comes and goes

Libraries, the interpreter and the program's own objects are there before any model; what comes and goes takes more than
the tensors in it, since an allocator leaves holes between them. Knows programs; refuses to know what is fitted.
"""

from __future__ import annotations

import dataclasses
import gc
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from shardwise.describe.cluster import Overheads
from shardwise.describe.kernels import Kernel, Phase
from shardwise.describe.measured import PeakBytes
from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.process_memory import forget_peak, peak_resident_bytes, proportional_bytes, resident_bytes
from shardwise.execute.program import Program
from shardwise.execute.traced_profiles import TracedProfiles
from shardwise.layout import Layout
from shardwise.plan.job import Job
from shardwise.plan.memory import memory_lines
from shardwise.plan.stage_work import StageWork
from shardwise.schedule.actions import Kind
from shardwise.trace.deferred import defer
from shardwise.trace.placing import place
from shardwise.trace.probe_blocks import BlockShape, block

__all__ = [
    "MICRO_BATCHES",
    "TOKENS",
    "ModelRun",
    "ProbedModel",
    "batch_of",
    "counted_model",
    "model_kernels",
    "model_run",
]

TOKENS = (96, 768)  # of a micro-batch: few activations beside the states, and many
_WIDTH, _WORDS, _KINDS = 192, 2048, ("plain", "gated", "plain", "gated")
MICRO_BATCHES = 2
_FIRST = 2  # steps that trace, make states and touch memory
_TIMED_S, _LEAST = 0.6, 3


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelRun:
    """Of this rank: seconds of the first micro-batch's forward and backward, the medians of steps; the peak."""

    forward_s: float
    backward_s: float
    peak: PeakBytes


class ProbedModel(nn.Module):
    """A table of words, blocks of two kinds, and a loss over the table."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.table = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList(block(BlockShape(kind, tokens, _WIDTH, 4)) for kind in _KINDS)
        self.head = nn.Linear(_WIDTH, _WORDS, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)  # (batch, tokens, width)
        for each in self.blocks:
            x = each(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def model_kernels(tokens: int) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Of a forward and of a backward of one micro-batch of so many tokens."""
    (work,) = _works(defer(lambda: ProbedModel(tokens), seed=0).module, tokens, Layout(micro_batches=1))
    forward = tuple(kernel for kernel in work.kernels if kernel.phase is Phase.FORWARD)
    return forward, tuple(kernel for kernel in work.kernels if kernel.phase is not Phase.FORWARD)


def model_run(tokens: int) -> ModelRun:
    """Of this rank, a process that has computed nothing before. Collective."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    layout = Layout(dp=ranks, micro_batches=MICRO_BATCHES)
    blueprint = defer(lambda: ProbedModel(tokens), seed=0)
    model = blueprint.module
    place(model, blueprint.materialize([name for name, _ in model.named_buffers()]))
    states, passing = _counted(model, tokens, ranks)
    parts = split(batch_of(tokens, ranks), micro_batches=MICRO_BATCHES, replicas=ranks, weights=lambda _: 1.0)
    program = assemble(
        model, parts[0][0].inputs, layout=layout, rank=rank, fill=fill_from(blueprint.materialize, "cpu")
    )
    try:
        forwards, backwards = _steps(program, parts[program.place.replica])
        measured = peak_resident_bytes() - (resident_bytes() - proportional_bytes(ranks))
    finally:
        program.close()
    gc.collect()
    return ModelRun(
        forward_s=sorted(forwards)[len(forwards) // 2],
        backward_s=sorted(backwards)[len(backwards) // 2],
        peak=PeakBytes(states=states, passing=passing, measured=measured),
    )


def _steps(program: Program, mine: tuple[MicroBatch, ...]) -> tuple[list[float], list[float]]:
    """Seconds of the first micro-batch's forward and backward in each of the steps that count: its gradients are added
    to nothing, and nobody sums them yet. The peak is of these steps."""
    optimizer = torch.optim.AdamW(list(program.parameters.values()), fused=True)
    forwards, backwards = [], []
    number, end_s = 0, 0.0
    while number < _FIRST + _LEAST or not _all_say(time.perf_counter() > end_s):
        if number == _FIRST:
            forget_peak()
            end_s = time.perf_counter() + _TIMED_S
        moments = program.step(mine, step=number).moments
        program.gradient_norm()
        optimizer.step()
        program.updated()
        optimizer.zero_grad(set_to_none=True)
        number += 1
        if number > _FIRST:
            first = {each.action.kind: each.compute_s for each in reversed(moments)}
            forwards.append(first[Kind.F])
            backwards.append(first[Kind.B])
    return forwards, backwards


def _all_say(here: bool) -> bool:
    if not dist.is_initialized():
        return here
    said = torch.tensor(int(here))
    dist.all_reduce(said, op=dist.ReduceOp.MIN)
    return bool(said)


def batch_of(tokens: int, samples: int) -> dict[str, torch.Tensor]:
    """Of a step of so many replicas."""
    return {"ids": (torch.arange(MICRO_BATCHES * samples * tokens) % _WORDS).view(-1, tokens)}


def _works(model: nn.Module, tokens: int, layout: Layout) -> tuple[StageWork, ...]:
    inputs = {name: each[:1] for name, each in batch_of(tokens, 1).items()}
    return TracedProfiles(model, inputs).works(layout, 1, num_micro_batches=layout.micro_batches)


def counted_model(tokens: int, ranks: int = 1) -> tuple[float, float]:
    """Bytes of a rank by the plan: what is there all the time, and what comes and goes."""
    return _counted(defer(lambda: ProbedModel(tokens), seed=0).module, tokens, ranks)


def _counted(model: nn.Module, tokens: int, ranks: int) -> tuple[float, float]:
    layout = Layout(dp=ranks, micro_batches=MICRO_BATCHES)
    lines = memory_lines(
        _works(model, tokens, layout),
        layout,
        Job(global_batch=MICRO_BATCHES * layout.dp, gradients_stay=layout.dp > 1),
        num_micro_batches=MICRO_BATCHES,
        in_flight=[1.0],
        overheads=Overheads(),
    )
    passing = lines.activations + lines.transient + lines.logits
    return lines.total - passing, passing
