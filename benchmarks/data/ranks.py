"""What a rank does in this benchmark: make contenders, hold their losses against one process, take steps by the clock.

Everything returned is plain numbers and text. Knows neither ratios nor files.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from benchmarks.common.memory import forget_peak, peak_bytes, resident_bytes, trim, watched_proportional
from benchmarks.data.contenders import CONTENDERS, Contender, mean_over_ranks
from benchmarks.data.setting import ADAMW, CLIP, SETTINGS, Setting, batch_of, decoder, share_of
from shardwise.launch import RankContext

__all__ = ["CHECKED_STEPS", "expected_losses", "missing", "peaks", "sums_alone", "timed_steps"]

CHECKED_STEPS = 3  # the last of them computes with weights that two whole steps have made
TOLERANCE = 1e-5  # of the loss; float32 sums taken in another order
MEMORY_STEPS = 3


def expected_losses(context: RankContext, setting: Setting) -> list[float]:
    """Of the first steps, on one process that has the whole batch."""
    model = decoder(setting)
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)  # type: ignore[arg-type]
    losses: list[float] = []
    for step in range(CHECKED_STEPS):
        loss = model(**batch_of(setting, step))
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.item()))
    return losses


def missing(context: RankContext, name: str) -> str:
    """Why a contender cannot run here, in one line; empty where it takes a step of the tiny shape."""
    setting = SETTINGS["tiny"]
    try:
        _made(name, setting, context.rank).step(share_of(batch_of(setting, 0), context.rank))
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


def timed_steps(
    context: RankContext, names: Sequence[str], setting: Setting, rounds: int, expected: Sequence[float]
) -> dict[str, list[float]]:
    """Seconds of every step of every contender on this rank. Raises `AssertionError` where one computes wrongly."""
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        contenders = {name: _made(name, setting, context.rank) for name in names}
        for contender in contenders.values():
            stack.callback(contender.close)
        return _in_turn(contenders, setting, context.rank, rounds, expected)


def _in_turn(
    contenders: Mapping[str, Contender], setting: Setting, rank: int, rounds: int, expected: Sequence[float]
) -> dict[str, list[float]]:
    names = list(contenders)
    for name, contender in contenders.items():
        _check(name, contender, setting, rank, expected)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        share = share_of(batch_of(setting, turn), rank)
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            dist.barrier()
            start = time.perf_counter()
            contenders[name].step(share)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def peaks(context: RankContext, name: str, setting: Setting) -> tuple[int, int, int]:
    """The peak resident set of this process in steps of one contender, what it was before the model was made, and in
    further steps the peak of its proportional set, where pages that ranks share are counted once between them."""
    torch.set_num_threads(1)
    trim()
    before = resident_bytes()
    contender = _made(name, setting, context.rank)
    for step in range(CHECKED_STEPS):
        contender.step(share_of(batch_of(setting, step), context.rank))
    forget_peak()
    for step in range(MEMORY_STEPS):
        contender.step(share_of(batch_of(setting, step), context.rank))
    peak = peak_bytes()
    with watched_proportional() as shares:
        for step in range(MEMORY_STEPS):
            contender.step(share_of(batch_of(setting, step), context.rank))
    return peak, before, max(shares)


def sums_alone(context: RankContext, setting: Setting, rounds: int, bucket_bytes: int) -> list[float]:
    """Seconds of summing gradients of this model over the ranks when nothing else runs: gloo, one bucket behind the
    other."""
    torch.set_num_threads(1)
    size = sum(parameter.numel() for parameter in decoder(setting).parameters())
    buckets = list(torch.split(torch.randn(size), bucket_bytes // 4))
    seconds: list[float] = []
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in buckets]:
            work.wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def _check(name: str, contender: Contender, setting: Setting, rank: int, expected: Sequence[float]) -> None:
    for step, wanted in enumerate(expected):
        loss = contender.step(share_of(batch_of(setting, step), rank))
        if name == "one process":  # sees its own share only
            continue
        loss = loss if contender.of_all else mean_over_ranks(loss)
        assert abs(loss - wanted) <= TOLERANCE * abs(wanted), (
            f"{name}: loss {loss} at step {step}, one process {wanted}"
        )


def _made(name: str, setting: Setting, rank: int) -> Contender:
    contender = CONTENDERS[name](copy.deepcopy(decoder(setting)), setting, rank)
    trim()
    return contender
