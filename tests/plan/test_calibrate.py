"""Calibration finds the coefficients of the machine that a run was measured on, as far as the run shows them."""

from __future__ import annotations

import dataclasses

import pytest

from plan.hand_runs import estimate, machine, measured_as, predictor
from shardwise.describe.cluster import Cluster, Device, Efficiency
from shardwise.errors import ConfigError
from shardwise.plan.calibrate import Calibrated, calibrate
from shardwise.plan.compare_run import median_error
from shardwise.plan.run_estimate import Predictor
from shardwise.plan.run_measured import RunMeasured


def truth() -> Cluster:
    """The machine as it really is: slower than the given one in everything that a step of two stages shows."""
    hosts = machine().hosts[0]
    device = dataclasses.replace(hosts.device, efficiency=Efficiency(matmul=0.4, memory=0.5, launch_s=5e-6))
    return dataclasses.replace(
        machine(),
        hosts=(dataclasses.replace(hosts, device=device),),
        overheads=dataclasses.replace(machine().overheads, action_s=2e-3, step_s=5e-3, framework_bytes=1 << 30),
    )


def fitted() -> Calibrated:
    return calibrate([(estimate(), measured_as(predictor()(truth())))])


def device_of(cluster: Cluster) -> Device:
    return cluster.hosts[0].device


def test_the_fitted_cluster_predicts_the_run() -> None:
    made = fitted()
    before, after = median_error(made.before), median_error(made.after)
    assert before is not None
    assert after is not None
    assert before > 0.2
    assert after < 0.02
    assert made.after[0].error == pytest.approx(0, abs=0.02)


def test_what_a_run_shows_by_itself_is_found() -> None:
    made = fitted().cluster
    assert made.overheads.framework_bytes == pytest.approx(1 << 30, rel=0.02)
    assert device_of(made).efficiency.matmul == pytest.approx(0.4, rel=0.15)
    assert made.overheads.step_s == pytest.approx(5e-3, rel=0.2)


def test_what_nothing_depends_on_is_left_and_said_so() -> None:
    made = fitted()
    attention = next(each for each in made.coefficients if each.name == "efficiency.attention")
    assert not attention.seen
    assert attention.after == attention.before
    assert device_of(made.cluster).efficiency.attention == device_of(machine()).efficiency.attention


def test_shares_stay_shares_where_a_run_was_faster_than_promised() -> None:
    fast = predictor()(machine())
    measured = measured_as(
        fast, actions={kind: {0: fast.actions[kind][0] / 5} for kind in ("F", "B")}, step_s=fast.step_s / 5
    )
    made = calibrate([(estimate(), measured)])
    assert device_of(made.cluster).efficiency.matmul <= 1
    assert any(each.at_bound for each in made.coefficients)


def test_a_run_without_steps_and_a_cluster_without_room_are_errors() -> None:
    with pytest.raises(ConfigError, match="train on"):
        calibrate([(estimate(), RunMeasured())])
    small = dataclasses.replace(machine(), hosts=(dataclasses.replace(machine().hosts[0], devices=1),))
    with pytest.raises(ConfigError, match="1 devices are too few for 2 ranks"):
        calibrate([(estimate(), measured_as(predictor()(machine())))], small)


def test_several_runs_are_fitted_at_once() -> None:
    other = dataclasses.replace(estimate(), num_micro_batches=16)
    runs = [(each, measured_as(Predictor.of(each)(truth()))) for each in (estimate(), other)]
    made = calibrate(runs)
    assert sum(row.is_step for row in made.after) == 2
    assert all(abs(row.error or 0) < 0.02 for row in made.after if row.is_step)
