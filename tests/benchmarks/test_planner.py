"""The planner's benchmark: rows become layouts, many are priced as one is, a fit finds what made the seconds."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.planner import run
from benchmarks.planner.architectures import architecture_of
from benchmarks.planner.batch import Batch, cluster_of
from benchmarks.planner.cases import Case, case_of
from benchmarks.planner.coefficients import COEFFICIENTS, apply, read
from benchmarks.planner.fit import fit, prepare
from benchmarks.planner.left_out import left_out
from benchmarks.planner.rows import Row, read_rows
from benchmarks.planner.score import choice_figures, source_figures
from shardwise.plan.price import price

GPT: dict[str, Any] = {
    "file": "vtrain_ground_truth_single.csv", "tier": "A", "status": "ok", "model": "GPT-1.3B", "family": "dense",
    "layers": 24, "hidden": 2048, "ffn_hidden": 8192, "mlp_mats": 2, "heads": 16, "kv_heads": 16, "head_dim": 128,
    "vocab": 50257, "tied": 1, "seq_len": 1024, "global_batch_seqs": 16, "micro_batch": 2, "precision": "fp16",
    "gpu": "A100-SXM-80GB", "n_gpus": 8, "gpus_per_node": 8, "tp": 2, "pp": 2, "vpp": 1, "dp": 2, "cp": 1, "ep": 1,
    "zero": "0", "sp": 0, "recompute": "full", "schedule": "1f1b", "step_time_s": 0.4,
}  # fmt: skip
LAYOUTS = [(1, 1, 8), (2, 1, 4), (4, 1, 2), (8, 1, 1), (1, 2, 4), (2, 2, 2), (4, 2, 1), (1, 4, 2), (2, 4, 1)]


def table(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in dataclasses.fields(Row)], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def sweep(tmp_path: Path) -> tuple[Row, ...]:
    rows = [
        {**GPT, "tp": tp, "pp": pp, "dp": dp, "micro_batch": samples, "global_batch_seqs": 32}
        for tp, pp, dp in LAYOUTS
        for samples in (1, 2, 4)
    ]
    return read_rows(table(tmp_path, *rows))


def cases(rows: tuple[Row, ...]) -> list[Case]:
    return [case for case in (case_of(row, rows) for row in rows) if case is not None]


def test_empty_fields_are_none_and_axes_one(tmp_path: Path) -> None:
    (row,) = read_rows(table(tmp_path, {**GPT, "layers": "", "vpp": "", "zero": "3 (FSDP2)", "memory_gib": "12.5"}))
    assert (row.layers, row.vpp, row.zero_stage, row.memory_gib, row.sp) == (None, 1, 3, 12.5, False)
    assert row.billions == 1.3


def test_the_work_of_all_stages_is_that_of_the_model(tmp_path: Path) -> None:
    """Flops of products and parameters do not depend on how stages and shards divide them, but for a tied table."""
    (whole,) = cases(read_rows(table(tmp_path, {**GPT, "tp": 1, "pp": 1, "dp": 8})))
    (parts,) = cases(read_rows(table(tmp_path, {**GPT, "tp": 2, "pp": 4, "dp": 1})))
    flops = [
        sum(kernel.flops * kernel.count for stage in case.stages for kernel in stage.kernels) * case.layout.tp
        for case in (whole, parts)
    ]
    assert flops[1] == pytest.approx(flops[0], rel=0.01)
    vocabulary = 50304 * 2048
    elements = [sum(stage.parameters for stage in case.stages) * case.layout.tp for case in (whole, parts)]
    assert elements[0] == pytest.approx(whole.architecture.parameters, rel=0.01)
    assert elements[1] == pytest.approx(elements[0] + vocabulary, rel=0.01)


def test_flops_are_those_of_the_published_formula(tmp_path: Path) -> None:
    """96 B s L h^2 (1 + s / 6h + V / 16Lh) with full recomputation (arXiv:2104.04473, section 5.1)."""
    (case,) = cases(read_rows(table(tmp_path, {**GPT, "tp": 1, "pp": 1, "dp": 8})))
    counted = sum(k.flops * k.count for stage in case.stages for k in (*stage.kernels, *stage.recomputed))
    layers, hidden, tokens, vocabulary = 24, 2048, 1024, 50304
    bracket = 1 + tokens / (6 * hidden) + vocabulary / (16 * layers * hidden)
    assert counted == pytest.approx(96 * 2 * tokens * layers * hidden**2 * bracket, rel=0.01)


def test_what_an_architecture_leaves_open_comes_from_its_source(tmp_path: Path) -> None:
    stated = {**GPT, "model": "BLOOM-like 100B", "layers": 60, "hidden": 11520, "heads": 64, "head_dim": 180}
    unknown = {**GPT, "model": "BLOOM-like 80B", "layers": "", "hidden": "", "heads": "", "vocab": ""}
    rows = read_rows(table(tmp_path, {**stated, "ffn_hidden": 46080, "kv_heads": 64}, unknown))
    found = architecture_of(rows[1], rows)
    assert found is not None
    assert found.hidden == 11520
    assert found.parameters == pytest.approx(80e9, rel=0.02)


def test_rows_are_priced_together_as_the_library_prices_one(tmp_path: Path) -> None:
    made = cases(sweep(tmp_path))
    cluster = cluster_of("A100-SXM-80GB", 8)
    together = Batch.of(made, cluster).step_s(cluster)
    alone = [
        price(each.stages, each.layout, cluster, each.job, num_micro_batches=each.num_micro_batches).step_s
        for each in made
    ]
    assert len(made) == len(LAYOUTS) * 3
    assert together == pytest.approx(alone)


def test_a_fit_finds_the_coefficients_that_made_the_rows(tmp_path: Path) -> None:
    made = cases(sweep(tmp_path))
    prepared = prepare(made)[0]
    logs = read(prepared.cluster, COEFFICIENTS)
    names = [each.name for each in COEFFICIENTS]
    for name, value in (("matmul", 0.6), ("kernel_s", 4e-5)):
        logs[names.index(name)] = np.log(value)
    measured = prepared.batch.step_s(apply(prepared.cluster, COEFFICIENTS, logs))
    measured[::9] *= 8.0  # a few runs hung
    known = dataclasses.replace(prepared, measured=measured)
    found = fit([known], [np.ones(len(measured), dtype=bool)])
    predicted = known.batch.step_s(found.cluster(known.key, known.cluster))
    assert np.median(abs(predicted / measured - 1)) < 0.02
    other = found.cluster(("another.csv", "A100-SXM-80GB"), known.cluster)
    plain = known.cluster.hosts[0].device.efficiency.matmul
    assert 0.6 < other.hosts[0].device.efficiency.matmul < plain


def test_figures_count_the_choice_among_layouts_with_room(tmp_path: Path) -> None:
    some = sweep(tmp_path)[:3]
    rows = tuple(dataclasses.replace(row, step_time_s=s) for row, s in zip(some, (1.0, 2.0, 3.0), strict=True))
    predicted = np.array([1.2, 1.0, 3.0])
    roomy = choice_figures(rows, predicted, np.zeros(3))
    assert (roomy["groups"], roomy["top1_within_5pct"], roomy["spearman_median"]) == (1, 0.0, 0.5)
    tight = choice_figures(rows, predicted, np.array([0.5, 0.99, 0.5]))
    assert tight["top1_within_5pct"] == 1.0
    errors = source_figures(rows, predicted)["vtrain_ground_truth_single.csv"]
    assert errors == {"rows": 3, "time_median": pytest.approx(0.2), "time_mean": pytest.approx(0.7 / 3)}


def test_a_table_is_scored_by_a_fit_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = cases(sweep(tmp_path))
    cluster = cluster_of("A100-SXM-80GB", 8)
    seconds = Batch.of(made, cluster).step_s(cluster)
    rows = [{**GPT, **dataclasses.asdict(case.row), "step_time_s": s} for case, s in zip(made, seconds, strict=True)]
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    run.main(["--fit", str(table(first, *rows)), "--score", str(table(second, *rows)), "--json-only"])
    printed = capsys.readouterr().out
    assert '"by_source": {"vtrain_ground_truth_single.csv": {"rows": 27, "time_median": 0.0' in printed


@pytest.mark.slow  # six fits
def test_no_row_is_scored_by_a_fit_that_saw_it(tmp_path: Path) -> None:
    """Rows of one source by itself: one that is off by a factor stays off, and the others stay right."""
    made = cases(sweep(tmp_path))
    cluster = cluster_of("A100-SXM-80GB", 8)
    seconds = Batch.of(made, cluster).step_s(cluster)
    seconds[5] *= 3.0
    rows = tuple(dataclasses.replace(each.row, step_time_s=float(s)) for each, s in zip(made, seconds, strict=True))
    predicted, _ = run.cross_validated(rows)
    assert predicted[5] / seconds[5] == pytest.approx(1 / 3, rel=0.1)
    assert np.median(abs(predicted / seconds - 1)) < 0.02


@pytest.mark.slow  # four fits
def test_a_source_that_is_left_out_says_nothing_of_itself(tmp_path: Path) -> None:
    made = cases(sweep(tmp_path))
    cluster = cluster_of("A100-SXM-80GB", 8)
    seconds = Batch.of(made, cluster).step_s(cluster)
    rows = tuple(
        dataclasses.replace(each.row, file=file, step_time_s=times * float(s))
        for file, times in (("first.csv", 1.0), ("second.csv", 2.0))
        for each, s in zip(made, seconds, strict=True)
    )
    first, second = left_out(rows)
    assert (first["file"], first["rows"], second["file"], second["rows"]) == ("first.csv", 27, "second.csv", 27)
    assert second["source"] == pytest.approx(0.5, abs=0.1)  # as the first one is
    assert first["device"] < 0.25  # where fits start
    assert 0.4 < second["device"] < 0.6
