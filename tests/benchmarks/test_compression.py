"""The page on compression says what the results say; shares are of the run without."""

from __future__ import annotations

import json

import pytest

from benchmarks.compression.contenders import CONTENDERS
from benchmarks.compression.page import PAGE, PLOTS, page, plots
from benchmarks.compression.run import RESULTS, figures, wire_bytes
from shardwise.layout import Communication


def test_every_contender_is_something_that_can_be_asked_for() -> None:
    assert len({each.name for each in CONTENDERS}) == len(CONTENDERS)
    for each in CONTENDERS:
        assert Communication(gradients=each.gradients, activations=each.activations)


def test_bytes_are_those_that_leave_a_rank_of_two() -> None:
    sent = {"dp.all_reduce": 100, "dp.all_gather": 40, "dp.all_to_all": 20, "dp.saved": 999, "pp.send": 7}
    assert wire_bytes(sent, "dp") == 100 + 20 + 10
    assert wire_bytes(sent, "pp") == 7


def test_shares_are_of_the_same_layout_without_compression() -> None:
    rows = [
        {"name": "dp=2 none", "layout": "dp=2", "bytes": 100, "loss": 2.0},
        {"name": "dp=2 int8", "layout": "dp=2", "bytes": 25, "loss": 2.1},
        {"name": "pp=2 int8", "layout": "pp=2", "bytes": 5, "loss": 2.0},
    ]
    assert figures(rows) == {"dp=2 int8 bytes": 0.25, "dp=2 int8 loss": 1.05}


def test_the_page_and_its_plots_are_those_of_the_results() -> None:
    if not RESULTS.exists():
        pytest.fail("there are no results; run python -m benchmarks.compression")
    record = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(record)
    for name, svg in plots(record).items():
        assert (PLOTS / name).read_text() == svg
