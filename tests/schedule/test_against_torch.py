"""No schedule of ours waits longer or keeps more than torch's schedule of the same name, in the same costs."""

from __future__ import annotations

import pytest

from schedule.torch_oracle import STYLES, runtime
from shardwise.schedule import Costs, check, generate, placement, simulate
from shardwise.schedule.schedule import Schedule
from shardwise.schedule.torch_csv import read_csv


def theirs_of(name: str, p: int, m: int, v: int) -> Schedule | None:
    """Torch's schedule of that name, None where torch refuses the numbers."""
    too_few = name == "dualpipe-v" and m < 2 * p
    if too_few or (name in ("interleaved", "zb-h1") and m % max(1, m // p)):
        return None
    order = runtime(p, v, m, STYLES[name]).pipeline_order
    rows = [",".join("" if cell is None else str(cell) for cell in order[r]) for r in range(p)]
    return read_csv("\n".join(rows), name=name)


@pytest.mark.parametrize(
    "name, v", [("interleaved", 2), ("interleaved", 3), ("zb-h1", 2), ("zb-v", 2), ("dualpipe-v", 2), ("looped-bfs", 2)]
)
@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_ours_is_as_short_and_as_small(name: str, v: int, p: int) -> None:
    for m in sorted({1, 2, p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 4 * p}):
        theirs = theirs_of(name, p, m, v)
        if theirs is None:
            continue
        ours = generate(name, num_ranks=p, num_micro_batches=m, chunks=v)
        assert theirs.ranks == ours.ranks == placement(name, num_ranks=p, chunks=v)
        for backward in (2.0, 3.0):
            costs = Costs.uniform(p * v, backward=backward)
            assert simulate(ours, costs=costs).seconds <= simulate(theirs, costs=costs).seconds, (m, backward)
        assert max(check(ours).peak_per_rank) <= max(check(theirs).peak_per_rank), m
