"""The estimate of a run: made again for any cluster, kept as a file, equal to what `price` says."""

from __future__ import annotations

import dataclasses
import json

import pytest

from plan.hand_runs import LAYOUT, SENT, estimate, machine, predictor, works
from shardwise.errors import ConfigError
from shardwise.plan.job import Job
from shardwise.plan.price import price
from shardwise.plan.run_estimate import Predictor, estimate_file, read_estimate
from shardwise.schedule import generate


def test_a_prediction_is_the_price_with_its_parts() -> None:
    predicted = predictor()(machine())
    made = price(works(), LAYOUT, machine(), Job(global_batch=8), num_micro_batches=4, exact=True)
    assert predicted.step_s == pytest.approx(made.step_s)
    assert predicted.memory == made.memory
    assert predicted.stages == ((0,), (1,))
    first = predicted.time[0]
    assert predicted.pipeline_s + first.replicas + first.optimizer == pytest.approx(predicted.step_s)


def test_a_backward_is_its_two_halves_and_takes_longer_than_a_forward() -> None:
    actions = predictor()(machine()).actions
    for stage in range(2):
        assert actions["I"][stage] + actions["W"][stage] == pytest.approx(actions["B"][stage])
    slower = dataclasses.replace(machine().hosts[0].device, bytes_per_s=1e11)
    hosts = dataclasses.replace(machine().hosts[0], device=slower)
    later = predictor()(dataclasses.replace(machine(), hosts=(hosts,)))
    # four passes over a billion bytes, at 80 % of 1 TB/s and of a tenth of it
    assert later.actions["F"][0] - actions["F"][0] == pytest.approx(4 * (1e9 / 8e10 - 1e9 / 8e11), rel=1e-3)
    assert later.actions["B"][0] == pytest.approx(actions["B"][0])


def test_an_edge_has_bytes_and_seconds_there_and_back() -> None:
    (edge,) = predictor()(machine()).edges
    link = machine().links[0]
    assert (edge.source, edge.target, edge.forward_bytes, edge.backward_bytes) == (0, 1, SENT, SENT)
    assert edge.forward_s == pytest.approx(link.latency_s + SENT / (link.bytes_per_s * link.efficiency))


def test_an_estimate_survives_its_file(tmp_path) -> None:
    made = estimate()
    made.write(tmp_path / "run")
    read = read_estimate(tmp_path / "run")
    assert read.predicted == made.predicted
    assert read.works == made.works
    assert read == made


def test_a_folder_without_an_estimate_or_with_that_of_another_version_is_an_error_that_names_it(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"estimate\.json.*folder of a run"):
        read_estimate(tmp_path)
    values = json.loads(estimate().write(tmp_path).read_text())
    values["works"][0]["colour"] = 3
    estimate_file(tmp_path).write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="colour"):
        read_estimate(tmp_path)


def test_a_schedule_of_a_file_is_priced_as_the_generated_one(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(generate("1f1b", num_ranks=2, num_micro_batches=4).to_json())
    layout = dataclasses.replace(LAYOUT, schedule=str(file))
    predicted = Predictor(works(), layout, Job(global_batch=8), 4, machine())(machine())
    assert predicted.step_s == pytest.approx(predictor()(machine()).step_s)
