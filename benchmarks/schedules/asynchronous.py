"""Emulated compute: steps that are drained (1F1B) and steps that are not (PipeDream-2BW), by the clock, in turn.

    python -m benchmarks.schedules.asynchronous [--ranks 2 4] [--micro-batches 4 8] [--steps 5] [--rounds 5]

Every forward sleeps 10 ms and every backward 20 ms (`pauses`); transfers, sums of gradients, their norm and the update
are real, of tiny tensors. A round is several steps with their updates, from the end of one to the end of another, on
the slowest rank: what a training loop sees. Of several rounds the fastest counts, because what others do on the machine
can only add to it. Beside it stands what the simulator says of the schedule.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.common.circumstances import circumstances
from benchmarks.schedules.pauses import WIDTH, Pausing, emulating, set_costs, wake_sharply
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.continuous import Stream
from shardwise.execute.program import Program
from shardwise.launch import RankContext, init_process_group, run_ranks
from shardwise.layout import Layout
from shardwise.plan.sources import GeneratedSource
from shardwise.schedule import Costs, generate, pipedream_2bw, simulate

__all__ = ["Size", "main", "measure", "row_of"]

FORWARD_S, BACKWARD_S = 10e-3, 20e-3
WARM_UP_STEPS = 2
RATE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Size:
    """A pipeline, and how many steps of it are timed, how many times."""

    num_ranks: int
    num_micro_batches: int
    steps: int
    rounds: int

    @property
    def costs(self) -> Costs:
        return Costs.uniform(self.num_ranks, forward=FORWARD_S, backward=BACKWARD_S)


def measure(context: RankContext, size: Size) -> list[tuple[float, float]]:
    """Of every round, the seconds of a step that is drained and of one that is not, on this rank."""
    torch.set_num_threads(1)
    if not dist.is_initialized():
        init_process_group(context, backend="gloo")
    wake_sharply()
    samples = torch.Generator().manual_seed(2)
    batch = {key: torch.randn(size.num_micro_batches, WIDTH, generator=samples) for key in ("x", "labels")}
    parts = split(batch, micro_batches=size.num_micro_batches, replicas=1, weights=lambda _: 1.0)[0]
    rounds = []
    with emulating():
        drained, continuous = (
            _program(context, size, name, {key: tensor[:1] for key, tensor in batch.items()})
            for name in ("1f1b", pipedream_2bw.NAME)
        )
        stream = continuous.stream(first_step=0, update=lambda step, norm: _update(continuous))
        for number in range(size.rounds):
            set_costs(drained.parameters, size.costs)
            drained_s = _drained(drained, parts, size.steps)
            set_costs(continuous.parameters, size.costs)
            first = number * (WARM_UP_STEPS + size.steps + 1)
            rounds.append((drained_s, _continuous(stream, parts, size.steps, first)))
        drained.close()
        continuous.close()
    return rounds


def _program(context: RankContext, size: Size, name: str, sample: Mapping[str, torch.Tensor]) -> Program:
    stages = tuple((f"layers.{stage}",) for stage in range(size.num_ranks))
    layout = Layout(pp=size.num_ranks, micro_batches=size.num_micro_batches, schedule=name, stages=stages)
    source = GeneratedSource(name=name, num_ranks=size.num_ranks)
    return assemble(Pausing(size.num_ranks), sample, layout=layout, rank=context.rank, schedule=source)


def _update(program: Program) -> None:
    with torch.no_grad():
        for parameter in program.parameters.values():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=RATE)


def _drained(program: Program, parts: tuple[MicroBatch, ...], steps: int) -> float:
    start_s = 0.0
    for step in range(WARM_UP_STEPS + steps):
        if step == WARM_UP_STEPS:
            start_s = time.perf_counter()
        program.step(parts, step=step)
        program.gradient_norm()
        _update(program)
        program.model.zero_grad()
    return (time.perf_counter() - start_s) / steps


def _continuous(stream: Stream, parts: tuple[MicroBatch, ...], steps: int, first: int) -> float:
    ends: list[float] = []  # of windows
    last = WARM_UP_STEPS + steps
    for step in range(last + 1):
        stream.step(first + step, parts, None if step == last else parts)
        ends.append(time.perf_counter())
    return (ends[last - 1] - ends[WARM_UP_STEPS - 1]) / steps


def row_of(size: Size, drained_s: float, continuous_s: float) -> dict[str, Any]:
    """Seconds of a step, measured and simulated; `gain` is how much less time the step without a flush takes."""
    p, m = size.num_ranks, size.num_micro_batches
    simulated_s = simulate(generate("1f1b", num_ranks=p, num_micro_batches=m), costs=size.costs).seconds
    of_steps = [
        simulate(pipedream_2bw.unrolled(num_ranks=p, num_micro_batches=m, num_steps=steps), costs=size.costs).seconds
        for steps in (3, 4)
    ]
    return {
        "ranks": p,
        "micro_batches": m,
        "drained_s": drained_s,
        "drained_simulated_s": simulated_s,
        "continuous_s": continuous_s,
        "continuous_simulated_s": of_steps[1] - of_steps[0],
        "without_bubble_s": m * (FORWARD_S + BACKWARD_S),
        "gain": 1.0 - continuous_s / drained_s,
        "gain_simulated": 1.0 - (of_steps[1] - of_steps[0]) / simulated_s,
    }


def main() -> None:
    """Measure and print; `--out` writes the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        for micro_batches in options.micro_batches:
            size = Size(num_ranks=ranks, num_micro_batches=micro_batches, steps=options.steps, rounds=options.rounds)
            of_ranks = run_ranks(measure, (size,), world_size=ranks)
            drained, continuous = (
                min(max(seconds[which] for seconds in rounds) for rounds in zip(*of_ranks, strict=True))
                for which in (0, 1)
            )
            row = row_of(size, drained, continuous)
            rows.append(row)
            print(
                f"pp={ranks} m={micro_batches}: drained {1e3 * drained:6.1f} ms (simulated "
                f"{1e3 * row['drained_simulated_s']:6.1f}), without a flush {1e3 * continuous:6.1f} ms (simulated "
                f"{1e3 * row['continuous_simulated_s']:6.1f}), gain {row['gain']:.0%} (simulated "
                f"{row['gain_simulated']:.0%})",
                flush=True,
            )
    if options.out is not None:
        found = {**circumstances("benchmarks.schedules.asynchronous"), "rows": rows}
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
