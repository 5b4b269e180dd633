"""Processes that share a suite run every test once, modules whole and in order."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.side_by_side import claimed, with_next


@dataclass(frozen=True)
class Item:
    nodeid: str


def suite(*modules: tuple[str, int]) -> list[Any]:
    return [Item(f"tests/{module}.py::test_{number}") for module, count in modules for number in range(count)]


def test_two_processes_take_each_module_once_as_they_come_to_it(tmp_path: Path) -> None:
    items = suite(("a", 3), ("b", 1), ("c", 2), ("d", 1))
    one, two = claimed(items, tmp_path), claimed(items, tmp_path)
    first = [next(one)]  # takes a
    second = [next(two), next(two)]  # takes b, then c
    first += list(one)  # the rest of a, then d
    second += list(two)
    assert first == suite(("a", 3), ("d", 1))
    assert second == suite(("b", 1), ("c", 2))


def test_each_comes_with_the_one_behind_it_across_modules(tmp_path: Path) -> None:
    items = suite(("a", 2), ("b", 1), ("c", 1))
    (tmp_path / "tests-b.py").touch()
    assert list(with_next(claimed(items, tmp_path))) == [
        (items[0], items[1]),
        (items[1], items[3]),
        (items[3], None),
    ]


def test_what_is_taken_is_not_run_and_fixtures_of_a_module_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["tests.side_by_side"]\n')
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in "abc":
            (tmp_path / folder / f"test_{folder}_{name}.py").write_text(_MODULE)
    (tmp_path / "claims" / "one-test_one_b.py").touch()
    (tmp_path / "claims" / "two-test_two_a.py").touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", "--claims=claims"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    printed = "".join(character for character in done.stdout if character in "<>tu")
    assert "8 passed" in done.stdout, done.stdout
    assert printed.startswith("<tu>" * 4), done.stdout
    assert len(list((tmp_path / "claims").iterdir())) == 6


_MODULE = """
import pytest

@pytest.fixture(scope="module", autouse=True)
def around():
    print("<", end="")
    yield
    print(">", end="")

def test_one():
    print("t", end="")

def test_two():
    print("u", end="")
"""
