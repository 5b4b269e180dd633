"""Does a sum over ranks hide behind a matrix product? A column-parallel backward, both ways in turn, by the clock.

    in turn    dX = dY W ── all-reduce dX ── dW = dYᵀ X
    overlap    dX = dY W ── start ── dW = dYᵀ X ── finish        Megatron-LM's way on GPUs

    python -m benchmarks.transport.overlap

Two ranks with a thread each; gloo sums on a thread of its own, shared memory is moved by the ranks themselves, when
they send and when they wait. Rounds take both ways in an order that rotates, a barrier before each. Knows neither
models nor plans.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.comm.same_host import SameHostTransport, same_host_transport
from shardwise.comm.same_host_group import SameHostGroup
from shardwise.launch import RankContext, RankPool, RankStarter

__all__ = ["main"]

ROWS = 512  # 4 samples of 128 tokens
HIDDEN = (256, 512, 1024)
ROUNDS, WARM_UP = 60, 5

Way = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def timed_ways(context: RankContext, hidden: int) -> dict[str, list[float]]:
    """Seconds of every round, by transport and way. dY (ROWS, 3/2 · hidden), W (3/2 · hidden, hidden)."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(context.rank)
    dy = torch.randn(ROWS, 3 * hidden // 2, generator=generator)
    weight = torch.randn(3 * hidden // 2, hidden, generator=generator)
    x = torch.randn(ROWS, hidden, generator=generator)
    with same_host_transport([0, 1]) as transport:
        group = SameHostGroup(transport, [0, 1], context.rank)
        ways: dict[str, Way] = {
            "gloo, in turn": lambda a, w, b: _in_turn(a, w, b, dist.all_reduce),
            "gloo, overlap": _gloo_overlap,
            "shared memory, in turn": lambda a, w, b: _in_turn(a, w, b, group.all_reduce),
            "shared memory, overlap": lambda a, w, b: _shared_overlap(a, w, b, transport, context.rank),
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*ways, "no sum")}
        expected = None
        for turn in range(WARM_UP + ROUNDS):
            for name in _rotated(tuple(ways), turn):
                dist.barrier()
                start = time.perf_counter()
                dx, dw = ways[name](dy, weight, x)
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
                expected = (dx, dw) if expected is None else expected
                torch.testing.assert_close((dx, dw), expected, rtol=1e-4, atol=1e-4)
            dist.barrier()
            start = time.perf_counter()
            _in_turn(dy, weight, x, lambda tensor: tensor)
            if turn >= WARM_UP:
                seconds["no sum"].append(time.perf_counter() - start)
        dist.barrier()
    return seconds


def _in_turn(
    dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, all_reduce: Callable[[torch.Tensor], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = dy @ weight
    all_reduce(dx)
    return dx, dy.t() @ x


def _gloo_overlap(dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dx = dy @ weight
    work = dist.all_reduce(dx, async_op=True)
    dw = dy.t() @ x
    work.wait()
    return dx, dw


def _shared_overlap(
    dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, transport: SameHostTransport, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The peer's half is sent before the product, this rank's half is received, summed and sent behind it."""
    dx = dy @ weight
    halves = dx.view(-1).chunk(2)
    other = torch.empty_like(halves[rank])
    sent, received = transport.isend(halves[1 - rank], 1 - rank), transport.irecv(other, 1 - rank)
    dw = dy.t() @ x
    received.wait()
    halves[rank].add_(other)
    back, theirs = transport.isend(halves[rank], 1 - rank), transport.irecv(halves[1 - rank], 1 - rank)
    for work in (sent, theirs, back):
        work.wait()
    return dx, dw


def main() -> None:
    """Prints a table: medians, and the median of ratios of the same round, of the slower rank."""
    starter = RankStarter(preload=("shardwise.comm.same_host_group",))
    with starter, RankPool(2, num_threads=1, starter=starter) as pool:
        for hidden in HIDDEN:
            of_ranks = pool.run(timed_ways, hidden, timeout_s=300)
            _print(hidden, {name: list(map(max, of_ranks[0][name], of_ranks[1][name])) for name in of_ranks[0]})


def _print(hidden: int, slowest: Mapping[str, Sequence[float]]) -> None:
    print(f"hidden {hidden}: {ROWS * hidden * 4 >> 10} KiB are summed; without a sum {_ms(slowest['no sum'])}")
    for transport in ("gloo", "shared memory"):
        turn, overlap = slowest[f"{transport}, in turn"], slowest[f"{transport}, overlap"]
        ratio = statistics.median(o / t for o, t in zip(overlap, turn, strict=True))
        print(f"  {transport:14} in turn {_ms(turn)}   overlap {_ms(overlap)}   ratio {ratio:.3f}", flush=True)


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:7.2f} ms"


def _rotated(names: Sequence[str], turn: int) -> Sequence[str]:
    first = turn % len(names)
    return (*names[first:], *names[:first])


if __name__ == "__main__":
    importlib.import_module("benchmarks.transport.overlap").main()  # ranks import what they run by its name
