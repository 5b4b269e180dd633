"""What a program costs around its kernels: seconds of one action and of one step, of a model that computes little.

    seconds of a step = step_s + micro-batches · (2 · action_s + the same forward and backward without a program)

All ranks run it as replicas, whose gradients are so small that summing them is a meeting, as the loss and the norm are.
Knows programs; refuses to know what is priced with it.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.process_memory import proportional_bytes
from shardwise.execute.program import Program
from shardwise.layout import Layout

__all__ = ["Programmed", "held_bytes", "program_seconds"]

_WIDTH = 8
_FEW, _MANY = 2, 16  # micro-batches


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Programmed:
    """In every round; and once, to lay a model out."""

    action_s: tuple[float, ...]
    step_s: tuple[float, ...]
    layout_s: float


class _Nothing(nn.Module):
    """A chain of linears so small that they take no time, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def program_seconds(
    *,
    rounds: int,
    steps: int,
    device: torch.device | str = "cpu",
    together: Callable[[], None] | None = None,
) -> Programmed:
    """Each round is a mean of `steps` steps of many micro-batches, and of four times as many of few. `together` waits
    for all ranks, before each. A difference of measurements may come out below 0."""
    device = torch.device(device)
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    batch = {"x": torch.randn(_MANY * ranks, _WIDTH, device=device)}
    start = time.perf_counter()
    model, plain_model = _Nothing().to(device), _Nothing().to(device)
    parts = {
        count: split({"x": batch["x"][: count * ranks]}, micro_batches=count, replicas=ranks, weights=lambda _: 1.0)[
            rank
        ]
        for count in (_FEW, _MANY)
    }
    layout = Layout(dp=ranks, micro_batches=_FEW)
    program = assemble(model, parts[_FEW][0].inputs, layout=layout, rank=rank, device=device)
    layout_s = time.perf_counter() - start
    optimizer = torch.optim.AdamW(list(program.parameters.values()))
    actions: list[float] = []
    of_step: list[float] = []
    number = 0
    try:
        for index in range(rounds + 1):
            seconds = {}
            for count, mine in parts.items():
                if together is not None:
                    together()
                times = steps * (4 if count == _FEW else 1)
                seconds[count] = _mean(lambda: _step(program, optimizer, mine, number), times, device)  # noqa: B023
                number += times
            plain = _mean(lambda: _plain(plain_model, batch["x"][:1]), steps * _MANY, device)
            slope = (seconds[_MANY] - seconds[_FEW]) / (_MANY - _FEW)
            if index:  # the first warms up
                actions.append((slope - plain) / 2)
                of_step.append(seconds[_FEW] - _FEW * slope)
    finally:
        program.close()
    gc.collect()
    return Programmed(action_s=tuple(actions), step_s=tuple(of_step), layout_s=layout_s)


def held_bytes(device: torch.device | str = "cpu") -> int:
    """Of this rank now, pages that ranks share divided among them; on a GPU, what is in use of it beside what torch has
    allocated."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total - free - torch.cuda.memory_reserved(device))
    return proportional_bytes(dist.get_world_size() if dist.is_initialized() else 1)


def _step(program: Program, optimizer: torch.optim.Optimizer, mine: Sequence[MicroBatch], number: int) -> None:
    program.step(mine, step=number)
    program.gradient_norm()
    optimizer.step()
    program.updated()
    for parameter in program.parameters.values():
        parameter.grad = None


def _plain(model: nn.Module, x: torch.Tensor) -> None:
    model(x).backward()


def _mean(run: Callable[[], None], times: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / times
