"""What a rank does on a core that it has to itself, or shares: its rate by the clock, and steps of layouts in turn.

Ranks are bound to cores for as long as a call lasts. Everything returned is plain numbers. Knows neither planner nor
files.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from benchmarks.common.steps import assert_same, timed
from benchmarks.pipeline.model import Decoder, Shape
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout

__all__ = ["Way", "rate_of", "timed_steps"]

_SIDE = 384  # of the products that tell a core's rate: of the size of a layer's
_WARM_UP = 1

Way = tuple[str, tuple[int, ...]]
"""A layout, and the micro-batches of each of its replicas."""


class Laid:
    """One layout of the model, as a contender (see `benchmarks.common.steps`)."""

    def __init__(self, model: Decoder, shape: Shape, way: Way, rank: int) -> None:
        layout, self._shares = Layout.parse(way[0]), way[1]
        sample = torch.zeros(1, shape.sequence, dtype=torch.int64)
        self._program = assemble(model, {"ids": sample, "labels": sample}, layout=layout, rank=rank)
        self._weights = weigher(model)
        self._replica = rank if layout.dp > 1 else 0
        self._steps = 0

    @property
    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        return self._program.parameters

    def step(self, batch: Mapping[str, torch.Tensor]) -> float | None:
        self._steps += 1
        found = self._program.step(self._own(batch), step=self._steps)
        return found.loss if self._program_has_mean else None

    @property
    def _program_has_mean(self) -> bool:
        """A replica's loss is that of its own micro-batches."""
        return len(self._shares) == 1

    def _own(self, batch: Mapping[str, torch.Tensor]) -> tuple[MicroBatch, ...]:
        (whole,) = split(batch, micro_batches=sum(self._shares), replicas=1, weights=self._weights)
        first = sum(self._shares[: self._replica])
        return whole[first : first + self._shares[self._replica]]


def rate_of(context: RankContext, cores: Sequence[int], seconds: float) -> float:
    """Flops a second of products on this rank's core, while all other ranks compute on theirs."""
    with _bound(cores[context.rank]):
        left, right = torch.randn(_SIDE, _SIDE), torch.randn(_SIDE, _SIDE)
        dist.barrier()
        start, count = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds:
            left @ right
            count += 1
        return 2.0 * _SIDE**3 * count / passed


def timed_steps(
    context: RankContext, cores: Sequence[int], shape: Shape, ways: Mapping[str, Way], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every step of every way on this rank. Raises `AssertionError` where one computes wrongly."""
    torch.manual_seed(0)
    model, batch = Decoder(shape), _batch(shape, ways)
    reference = copy.deepcopy(model)
    loss = reference(**batch)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    contenders = {name: Laid(copy.deepcopy(model), shape, way, context.rank) for name, way in ways.items()}
    with _bound(cores[context.rank]):
        for name, contender in contenders.items():
            assert_same(name, contender, batch, float(loss.item()), expected)
            for _ in range(_WARM_UP):
                timed(contender, batch)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(rounds):
            first = turn % len(names)
            for name in (*names[first:], *names[:first]):
                seconds[name].append(timed(contenders[name], batch))
        return seconds


def _batch(shape: Shape, ways: Mapping[str, Way]) -> dict[str, torch.Tensor]:
    (size,) = {sum(shares) for _, shares in ways.values()}
    ids = torch.randint(shape.vocabulary, (size, shape.sequence), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "labels": ids.roll(-1, 1)}


@contextlib.contextmanager
def _bound(core: int) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
