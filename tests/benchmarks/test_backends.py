"""The table and the figures of the comparison of backends, from rows that were made by hand."""

from __future__ import annotations

import pytest

from benchmarks.backends.page import table
from benchmarks.backends.run import _figures, _rows


def found(what: str = "all-reduce") -> dict[str, object]:
    seconds = {"gloo": [2e-6, 4e-6, 8e-6], "MPI": [1e-6, 2e-6, 2e-6], "shared memory": [1e-6, 1e-6, 1e-6]}
    return {"what": what, "ranks": 2, "bytes": 1 << 20, "seconds": seconds}


def test_a_row_has_the_median_and_the_median_of_the_ratios_of_one_round() -> None:
    rows = _rows(found(), "auto", "auto")
    assert [(row["backend"], row["us"], row["to_gloo"]) for row in rows] == [
        ("gloo", 4.0, 1.0),
        ("MPI", 2.0, 0.5),
        ("shared memory", 1.0, 0.25),
    ]


def test_of_a_start_with_an_algorithm_mpi_alone_is_kept_under_its_name() -> None:
    told = found()
    seconds = told["seconds"]
    assert isinstance(seconds, dict)
    del seconds["shared memory"]
    (row,) = _rows(told, "ring", "linear")
    assert (row["backend"], row["algorithm"]) == ("MPI", "ring")
    assert _rows({**told, "what": "all-gather"}, "ring", "linear")[0]["algorithm"] == "linear"


def test_figures_take_the_best_algorithm_of_every_size() -> None:
    rows = []
    for what in ("all-reduce", "all-gather", "reduce-scatter", "one way"):
        rows += _rows(found(what), "auto", "auto")
    better = {**rows[1], "algorithm": "ring", "to_gloo": 0.125}
    figures = _figures([*rows, better])
    assert figures["mpi_all_reduce_2_vs_gloo"] == pytest.approx(0.5)
    assert figures["mpi_all_reduce_2_best_vs_gloo"] == pytest.approx(0.125)
    assert figures["mpi_one_way_2_best_vs_gloo"] == pytest.approx(0.5)


def test_the_table_has_a_line_a_backend_and_a_column_a_size() -> None:
    rows = [*_rows(found(), "auto", "auto"), *_rows({**found(), "bytes": 1 << 10}, "auto", "auto")]
    assert table(rows).splitlines() == [
        "| exchange | ranks | by | 1 KiB | 1 MiB |",
        "|---|--:|---|--:|--:|",
        "| all-reduce | 2 | gloo | 4 | 4 |",
        "| all-reduce | 2 | MPI | 2 (0.50) | 2 (0.50) |",
        "| all-reduce | 2 | shared memory | 1 (0.25) | 1 (0.25) |",
    ]
