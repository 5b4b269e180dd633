"""What a rank does in this benchmark: steps of a model, whole or divided, their bytes and their seconds.

Everything returned is plain numbers. Knows neither ratios nor files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn as nn

from benchmarks.common.memory import forget_peak, peak_bytes, resident_bytes
from benchmarks.common.steps import assert_same
from benchmarks.context.counted import LiveBytes, saved_bytes
from benchmarks.context.model import Shape, batch_of, llama_of
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import split
from shardwise.execute.contexts import context_plan
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Context, Layout

__all__ = ["ONE", "Bytes", "Timed", "bytes_of_steps", "same_as_one", "timed_steps"]

ONE = "one device"
WARM_UP_STEPS = 2
PROOF_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one step on one rank, beside parameters and batch."""

    saved: int  # for backward
    peak: int  # of tensors that are alive at once, gradients of parameters included
    resident: int  # how far the resident set rises in a step


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Of every round: seconds until all ranks had ended, and those that this rank's processor computed."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @contextmanager
    def once(self, *, counts: bool) -> Iterator[None]:
        """Times the block, from a barrier to a barrier; collective."""
        dist.barrier()
        start, computed = time.perf_counter(), time.process_time()
        yield
        computed = time.process_time() - computed
        dist.barrier()
        if counts:
            self.seconds.append(time.perf_counter() - start)
            self.processor.append(computed)


class Whole:
    """The model in plain PyTorch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters: Mapping[str, nn.Parameter] = dict(model.named_parameters())

    def step(self, batch: Mapping[str, torch.Tensor]) -> float:
        loss: torch.Tensor = self.model(**batch).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.item())

    def close(self) -> None:
        pass


class Divided:
    """The model laid out by shardwise. `proof` is a short batch, on which it is proven how units work on own tokens."""

    def __init__(
        self, model: nn.Module, batch: Mapping[str, torch.Tensor], proof: Mapping[str, torch.Tensor], layout: Layout,
        rank: int,
    ) -> None:  # fmt: skip
        plan = context_plan(model, proof, layout=layout, loss=None)
        assert not plan.whole, plan
        self.program = assemble(model, batch, layout=layout, rank=rank, context=plan)
        self._weights = weigher(model)
        self._steps = itertools.count()

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.program.parameters

    def step(self, batch: Mapping[str, torch.Tensor]) -> float:
        replicas = split(batch, micro_batches=1, replicas=1, weights=self._weights)
        return self.program.step(replicas[0], step=next(self._steps)).loss

    def close(self) -> None:
        self.program.close()


def contender(shape: Shape, sequence: int, way: str, rank: int, cp: int) -> Whole | Divided:
    """`way`: ONE, or how ranks attend to each other's tokens."""
    model = llama_of(shape, sequence)
    if way == ONE:
        return Whole(model)
    return Divided(
        model, batch_of(shape, sequence), batch_of(shape, PROOF_TOKENS), Layout(cp=cp, context=Context(way)), rank
    )


def bytes_of_steps(context: RankContext, shape: Shape, sequence: int, way: str) -> Bytes:
    """What a step takes on this rank, of all ranks; collective."""
    torch.set_num_threads(1)
    made = contender(shape, sequence, way, context.rank, context.world_size)
    batch = batch_of(shape, sequence)
    for _ in range(WARM_UP_STEPS):
        _step(made, batch)
    there = [*made.parameters.values(), *batch.values()]
    with saved_bytes(there) as saved:
        _step(made, batch)
    total = saved.total
    saved.seen.clear()
    with LiveBytes(there) as live:
        _step(made, batch)
    _forget_gradients(made)
    forget_peak()
    before = resident_bytes()
    _step(made, batch)
    resident = peak_bytes() - before
    made.close()
    return Bytes(saved=total, peak=live.peak, resident=resident)


def same_as_one(context: RankContext, shape: Shape, sequence: int, way: str) -> None:
    """Raises AssertionError unless loss and gradients are those of one device."""
    torch.set_num_threads(1)
    batch = batch_of(shape, sequence)
    whole = Whole(llama_of(shape, sequence))
    loss = whole.step(batch)
    gradients = {name: p.grad for name, p in whole.parameters.items() if p.grad is not None}
    made = contender(shape, sequence, way, context.rank, context.world_size)
    assert_same(way, made, batch, loss, gradients)
    made.close()


def timed_steps(
    context: RankContext, shape: Shape, sequence: int, ways: Sequence[str], rounds: int
) -> dict[str, Timed]:
    """Steps on this rank by the clock, the contenders in turn. ONE computes on rank 0 alone."""
    torch.set_num_threads(1)
    batch = batch_of(shape, sequence)
    made = {way: contender(shape, sequence, way, context.rank, context.world_size) for way in ways}
    timed = {way: Timed() for way in ways}
    for turn in range(rounds + 1):
        first = turn % len(ways)
        for way in (*ways[first:], *ways[:first]):
            _forget_gradients(made[way])
            with timed[way].once(counts=turn > 0):  # the first warms up
                if way != ONE or context.rank == 0:
                    made[way].step(batch)
    for each in made.values():
        each.close()
    return timed


def _step(made: Whole | Divided, batch: Mapping[str, torch.Tensor]) -> None:
    _forget_gradients(made)
    made.step(batch)


def _forget_gradients(made: Whole | Divided) -> None:
    for parameter in made.parameters.values():
        parameter.grad = None
