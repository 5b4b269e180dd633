"""torch.distributed over MPI alone, on ranks of a real mpirun: operations, groups, the store, timeouts, progress."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mpi_cases
from under_mpi import mpirun, needs_mpi

CASES = [case.__name__ for case in mpi_cases.CASES]

Said = dict[str, list[str | None]]


def said_by(ranks: int, folder: Path) -> Said:
    """What the ranks of one start said of each case: the error of every rank, or None."""
    results = folder / "results.json"
    finished = mpirun(ranks, [mpi_cases.__file__, results])
    assert finished.returncode == 0, finished.stderr
    said: Said = json.loads(results.read_text())
    return said


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Said:
    return said_by(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Said:
    return said_by(4, tmp_path_factory.mktemp("four"))


@needs_mpi
@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case: str, two: Said) -> None:
    assert two[case] == [None] * 2


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_four_ranks(case: str, four: Said) -> None:
    assert four[case] == [None] * 4
