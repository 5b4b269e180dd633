"""How far searched schedules are from the proven optimum: the smaller cases, in a process of their own.

`python -m benchmarks.schedules.searched.proof [SECONDS]` prints one line of JSON a case and placement. The solver must
not share a process with HiGHS, which other parts of a benchmark may load.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.schedules.searched.cases import PROVEN_PLACEMENTS, smaller_cases
from shardwise.errors import ScheduleError
from shardwise.schedule.exact import prove
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.search import search
from shardwise.schedule.search_placements import on_devices

__all__ = ["proofs"]


def proofs(seconds: float) -> list[dict[str, Any]]:
    """Of every smaller case and placement: found, bound, whether it closed; `seconds` at most for each of them."""
    command = [sys.executable, "-m", "benchmarks.schedules.searched.proof", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(seconds: float) -> None:
    for case in smaller_cases():
        for placement, chunks in PROVEN_PLACEMENTS:
            ranks = stages_of_ranks(placement, num_ranks=case.num_ranks, chunks=chunks)
            cut = case.cut(chunks, ranks)
            costs = on_devices(cut.costs, ranks, case.speeds)
            asked = {"num_micro_batches": case.num_micro_batches, "ranks": ranks, "memory": cut.memory}
            try:
                found = search(costs, **asked)
            except ScheduleError:
                continue  # no room for one micro-batch so
            bound, closed, by = found.lower_bound_s, found.seconds <= found.lower_bound_s * (1 + 1e-6), "bound"
            if not closed:
                proof = prove(costs, known=found.schedule, seconds=seconds, num_threads=2, **asked)
                bound, closed, by = max(bound, proof.bound_s), proof.optimal, "solver"
            print(
                json.dumps(
                    {
                        "case": case.name,
                        "placement": f"{placement.value} x{chunks}",
                        "searched_s": found.seconds,
                        "bound_s": bound,
                        "closed": closed,
                        "by": by,
                        "above": round(max(0.0, found.seconds / bound - 1), 6),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
