"""What one rank measures, at the same time as all others: kernels, blocks, exchanges, a program.

Every rank makes the same calls. Knows one rank; refuses to know who asked, and how ranks are summed up.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from shardwise.comm.probe_exchanges import Exchanged, exchange_seconds_of_all, hidden_share
from shardwise.execute.probe_divided import DividedWay, divided_seconds
from shardwise.execute.probe_model import ModelRun, model_run
from shardwise.execute.probe_program import Programmed, held_bytes, program_seconds
from shardwise.launch import RankContext, init_process_group
from shardwise.trace.probe_blocks import block_seconds, block_shapes
from shardwise.trace.probe_kernels import seconds_of_all

__all__ = ["Round", "Thoroughness", "divided", "measured", "modelled", "programmed"]

_PROGRAM_ROUNDS = 5
_VISIT_S = 0.4  # of each way to divide a model


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Thoroughness:
    """Rounds of everything, fewer where they would end after `budget_s`; seconds in which one kernel, one exchange is
    repeated in a round; bytes of exchanges; ranks that are started anew for each model whose steps are taken (0: none
    are, and what an allocator holds besides tensors is not known); times that every way to divide a model is visited
    (0: what the program adds to divided units is not known)."""

    rounds: int = 5
    kernel_s: float = 0.012
    exchange_s: float = 0.006
    sizes: tuple[int, ...] = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
    quick: bool = False
    budget_s: float = 50.0
    models: int = 3
    visits: int = 7

    @classmethod
    def quickly(cls) -> Thoroughness:
        """Less of everything, for a first look."""
        return cls(
            rounds=3,
            kernel_s=0.01,
            exchange_s=0.004,
            sizes=(4 << 10, 1 << 20),
            quick=True,
            budget_s=20.0,
            models=1,
            visits=3,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What one rank has measured once."""

    kernels: tuple[tuple[float, float], ...]  # alone, and with all ranks at once
    blocks: tuple[float, ...]  # forward and backward of each
    exchanges: tuple[Exchanged, ...]
    hidden: float


def _device_of(context: RankContext, kind: str) -> torch.device:
    """This rank's, ready to exchange with the others'."""
    torch.set_num_threads(1)
    if kind == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", context.local_rank)
    torch.cuda.set_device(device)
    init_process_group(context, backend="nccl")
    return device


def measured(context: RankContext, kind: str, how: Thoroughness, first: bool) -> Round:
    """Everything once. What programs do not use is measured in the first round alone."""
    device = _device_of(context, kind)
    shared = max(1.0, context.world_size / len(os.sched_getaffinity(0))) if kind == "cpu" else 1.0
    kernels = seconds_of_all(
        device,
        window_s=how.kernel_s,
        quick=how.quick,
        first=context.rank == 0,
        together=dist.barrier if context.world_size > 1 else None,
        shared=shared,
    )
    blocks: list[float] = []
    for shape in block_shapes(quick=how.quick):
        blocks += block_seconds(
            shape, device, window_s=4 * how.kernel_s * shared, begin=dist.barrier if context.world_size > 1 else None
        )
    exchanged: list[Exchanged] = []
    hidden = 0.0
    if context.world_size > 1:
        exchanged = exchange_seconds_of_all(
            how.sizes, window_s=how.exchange_s * shared, device=device, all_ways=first and not how.quick
        )
        hidden = hidden_share(max(how.sizes), window_s=4 * how.exchange_s * shared, device=device)
    return Round(
        kernels=tuple(kernels),
        blocks=tuple(blocks),
        exchanges=tuple(exchanged),
        hidden=hidden,
    )


def modelled(context: RankContext, tokens: int) -> ModelRun:
    """Of a rank that has done nothing before."""
    torch.set_num_threads(1)
    return model_run(tokens)


def divided(context: RankContext, ways: Sequence[DividedWay], visits: int) -> list[tuple[float, ...]]:
    """[way]: of every visit."""
    torch.set_num_threads(1)
    return divided_seconds(ways, visits=visits, visit_s=_VISIT_S)


def programmed(context: RankContext, kind: str, how: Thoroughness) -> tuple[Programmed, int]:
    """All rounds of a program, and the bytes that the rank holds behind it: what is loaded at first use is there."""
    device = _device_of(context, kind)
    together = dist.barrier if context.world_size > 1 else None
    made = program_seconds(
        rounds=min(how.rounds, _PROGRAM_ROUNDS), steps=3 if how.quick else 10, device=device, together=together
    )
    return made, held_bytes(device)
