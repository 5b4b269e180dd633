"""The contenders of the transport benchmark move and sum what they must; the figures are the worst ratios."""

from __future__ import annotations

import pytest

from benchmarks.transport.ranks import GLOO, OURS, timed_sums, timed_transfers
from benchmarks.transport.run import _figures, _rows, _slowest
from shardwise.launch import RankContext
from shardwise.testing import on_ranks


@pytest.mark.slow
@on_ranks(2)
def test_both_contenders_are_timed_in_every_round(rank: RankContext) -> None:
    measured = {**timed_transfers(rank, 5000, 2), **timed_sums(rank, 5000, 2)}  # raise where a value is wrong
    sums = {"all-reduce", "all-reduce in place", "all-reduce of any memory", "reduce-scatter", "all-gather"}
    assert set(measured) == {"one way", "posting a send", *sums}
    for seconds in measured.values():
        assert {name: len(rounds) for name, rounds in seconds.items()} == {OURS: 2, GLOO: 2}


def test_a_figure_is_the_worst_median_of_paired_ratios() -> None:
    rows = _rows({"one way": {OURS: [1.0, 2.0, 3.0], GLOO: [2.0, 4.0, 4.0]}}, 4096, 2)
    rows += _rows({"one way": {OURS: [3.0], GLOO: [4.0]}}, 1 << 20, 2)
    of_ranks = [{"all-reduce": {OURS: [1.0], GLOO: [4.0]}}, {"all-reduce": {OURS: [2.0], GLOO: [3.0]}}]
    rows += _rows(_slowest(of_ranks), 4096, 4)
    rows += _rows({"all-gather": {OURS: [3.0], GLOO: [4.0]}}, 1 << 20, 2)
    rows += _rows({"all-gather": {OURS: [9.0], GLOO: [4.0]}}, 1 << 16, 2)  # too small to count
    assert [row["ratio"] for row in rows] == [0.5, 0.75, 0.5, 0.75, 2.25]
    figures = {name: ratio for name, ratio in _figures(rows).items() if ratio is not None}
    assert figures == {"one_way_vs_gloo": 0.75, "all_reduce_4_vs_gloo": 0.5, "all_gather_2_vs_gloo": 0.75}
