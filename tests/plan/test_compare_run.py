"""Rows of a report: a number predicted, a number measured, and an error only where there are both."""

from __future__ import annotations

import pytest

from plan.hand_runs import LAYOUT, estimate, machine, measured_as, predictor
from shardwise.plan.compare_run import Row, compare, median_error
from shardwise.plan.run_measured import RunMeasured


def rows_of(measured: RunMeasured) -> dict[str, Row]:
    made = estimate()
    return {
        f"{row.section}: {row.what.strip()}": row for row in compare(made.predicted, measured, LAYOUT, made.traffic)
    }


def test_a_run_that_did_as_predicted_has_no_error() -> None:
    rows = rows_of(measured_as(predictor()(machine())))
    compared = [row for row in rows.values() if row.error is not None]
    assert len(compared) >= 12
    assert all(row.error == pytest.approx(0, abs=1e-6) for row in compared)


def test_an_error_is_how_much_the_prediction_is_above_the_measurement() -> None:
    predicted = predictor()(machine())
    rows = rows_of(measured_as(predicted, step_s=predicted.step_s / 1.25, memory={0: 1 << 40}))
    assert rows["step: a step"].error == pytest.approx(0.25)
    assert rows["memory: rank 0"].error == pytest.approx(-1.0, abs=1e-2)
    assert rows["memory: rank 1"].measured is None
    assert rows["memory: rank 1"].error is None


def test_nothing_is_made_up_where_nothing_was_measured() -> None:
    rows = rows_of(RunMeasured())
    assert all(row.measured is None and row.error is None for row in rows.values())
    assert {"actions: F of stage 0", "actions: B of stage 1", "waiting: place 1", "transfers: 1 to 0"} <= set(rows)
    assert median_error(list(rows.values())) is None


def test_kinds_of_actions_are_those_that_were_recorded() -> None:
    rows = rows_of(RunMeasured(steps=1, actions={"F": {0: 0.02, 1: 0.02}, "I": {0: 0.01}, "W": {0: 0.01}}))
    assert "actions: B of stage 0" not in rows
    assert rows["actions: I of stage 0"].measured == 0.01
    assert "actions: I of stage 1" not in rows


def test_what_is_neither_pipeline_nor_sums_nor_optimizer_is_the_rest_of_a_step() -> None:
    rows = rows_of(RunMeasured(steps=1, step_s=1.0, pipeline_s=0.7, sums_s=0.1, optimizer_s=0.05, data_s=0.02))
    assert rows["step: everything else"].measured == pytest.approx(0.25)  # two stages without replicas sum nothing
    assert rows["step: of it data"].predicted is None


def test_bytes_that_were_not_predicted_and_bytes_that_were_not_sent_are_shown() -> None:
    rows = rows_of(RunMeasured(steps=1, traffic={0: {"ep.all_to_all": 7}, 1: {}}))
    assert (
        rows["traffic: ep.all_to_all of place 0"].predicted,
        rows["traffic: ep.all_to_all of place 0"].measured,
    ) == (
        None,
        7,
    )
    assert rows["traffic: pp.send of place 1"].measured == 0
    assert rows["traffic: pp.send of place 1"].error is None
