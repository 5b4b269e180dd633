"""How long a large pipeline takes to simulate: `python -m benchmarks.schedules.simulate [--ranks P --micro-batches M]`.

Seconds of the clock and of the processor, of one process: to generate the schedule, to find the length of its step, and
to make the whole timeline with its bubble. Prints a table and one line of JSON. No device is used, no model loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.common.circumstances import circumstances
from shardwise.schedule import Costs, Timeline, generate, seconds_of, simulate

__all__ = ["main"]

NAMES = ("1f1b", "zb-h1")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules.simulate", description=__doc__)
    parser.add_argument("--ranks", type=int, default=128)
    parser.add_argument("--micro-batches", type=int, default=1024)
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {**circumstances("benchmarks.schedules.simulate"), "seconds": {}, "processor_seconds": {}}
    for name in NAMES:
        clock, processor, timeline = _measured(name, options.ranks, options.micro_batches)
        record["seconds"][name], record["processor_seconds"][name] = clock, processor
        texts = (f"{what} {seconds:.2f} s" for what, seconds in clock.items())
        print(f"{name:8} {timeline}; {', '.join(texts)} (processor {sum(processor.values()):.2f} s)")
    print(json.dumps(record))


def _measured(name: str, ranks: int, micro_batches: int) -> tuple[dict[str, float], dict[str, float], Timeline]:
    clock: dict[str, float] = {}
    processor: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(what: str) -> Iterator[None]:
        start = time.perf_counter(), time.process_time()
        yield
        clock[what] = round(time.perf_counter() - start[0], 3)
        processor[what] = round(time.process_time() - start[1], 3)

    costs = Costs.uniform(ranks)
    with timed("generate"):
        schedule = generate(name, num_ranks=ranks, num_micro_batches=micro_batches)
    with timed("length"):
        seconds_of(schedule, costs)
    with timed("simulate"):
        timeline = simulate(schedule, costs=costs)
    with timed("bubble"):
        timeline.bubble_fraction  # noqa: B018  counted once, kept then
    return clock, processor, timeline


if __name__ == "__main__":
    main()
