"""What recording costs: marks of every action of every step, and the bringing together of a step that is kept.

    python -m benchmarks.schedules.timeline_cost

Marks are taken in the way of the engine, three an action; the loop around them is subtracted. What a kept step takes
besides, on rank 0, is measured for as many actions as are asked for, without the messages between ranks.
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

from shardwise.execute.moments import HostClock
from shardwise.schedule import Costs, chain, generate, simulate
from shardwise.schedule.recording import Recording

ACTIONS, ROUNDS = 100_000, 7


def mark_ns() -> float:
    """Nanoseconds that the marks of one action take, the quickest of several rounds."""
    return max(min(_marked() for _ in range(ROUNDS)) - min(_unmarked() for _ in range(ROUNDS)), 0.0) / ACTIONS * 1e9


def _marked() -> float:
    clock, marks, actions = HostClock(), list[Any](), list[int]()
    begun = time.perf_counter()
    for action in range(ACTIONS):
        start = clock.now()
        ready = clock.now()
        actions.append(action)
        marks += start, ready, clock.now()
    return time.perf_counter() - begun


def _unmarked() -> float:
    begun = time.perf_counter()
    for _ in range(ACTIONS):
        pass
    return time.perf_counter() - begun


def kept_s(num_ranks: int, num_micro_batches: int) -> float:
    """Seconds to predict a step from its own costs, to tell it and to write its file."""
    schedule = generate("zb-v", num_ranks=num_ranks, num_micro_batches=num_micro_batches)
    timeline = simulate(schedule, costs=Costs.uniform(schedule.num_stages, forward=1e-3, backward=2e-3))
    edges = chain(schedule.num_stages)
    begun = time.perf_counter()
    recording = Recording(step=0, layout="", schedule=schedule, edges=edges, measured=(timeline,))
    with tempfile.TemporaryDirectory() as folder:
        recording.write(folder)
        str(recording)
        return time.perf_counter() - begun


def main() -> None:
    print(f"marks: {mark_ns():.0f} ns an action")
    for num_ranks, num_micro_batches in ((2, 8), (8, 32), (16, 64)):
        milliseconds = 1e3 * min(kept_s(num_ranks, num_micro_batches) for _ in range(3))
        count = 6 * num_ranks * num_micro_batches
        print(f"a kept step of {num_ranks} ranks and {count} actions: {milliseconds:.1f} ms on rank 0")


if __name__ == "__main__":
    main()
