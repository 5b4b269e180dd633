"""The benchmark of the simulator runs and says what it measured."""

from __future__ import annotations

import json

import pytest

from benchmarks.schedules.simulate import main


def test_it_ends_with_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--ranks", "4", "--micro-batches", "8"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["seconds"].keys() == record["processor_seconds"].keys() == {"1f1b", "zb-h1"}
    assert record["seconds"]["1f1b"].keys() == {"generate", "length", "simulate", "bubble"}
