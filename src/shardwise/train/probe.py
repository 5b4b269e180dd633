"""Measures this machine: starts as many ranks as asked for, one thread each, and has them compute and exchange at once.

    1 of n ranks     kernels                             what a rank does with the machine to itself
    n ranks          kernels, exchanges, a program       the same when all compute: cores and memory are shared

Rounds of everything follow each other, so that what else the machine does shows as spread. Knows ranks and what they
measure; refuses to know what is fitted to it.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from shardwise.describe.kernels import ExchangeKind
from shardwise.describe.measured import (
    BlockTime,
    DividedTime,
    ExchangeTime,
    KernelTime,
    MachineTimes,
    PeakBytes,
    ProgramTime,
)
from shardwise.errors import ConfigError
from shardwise.execute.probe_divided import layouts_that_divide, ways_to_divide
from shardwise.execute.probe_model import TOKENS, ModelRun, model_kernels
from shardwise.execute.probe_program import Programmed
from shardwise.launch import RankPool, RankStarter
from shardwise.trace.probe_blocks import block_kernels, block_shapes
from shardwise.trace.probe_kernels import cases
from shardwise.train.probe_rank import Round, Thoroughness, divided, measured, modelled, programmed

__all__ = ["default_ranks", "probe"]

_DEADLINE_S = 300.0
_PRELOAD = ("shardwise.train.probe_rank",)
_MODEL_WEIGHT = 4.0  # of its seconds, beside a block's: it is what is priced, and there are few


def probe(
    ranks: Sequence[int],
    *,
    device: str = "cpu",
    how: Thoroughness | None = None,
    preload: Sequence[str] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[MachineTimes, ...]:
    """What this machine does with each number of `ranks`. `tell` hears what is measured now.

    preload: modules that ranks of a run have imported besides (those of its model), which belong to a rank's memory.

    Raises `ConfigError` where there are no ranks or too few GPUs; `LaunchError` where ranks cannot be started.
    """
    how = how or Thoroughness()
    _check(ranks, device)
    tell("starting ranks")
    begun = time.perf_counter()
    found: list[MachineTimes] = []
    with RankStarter(preload=(*_PRELOAD, *preload)) as starter:
        for number, count in enumerate(ranks, start=1):
            with _pool(count, device, starter) as pool:
                pool.start()
                if not found:  # once: the starter, and the first ranks
                    start_s = time.perf_counter() - begun
                found.append(_with(pool, device, how, start_s, begun + how.budget_s * number / len(ranks), tell))
            if device == "cpu" and how.models:
                found[-1] = _with_models(found[-1], how, starter, tell)
            if device == "cpu" and how.visits and count > 1:
                found[-1] = _with_divided(found[-1], how, starter, tell)
    return tuple(found)


def default_ranks(device: str = "cpu") -> tuple[int, ...]:
    """As many ranks as cores, and twice as many; all GPUs."""
    if device == "cuda":
        return (max(1, torch.cuda.device_count()),)
    cores = len(os.sched_getaffinity(0))
    return (cores, 2 * cores)


def _with(
    pool: RankPool, device: str, how: Thoroughness, start_s: float, until_s: float, tell: Callable[[str], None]
) -> MachineTimes:
    """What the ranks of a pool do at once. Two rounds at least: one has no spread."""
    count = pool.world_size
    tell(f"{count} ranks: a program")
    programs = pool.run(programmed, device, how, timeout_s=_DEADLINE_S)
    rounds: list[list[Round]] = []
    for number in range(how.rounds):
        begun_s = time.perf_counter()
        tell(f"{count} ranks: kernels and exchanges, round {number + 1} of {how.rounds}")
        rounds.append(pool.run(measured, device, how, number == 0, timeout_s=_DEADLINE_S))
        ended_s = time.perf_counter()
        if number and ended_s + (ended_s - begun_s) > until_s:
            break
    together, alone = _kernel_times(device, how, rounds)
    return MachineTimes(
        ranks=count,
        cores=len(os.sched_getaffinity(0)) if device == "cpu" else count,
        device=_name_of(device),
        memory_bytes=_memory_bytes(device, count),
        kernels=together,
        alone=alone,
        blocks=_block_times(how, rounds),
        exchanges=_exchange_times(rounds),
        hidden=tuple(ranks[0].hidden for ranks in rounds) if count > 1 else (),
        program=_program_time([made for made, _ in programs], [held for _, held in programs], start_s),
    )


def _with_models(
    times: MachineTimes, how: Thoroughness, starter: RankStarter, tell: Callable[[str], None]
) -> MachineTimes:
    """With steps of models, each on new ranks: what one has left in a process is not counted for the next."""
    peaks: list[PeakBytes] = []
    blocks: list[BlockTime] = []
    for tokens in TOKENS:
        runs: list[list[ModelRun]] = []
        for _ in range(how.models):
            tell(f"{times.ranks} ranks: steps of {tokens} tokens")
            with _pool(times.ranks, "cpu", starter) as pool:
                runs.append(pool.run(modelled, tokens, timeout_s=_DEADLINE_S))
        peaks.append(max((each.peak for ranks in runs for each in ranks), key=lambda peak: peak.measured))
        for way, kernels in zip(("forward", "backward"), model_kernels(tokens), strict=True):
            seconds = tuple(
                statistics.fmean(each.forward_s if way == "forward" else each.backward_s for each in ranks)
                for ranks in runs
            )
            what = f"{way} of a model, {tokens} tokens"
            blocks.append(BlockTime(what=what, kernels=kernels, seconds=seconds, weight=_MODEL_WEIGHT))
    return dataclasses.replace(times, peaks=tuple(peaks), blocks=(*times.blocks, *blocks))


def _with_divided(
    times: MachineTimes, how: Thoroughness, starter: RankStarter, tell: Callable[[str], None]
) -> MachineTimes:
    """With every way to divide a model's units, where a group divides the ranks."""
    if len(layouts_that_divide(times.ranks)) == 1:
        return times
    tell(f"{times.ranks} ranks: divided models")
    ways = ways_to_divide(times.ranks)
    with _pool(times.ranks, "cpu", starter) as pool:
        of_ranks = pool.run(divided, ways, how.visits, timeout_s=_DEADLINE_S)
    found = tuple(
        DividedTime(
            what=",".join(part for part in str(way.layout).split(",") if part[:3] not in ("pp=", "mic")),
            group=way.group,
            kernels=way.kernels,
            exchanges=way.exchanges,
            seconds=tuple(statistics.fmean(each) for each in zip(*(own[place] for own in of_ranks), strict=True)),
        )
        for place, way in enumerate(ways)
    )
    return dataclasses.replace(times, divided=found)


def _pool(count: int, device: str, starter: RankStarter) -> RankPool:
    """Ranks with one thread each; those of GPUs make their process group themselves."""
    timeout_s = 60.0 if device == "cpu" else None
    return RankPool(count, process_group_timeout_s=timeout_s, num_threads=1, starter=starter)


def _check(ranks: Sequence[int], device: str) -> None:
    if not ranks or min(ranks) < 1:
        raise ConfigError(f"a probe needs numbers of ranks of 1 or more, but got {list(ranks)}; try --ranks 2,4")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f'what is measured is "cpu" or "cuda", but got {device!r}; use one of them')
    if device == "cuda" and torch.cuda.device_count() < max(ranks):
        raise ConfigError(
            f"{max(ranks)} ranks need as many GPUs, and torch sees {torch.cuda.device_count()} here; ask for fewer"
        )


# -- of all ranks -------------------------------------------------------------------------------------


def _kernel_times(
    device: str, how: Thoroughness, rounds: Sequence[Sequence[Round]]
) -> tuple[tuple[KernelTime, ...], tuple[KernelTime, ...]]:
    """With all ranks at once, the mean of them; and of the first rank alone."""
    together, alone = [], []
    for index, case in enumerate(cases(torch.device(device), quick=how.quick)):
        means = tuple(statistics.fmean(rank.kernels[index][1] for rank in ranks) for ranks in rounds)
        together.append(KernelTime(kernel=case.kernel, seconds=means, what=case.what))
        firsts = tuple(ranks[0].kernels[index][0] for ranks in rounds)
        alone.append(KernelTime(kernel=case.kernel, seconds=firsts, what=case.what))
    return tuple(together), tuple(alone)


def _block_times(how: Thoroughness, rounds: Sequence[Sequence[Round]]) -> tuple[BlockTime, ...]:
    """The mean of the ranks."""
    found: list[BlockTime] = []
    for shape in block_shapes(quick=how.quick):
        for way, kernels in zip(("forward", "backward"), block_kernels(shape), strict=True):
            means = tuple(statistics.fmean(rank.blocks[len(found)] for rank in ranks) for ranks in rounds)
            found.append(BlockTime(what=f"{way} of {shape}", kernels=kernels, seconds=means))
    return tuple(found)


def _exchange_times(rounds: Sequence[Sequence[Round]]) -> tuple[ExchangeTime, ...]:
    """Of the slowest rank. What programs do not use is measured in the first round alone."""
    slowest: dict[tuple[ExchangeKind, int, int, str], list[float]] = {}
    for ranks in rounds:
        for of_ranks in zip(*(rank.exchanges for rank in ranks), strict=True):
            each = of_ranks[0]
            key = (each.kind, each.group, each.nbytes, each.way)
            slowest.setdefault(key, []).append(max(rank.seconds for rank in of_ranks))
    return tuple(
        ExchangeTime(
            kind=each.kind,
            group=each.group,
            nbytes=each.nbytes,
            way=each.way,
            seconds=tuple(slowest[each.kind, each.group, each.nbytes, each.way]),
            chosen=each.chosen,
        )
        for each in rounds[0][0].exchanges
    )


def _program_time(made: Sequence[Programmed], held: Sequence[int], start_s: float) -> ProgramTime:
    return ProgramTime(
        action_s=tuple(max(of_round) for of_round in zip(*(each.action_s for each in made), strict=True)),
        step_s=tuple(max(of_round) for of_round in zip(*(each.step_s for each in made), strict=True)),
        start_s=start_s,
        layout_s=max(each.layout_s for each in made),
        framework_bytes=max(held),
    )


# -- of the machine -----------------------------------------------------------------------------------


def _name_of(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()} core"


def _memory_bytes(device: str, ranks: int) -> int:
    """Of one rank: of a GPU, or its share of the host's."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().total) // ranks
