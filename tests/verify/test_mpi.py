"""Layouts whose ranks exchange through MPI alone are one device: one start of mpirun for many of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from under_mpi import mpirun, needs_mpi

SCRIPT = Path(__file__).parents[1] / "mpi_equality.py"
FIRST = ("dp=2", "tp=2", "pp=2")
OF_TWO = ("fsdp=2", "cp=2", "ep=2", "pp=2,schedule=zb-h1", "tp=2+shared-memory", "pp=2+shared-memory")
OF_FOUR = ("dp=2,pp=2", "tp=2,pp=2", "fsdp=2,tp=2", "cp=2,pp=2", "ep=2,pp=2", "dp=2,pp=2+shared-memory")

Found = dict[str, dict[str, Any]]


def compared(ranks: int, layouts: tuple[str, ...], folder: Path, timeout_s: float) -> Found:
    results = folder / "results.json"
    finished = mpirun(ranks, [SCRIPT, results, *layouts], timeout_s=timeout_s)
    assert finished.returncode == 0, finished.stderr
    found: Found = json.loads(results.read_text())
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return compared(2, FIRST, tmp_path_factory.mktemp("first"), timeout_s=270)


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return compared(2, OF_TWO, tmp_path_factory.mktemp("two"), timeout_s=570)


@pytest.fixture(scope="module")
def of_four(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return compared(4, OF_FOUR, tmp_path_factory.mktemp("four"), timeout_s=570)


def is_one_device(said: dict[str, Any]) -> None:
    assert said["equal"], said["text"]
    assert max(said["loss"], said["gradient"], said["weight"]) <= 1e-5  # float32 sums taken in another order


@needs_mpi
@pytest.mark.slow  # beside tests/comm/test_mpi.py and a run that mpirun starts, in tests/launch
@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", FIRST)
def test_over_mpi_two_ranks_are_one_device(layout: str, first: Found) -> None:
    is_one_device(first[layout])


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", OF_TWO)
def test_over_mpi_every_axis_is_one_device(layout: str, of_two: Found) -> None:
    is_one_device(of_two[layout])


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", OF_FOUR)
def test_over_mpi_four_ranks_are_one_device(layout: str, of_four: Found) -> None:
    is_one_device(of_four[layout])
