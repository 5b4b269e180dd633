"""A run stores what its step was predicted to take: traced as its ranks run it, and never in its way."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from shardwise.cli import run_command
from shardwise.describe.catalogue import load_cluster
from shardwise.describe.cluster import Cluster
from shardwise.describe.cluster_file import cluster_text
from shardwise.events import read_events
from shardwise.launch import RankContext
from shardwise.plan.calibrate import calibrate
from shardwise.plan.compare_run import TRAFFIC, compare, median_error
from shardwise.plan.run_estimate import Predictor, estimate_file, read_estimate
from shardwise.report.read_run import read_run
from shardwise.testing import on_ranks
from shardwise.train.build import build_model, build_task, first_micro_batch
from shardwise.train.estimate import ProfilesOfRun, cluster_of, estimate_of, job_of, store_estimate
from shardwise.train.run import train_on_rank
from shardwise.train.run_file import run_from
from train.test_training import job

SECTIONS = ("step", "memory", "actions", "waiting", "traffic")


def check_report(folder: Path) -> None:
    """All that two ranks measure stands beside a prediction, and what they sent was predicted to the byte."""
    estimate, measured = read_estimate(folder), read_run(folder)
    rows = compare(estimate.predicted, measured, estimate.laid_out, estimate.traffic)
    sent = [row for row in rows if row.section == TRAFFIC]
    assert sent
    assert [row.predicted for row in sent] == [row.measured for row in sent]
    own = [section for section in SECTIONS if section != "waiting" or estimate.laid_out.pp > 1]
    assert all(median_error(rows, section) is not None for section in own), rows
    assert all(row.measured for row in rows if row.section in ("memory", "actions"))


@on_ranks(2, timeout_s=60)
def test_two_stages_are_predicted_reported_and_calibrated(rank: RankContext, tmp_path: Path) -> None:
    train_on_rank(rank, job(tmp_path, layout="pp=2", steps=8, timeline={"steps": [4, 6, -1]}))
    if rank.rank != 0:
        return
    check_report(tmp_path)
    (told,) = [event for event in read_events(tmp_path / "events") if event.kind == "estimate"]
    assert "a step" in str(told.data["text"])
    assert run_command(["report", str(tmp_path)]) == 0
    assert run_command(["plan", "--calibrate", str(tmp_path), "--out", str(tmp_path / "fitted.toml")]) == 0

    estimate, measured = read_estimate(tmp_path), read_run(tmp_path)
    fitted = load_cluster(str(tmp_path / "fitted.toml"))
    off = [
        compare(Predictor.of(estimate)(cluster), measured, estimate.laid_out, estimate.traffic)
        for cluster in (estimate.cluster, fitted)
    ]
    before, after = off
    assert abs(after[0].error or 0) < max(0.1, abs(before[0].error or 0) / 2)
    compared = [[row for row in rows if row.section != TRAFFIC] for rows in off]  # bytes are the same for any cluster
    first, second = (median_error(rows) for rows in compared)
    assert first is not None
    assert second is not None
    assert second < max(0.1, first / 2)
    assert median_error(after, "memory") < 0.05  # type: ignore[operator]
    assert calibrate([(estimate, measured)], fitted).before == after  # what was written is what was fitted


@on_ranks(2, timeout_s=60)
@pytest.mark.parametrize("layout", ["dp=2", "tp=2", "dp=2,recompute=full"])
def test_what_two_ranks_send_is_predicted_to_the_byte(rank: RankContext, tmp_path: Path, layout: str) -> None:
    train_on_rank(rank, job(tmp_path, layout=layout, steps=4, timeline={"steps": [-1]}))
    if rank.rank == 0:
        check_report(tmp_path)


def test_a_run_that_cannot_be_estimated_says_why_in_one_line(tmp_path: Path) -> None:
    described = job(tmp_path, layout="pp=2")
    estimate_file(tmp_path).write_text("of an older run")
    model, _ = build_model(described)

    class Broken(ProfilesOfRun):
        def works(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise RuntimeError("no\nway")

    inputs = first_micro_batch(described.run, build_task(described))
    broken = Broken(model, inputs, loss=None)
    told = store_estimate(described.run, model, described.run.seeded_layout, broken)
    assert told == "no estimate of this run: RuntimeError: no way"
    assert "cannot be told apart" in store_estimate(described.run, model, described.run.seeded_layout, None)
    assert not estimate_file(tmp_path).exists()


def test_a_run_in_16_bits_is_priced_in_16_bits(tmp_path: Path) -> None:
    described = job(tmp_path, precision={"compute": "bfloat16"})
    model, _ = build_model(described)
    task = build_task(described)
    profiles = ProfilesOfRun(model, first_micro_batch(described.run, task), loss=task.loss)
    made = estimate_of(described.run, model, described.run.seeded_layout, profiles)
    assert made.job.per_parameter.parameter == 2
    assert made.job.per_parameter.master == 4
    assert {kernel.dtype for kernel in made.works[0].kernels if kernel.kind == "matmul"} >= {"bfloat16"}
    whole = job_of(
        described.run.model_copy(update={"precision": job(tmp_path).run.precision}), profiles.whole(profiles.samples)
    )
    assert whole.per_parameter.master == 0


def test_the_cluster_is_the_one_that_the_run_names_or_that_of_its_folder_or_a_typical_one(tmp_path: Path) -> None:
    written = {"folder": str(tmp_path), "layout": "dp=2", "training": {"steps": 1, "global_batch": 8}}
    assert cluster_of(run_from(written), 2) == (
        Cluster.local(2),
        "typical cores, not measured (shardwise probe --out FILE, cluster = FILE)",
    )
    named, source = cluster_of(run_from({**written, "cluster": "h100x8"}), 2)
    assert (named.num_devices, source) == (2, "the cluster h100x8")
    slow = dataclasses.replace(Cluster.local(2), name="slow")
    (tmp_path / "cluster.toml").write_text(cluster_text([slow, Cluster.local(4)]))
    found, source = cluster_of(run_from(written), 4)
    assert (found.num_devices, source) == (4, f"the cluster {tmp_path}{os.sep}cluster.toml")
