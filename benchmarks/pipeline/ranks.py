"""What a rank does in this benchmark: make contenders, hold them against one process, take steps by the clock.

Everything returned is plain numbers and text. Knows neither ratios nor files.
"""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common.steps import Contender, assert_same, timed
from benchmarks.pipeline.contenders import CONTENDERS
from benchmarks.pipeline.model import SHAPES, Decoder, Shape
from shardwise.launch import RankContext

__all__ = ["missing_peers", "peak_bytes", "timed_steps"]

WARM_UP_STEPS = 2
MEMORY_STEPS = 3


def missing_peers(context: RankContext, names: Sequence[str]) -> dict[str, str]:
    """Contender -> why it cannot run here; each takes one step of the tiny shape."""
    missed: dict[str, str] = {}
    shape = SHAPES["tiny"]
    for name in names:
        try:
            timed(_made(name, _decoder(shape), shape, context.rank), _batch(shape))
        except Exception as error:
            missed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return missed


def timed_steps(context: RankContext, names: Sequence[str], shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of every step of every contender on this rank. Raises `AssertionError` where one computes wrongly."""
    torch.set_num_threads(1)
    model, batch = _decoder(shape), _batch(shape)
    reference = copy.deepcopy(model)
    loss = reference(**batch)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    contenders = {name: _made(name, copy.deepcopy(model), shape, context.rank) for name in names}
    for name, contender in contenders.items():
        assert_same(name, contender, batch, float(loss.item()), expected)
        for _ in range(WARM_UP_STEPS):
            timed(contender, batch)
    del model, reference, expected, loss
    gc.collect()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            seconds[name].append(timed(contenders[name], batch))
    return seconds


def peak_bytes(context: RankContext, name: str, shape: Shape) -> tuple[int, int]:
    """The peak resident set of this process in steps of one contender, and what it was before the model was made."""
    torch.set_num_threads(1)
    _trim()
    before = _status("VmRSS")
    contender, batch = _made(name, _decoder(shape), shape, context.rank), _batch(shape)
    for _ in range(WARM_UP_STEPS + 1):
        timed(contender, batch)
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # puts VmHWM back to what is resident now
    for _ in range(MEMORY_STEPS):
        timed(contender, batch)
    return _status("VmHWM"), before


def _decoder(shape: Shape) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape)


def _batch(shape: Shape) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    size = (shape.micro_batches, shape.sequence)
    return {
        "ids": torch.randint(0, shape.vocabulary, size, generator=random),
        "labels": torch.randint(0, shape.vocabulary, size, generator=random),
    }


def _made(name: str, model: Decoder, shape: Shape, rank: int) -> Contender:
    contender = CONTENDERS[name](model, shape, rank)
    del model
    gc.collect()
    return contender


def _trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
