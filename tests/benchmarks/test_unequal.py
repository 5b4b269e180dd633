"""The benchmark of unequal devices: clusters from rates, ways that the planner cuts, figures from seconds."""

from __future__ import annotations

import pytest

from benchmarks.planner.unequal import MICRO_BATCHES, QUICK, cluster_of, figures_of, planned
from shardwise.layout import Layout


def test_ranks_of_about_the_same_rate_are_of_one_kind() -> None:
    cluster = cluster_of([20e9, 20.6e9, 41e9])
    assert [hosts.devices for hosts in cluster.hosts] == [2, 1]
    slow, fast = (hosts.device for hosts in cluster.hosts)
    assert fast.rate("float32") * fast.efficiency.matmul == pytest.approx(41e9)
    assert fast.bytes_per_s / slow.bytes_per_s == pytest.approx(41 / 20)


def test_the_faster_rank_has_about_half_of_the_layers_and_of_the_batch() -> None:
    ways, predicted = planned(QUICK, cluster_of([20e9, 20e9, 40e9]))
    even, uneven = (Layout.parse(ways[name][0]) for name in ("even stages", "stages by speed"))
    blocks = [sum(_blocks(unit) for unit in stage) for stage in uneven.stages]
    assert sum(blocks) == QUICK.blocks
    assert blocks[2] > 1.5 * max(blocks[:2])
    assert max(map(len, even.stages)) - min(map(len, even.stages)) <= 2
    assert ways["equal shares"][1] == (8, 8, 8)
    assert ways["shares by speed"][1] == (6, 6, 12)
    assert sum(ways["shares by speed"][1]) == MICRO_BATCHES
    assert predicted["even stages"] / predicted["stages by speed"] > 1.25


def test_gains_are_those_of_medians_and_of_every_round() -> None:
    seconds = {"even stages": [3.0, 4.0, 4.2], "stages by speed": [2.0, 2.0, 3.0]}
    seconds |= {"equal shares": [1.0] * 3, "shares by speed": [1.0] * 3}
    figures = figures_of(seconds, dict.fromkeys(seconds, 1.0))
    assert figures["stages_gain"] == 2.0
    assert (figures["stages_gain_least"], figures["stages_gain_most"]) == (1.4, 2.0)
    assert figures["shares_gain"] == 1.0


def _blocks(text: str) -> int:
    """Of a text such as layers.3 or layers.3-7."""
    if not text.startswith("layers."):
        return 0
    first, _, last = text.removeprefix("layers.").partition("-")
    return int(last or first) - int(first) + 1
