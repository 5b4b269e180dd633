"""What one layout saves, another resumes: the same bits, and the curve of one device.

Here run as few pairs as have every layout; every pair of all layouts is `make verify-all`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.matrix.resume import CURVE, LAYOUTS, REQUIRED, Runs, some_pairs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with Runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


def test_the_pairs_have_every_layout() -> None:
    assert {name for pair in some_pairs() for name in pair} == set(LAYOUTS)
    assert set(REQUIRED) < set(LAYOUTS)


@pytest.mark.parametrize("first, second", some_pairs())
def test_a_run_goes_on_under_another_layout_as_if_nothing_had_happened(runs: Runs, first: str, second: str) -> None:
    error, why = runs.pair(first, second)
    assert why == ""
    assert error <= CURVE


@pytest.mark.parametrize("first, second, optimizer", [("zero3", "tp2", "muon"), ("tp2", "pp2", "momentum")])
def test_what_other_optimizers_remember_goes_on_too(runs: Runs, first: str, second: str, optimizer: str) -> None:
    error, why = runs.pair(first, second, optimizer=optimizer)
    assert why == ""
    assert error <= CURVE
