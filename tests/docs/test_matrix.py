"""The page of the matrix has the figures of its results, which are whole and within the tolerance."""

from __future__ import annotations

import itertools
import json

import pytest

from benchmarks.matrix.cases import all_cases
from benchmarks.matrix.page import PAGE, rendered
from benchmarks.matrix.resume import LAYOUTS

RESULTS = PAGE.parents[1] / "benchmarks" / "matrix" / "results"
pytestmark = pytest.mark.skipif(not RESULTS.exists(), reason="`make verify-all` writes the results, and the page")


def test_the_page_is_what_the_results_render() -> None:
    assert PAGE.read_text(encoding="utf-8") == rendered(), "run `python -m benchmarks.matrix.page`"


def test_the_results_have_every_case_and_none_failed() -> None:
    figures = json.loads((RESULTS / "matrix.json").read_text(encoding="utf-8"))
    assert list(figures["cases"]) == [str(case) for case in all_cases()]
    assert [name for name, each in figures["cases"].items() if each["why"]] == []
    assert all(each["worst"] <= figures["tolerance"] for each in figures["cases"].values())


def test_the_results_have_every_pair_and_none_failed() -> None:
    figures = json.loads((RESULTS / "resume.json").read_text(encoding="utf-8"))
    assert list(figures["pairs"]) == [f"{first} -> {second}" for first, second in itertools.product(LAYOUTS, LAYOUTS)]
    assert figures["failed"] == {}
    assert figures["worst"] <= figures["tolerance"]
