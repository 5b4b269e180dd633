"""A report as tables: what was not measured says so, and no line is wider than a terminal."""

from __future__ import annotations

import json

from plan.hand_runs import LAYOUT, estimate, machine, measured_as, predictor
from shardwise.plan.compare_run import compare
from shardwise.plan.run_measured import RunMeasured
from shardwise.report.text import plain_report, report_text


def text_of(measured: RunMeasured) -> str:
    made = estimate()
    return report_text(made, measured, compare(made.predicted, measured, LAYOUT, made.traffic))


def line(text: str, start: str) -> list[str]:
    (found,) = [each for each in text.splitlines() if each.startswith(f"  {start}")]
    return found.split()


def test_a_line_has_what_was_predicted_what_was_measured_and_the_error() -> None:
    measured = measured_as(predictor()(machine()), memory={0: 1 << 30, 1: 1 << 31})
    assert line(text_of(measured), "rank 1")[-3:-1] == ["2", "GiB"]
    assert line(text_of(measured), "a step ")[-1] == "+0.0%"


def test_what_was_not_measured_says_so() -> None:
    text = text_of(RunMeasured(steps=3, step_s=0.5))
    assert line(text, "rank 0")[-2:] == ["not", "measured"]
    assert line(text, "F of stage 0")[-2:] == ["not", "measured"]
    assert line(text, "  of it data")[-3:] == ["-", "not", "measured"]
    assert "nothing yet" in text_of(RunMeasured())


def test_no_line_is_wider_than_100_columns() -> None:
    text = text_of(measured_as(predictor()(machine()), spread=0.012))
    assert max(len(each) for each in text.splitlines()) <= 100
    assert "within ±1.2% of their median" in text


def test_json_has_the_same_numbers() -> None:
    made, measured = estimate(), measured_as(predictor()(machine()))
    rows = compare(made.predicted, measured, LAYOUT, made.traffic)
    read = json.loads(json.dumps(plain_report(made, measured, rows)))
    assert [row["measured"] for row in read["rows"]] == [row.measured for row in rows]
    assert read["median_error"]["step"] < 1e-6
