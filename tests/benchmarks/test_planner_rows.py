"""Rows of sources that nobody knows: their devices, precision, stacks and layouts, from what their columns say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.planner import run
from benchmarks.planner.batch import Batch, cluster_of
from benchmarks.planner.cases import case_of
from benchmarks.planner.coefficients import COEFFICIENTS, apply, read
from benchmarks.planner.devices import device_of, dtype_of
from benchmarks.planner.fabrics import fabric_of
from benchmarks.planner.fit import Fitted, fit, prepare
from benchmarks.planner.kernels import attention_kernels, layer_kernels
from benchmarks.planner.layouts import mended
from benchmarks.planner.memory_cases import held_of
from benchmarks.planner.rows import Row, read_rows
from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import Stack, stack_of
from shardwise.describe.kernels import ExchangeKind, KernelKind, Phase
from shardwise.errors import ConfigError
from tests.benchmarks.test_planner import GPT, cases, sweep, table


def row_of(tmp_path: Path, **changes: Any) -> Row:
    (row,) = read_rows(table(tmp_path, {**GPT, "file": "unknown.csv", **changes}))
    return row


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("A100-SXM-80GB", "A100 SXM 80GB"),
        ("A100-PCIE-40GB", "A100 PCIe 40GB"),
        ("DGX H100", "H100 SXM 80GB"),
        ("H100-96GB (HBM2e 2.4TB/s, 500W)", "H100 SXM 96GB"),
        ("H100-94GB", "H100 SXM 96GB"),
        ("H100 NVL", "H100 NVL"),
        ("H200-SXM-141GB", "H200 SXM"),
        ("H20", "H20 SXM"),
        ("A800", "A800 SXM 80GB"),
        ("A6000", "RTX A6000"),
        ("RTX-TITAN-24GB", "TITAN RTX"),
        ("V100-32GB", "V100 SXM2 32GB"),
    ],
)
def test_a_device_is_found_by_what_a_table_calls_it(gpu: str, name: str) -> None:
    device = device_of(gpu)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize("gpu", ["TPU v4", "Ascend 910B", "H100 CNX", "H2", "B20", ""])
def test_another_device_is_none(gpu: str) -> None:
    assert device_of(gpu) is None
    with pytest.raises(ConfigError, match=r"devices\.toml"):
        cluster_of(gpu, 8)


@pytest.mark.parametrize(
    ("precision", "gpu", "dtype"),
    [
        ("fp16", "V100-32GB", "float16"),
        ("fp16", "A100-SXM-80GB", "float16"),
        ("bf16 (fp32 grad accum)", "H100", "bfloat16"),
        ("bf16/fp16", "A100-SXM-80GB", "bfloat16"),
        ("bf16/fp16", "V100-32GB", "float16"),
        ("", "V100-32GB", "float16"),
        ("fp32", "A100-SXM-80GB", "float32"),
        ("tf32", "A100-SXM-80GB", "tf32"),
        ("BF16", "H100", "bfloat16"),
    ],
)
def test_products_compute_in_what_the_row_says_or_the_device_has(precision: str, gpu: str, dtype: str) -> None:
    assert dtype_of(precision, gpu) == dtype


def test_a_v100_computes_in_float16_at_its_rate(tmp_path: Path) -> None:
    seconds = {}
    for gpu in ("V100-32GB", "A100-SXM-80GB"):
        (made,) = cases((row_of(tmp_path, gpu=gpu, layers=48, hidden=4096, ffn_hidden=16384, heads=32),))
        cluster = cluster_of(gpu, 8)
        seconds[gpu] = Batch.of([made], cluster).step_s(cluster)[0]
    assert 1.8 < seconds["V100-32GB"] / seconds["A100-SXM-80GB"] < 4.5


def test_hosts_are_as_large_as_the_row_says_but_a_rack_is_one() -> None:
    assert cluster_of("V100-32GB", 4).links[0].ranks == 4
    assert cluster_of("A100-SXM-80GB").links[0].ranks == 8
    assert cluster_of("GB200", 4).links[0].ranks == 72


def test_what_an_unknown_source_ran_is_said_by_its_columns(tmp_path: Path) -> None:
    old = stack_of(row_of(tmp_path, precision="fp16"))
    today = stack_of(row_of(tmp_path, precision="bf16"))
    sharded = stack_of(row_of(tmp_path, precision="bf16", zero="3 (FSDP2)"))
    picked = stack_of(row_of(tmp_path, precision="bf16", recompute="selective (per-op SAC)"))
    assert (old.fused_attention, old.dropout, old.summed_bytes, old.overlap) == (False, True, 2, False)
    assert (today.fused_attention, today.overlap, today.every_second) == (True, True, False)
    assert sharded == stack_of(row_of(tmp_path, file="torchtitan.csv", precision="bf16"))
    assert picked.every_second
    assert not stack_of(row_of(tmp_path, precision="bf16", gpu="V100-32GB")).fused_attention


@pytest.mark.parametrize(
    ("zero", "stage"),
    [
        ("3 (FSDP2)", 3),
        ("1 (distributed optimizer)", 1),
        ("0 or 1 (not stated)", 0),
        ("ZeRO-3 (old branch)", 3),
        ("DeepSpeed 3D (zero stage 0/1 per section)", 0),
        ("FSDP", 3),
        ("", 0),
    ],
)
def test_zero_is_the_stage_that_is_named(tmp_path: Path, zero: str, stage: int) -> None:
    assert row_of(tmp_path, zero=zero).zero_stage == stage


def test_state_is_divided_in_groups_where_the_row_says_so(tmp_path: Path) -> None:
    some = {"precision": "bf16", "n_gpus": 512, "tp": 1, "pp": 1, "dp": 512, "global_batch_seqs": 1024}
    (grouped,) = cases((row_of(tmp_path, zero="3 (FSDP group 128)", **some),))
    (whole,) = cases((row_of(tmp_path, zero="3", **some),))
    assert (grouped.layout.fsdp, grouped.layout.dp) == (128, 4)
    assert (whole.layout.fsdp, whole.layout.dp) == (512, 1)


def test_time_and_memory_read_a_row_alike(tmp_path: Path) -> None:
    """Its micro-batch where it is open, and a pipeline longer than there are GPUs."""
    row = row_of(tmp_path, tp=1, pp=41, dp="", micro_batch="", memory_gib=10.0)
    case, held = case_of(row), held_of(row)
    assert case is not None
    assert held is not None
    assert (mended(row).pp, case.layout.pp, len(held.bytes)) == (1, 1, 1)
    assert case.num_micro_batches == 2  # of 16 sequences on 8 replicas, one by one
    cut = row_of(tmp_path, file="torchtitan.csv", tp=1, pp=4, dp=2, micro_batch="", global_batch_seqs=16)
    made = case_of(cut)
    assert made is not None
    assert made.num_micro_batches == 4


def test_norms_rotary_and_the_gate_pass_over_as_many_bytes_as_they_read_and_write() -> None:
    """Of an eager block like Llama's, forward, in bytes: two norms, rotary, two sums, activation and product."""
    arch = Architecture(
        layers=1, hidden=4096, ffn=14336, mats=3, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False
    )
    shard = Shard(arch=arch, samples=1, sequence=1024, whole=1024, tp=1, cp=1, ep=1, sp=False)
    passes = [k for k in layer_kernels(shard, Stack(name=""), "bfloat16") if k.kind is KernelKind.MEMORY]
    forward = sum(k.nbytes * k.count for k in passes if k.phase is Phase.FORWARD) / 1024
    rotary = 4 * (4096 + 1024) if arch.rotary else 0
    assert forward == 2 * 4 * 4096 + rotary + 2 * 6 * 4096 + 10 * 14336


def test_shards_send_parts_where_the_stack_gathers_them_behind(tmp_path: Path) -> None:
    sent = {}
    for precision in ("fp16", "bf16"):
        (made,) = cases((row_of(tmp_path, precision=precision),))
        sent[precision] = sum(made.stages[0].sends.values())
        gathers = [each for each in made.stages[1].exchanges if each.kind is ExchangeKind.ALL_GATHER]
        assert len(gathers) == (precision == "fp16")
    assert sent["fp16"] * 2 == sent["bf16"]


def test_numbers_that_are_none_are_open(tmp_path: Path) -> None:
    row = row_of(tmp_path, step_time_s="nan", memory_gib="inf", vocab="", heads="", kv_heads="", head_dim="")
    assert (row.step_time_s, row.memory_gib) == (None, None)
    assert run.scored_rows([row, dataclasses.replace(row, step_time_s=-1.0)]) == ()
    case = case_of(row)
    assert case is not None
    assert (case.architecture.heads, case.architecture.vocab) == (16, 50257)


def test_rows_without_a_price_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = [{**GPT, "tp": tp, "dp": 4 // tp} for tp in (1, 2, 4)]
    strange = [{**GPT, "gpu": "TPU v4", "memory_gib": 10.0}, {**GPT, "layers": "", "model": "GPT"}]
    (first := tmp_path / "first").mkdir()
    run.main(["--fit", str(table(first, *known)), "--score", str(table(tmp_path, *known, *strange)), "--json-only"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["by_source"]["vtrain_ground_truth_single.csv"]["rows"] == 3
    assert figures["unpriced"] == 2


def test_a_table_is_the_same_whatever_its_file_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sweep(tmp_path)[:10]
    again = read_rows(tmp_path / "rows.csv")[:10]
    asked: list[object] = []
    monkeypatch.setattr(run, "cross_validated", lambda known: (asked.append(known), (np.ones(len(known)), None))[1])
    predicted, _ = run.unseen(rows, again)
    assert len(asked) == 1
    assert predicted.tolist() == [1.0] * 10


def test_one_sick_source_does_not_move_the_others_and_a_new_gpu_is_as_others_are(tmp_path: Path) -> None:
    made = cases(sweep(tmp_path))
    name = [each.name for each in COEFFICIENTS].index("matmul")
    cluster = cluster_of("A100-SXM-80GB", 8)
    seconds = Batch.of(made, cluster).step_s(cluster)
    prepared = []
    for file, factor in (("a.csv", 1.0), ("b.csv", 1.0), ("sick.csv", 3.0)):
        own = [dataclasses.replace(case, row=dataclasses.replace(case.row, file=file)) for case in made]
        (one,) = prepare(own)
        prepared.append(dataclasses.replace(one, measured=seconds * factor))
    found = fit(prepared, [np.ones(len(made), dtype=bool)] * 3)
    plain = read(cluster, COEFFICIENTS)
    assert found.of_gpus["A100 SXM 80GB"][name] == pytest.approx(plain[name], abs=0.05)
    slower = Fitted(of_sources={}, of_gpus={}, of_all=np.full(len(COEFFICIENTS), -0.1))
    other = cluster_of("H100", 8)
    efficiency = slower.cluster(("x.csv", "H100"), other).hosts[0].device.efficiency.matmul
    assert efficiency == pytest.approx(other.hosts[0].device.efficiency.matmul * np.exp(-0.1))


@pytest.mark.parametrize(
    ("told", "vpp", "ours"),
    [
        ("1F1B", 1, "1f1b"),
        ("interleaved 1f1b", 2, "interleaved"),
        ("GPipe", 1, "gpipe"),
        ("AFAB", 1, "gpipe"),
        ("ZB-H1", 1, "zb-h1"),
        ("ZB-1p", 1, "zb-h1"),
        ("ZB-2p (all-reduce sync optimizer)", 1, "zb-h2"),
        ("ZBV", 2, "zb-v"),
        ("ZBV", 1, "1f1b"),
        ("breadth-first", 2, "looped-bfs"),
        ("", 1, "1f1b"),
    ],
)
def test_a_schedule_is_ours_by_what_a_table_calls_it(tmp_path: Path, told: str, vpp: int, ours: str) -> None:
    row = row_of(tmp_path, schedule=told, pp=2, vpp=vpp, tp=1, dp=4)
    (made,) = cases((row,))
    assert made.layout.schedule == ours


def test_shards_wait_for_each_other_where_notes_say_that_nothing_runs_beside(tmp_path: Path) -> None:
    some = {"file": "torchtitan.csv", "precision": "bf16", "tp": 8, "pp": 1, "dp": 1, "sp": 1}
    hidden = {}
    for said in ("0", "1"):
        (made,) = cases((row_of(tmp_path, notes=f"compile=1 asyncTP={said}", **some),))
        hidden[said] = sum(each.count for each in made.stages[0].exchanges if each.hidden)
    assert hidden == {"0": 0, "1": 4 * 24}


def test_the_backward_of_unfused_attention_has_the_products_that_the_chain_rule_has() -> None:
    """Of probabilities and queries one each; of keys and values, as deep as there are queries."""
    arch = Architecture(layers=1, hidden=256, ffn=1024, mats=2, heads=4, kv_heads=4, head_dim=64, vocab=512, tied=True)
    shard = Shard(arch=arch, samples=1, sequence=512, whole=512, tp=1, cp=1, ep=1, sp=False)
    old = Stack(name="", fused_attention=False, dropout=True)
    back = [k for k in attention_kernels(shard, old, "float16") if k.phase is Phase.INPUT and k.flops]
    assert [(k.shape, k.count) for k in back] == [
        ((4, 512, 512, 64), 1),
        ((4, 512, 64, 512), 1),
        ((4, 512, 64, 512), 2),
    ]


def test_selective_recomputation_runs_all_of_attention_again(tmp_path: Path) -> None:
    """Scores, softmax and dropout of every layer, and no product of a layer."""
    (made,) = cases((row_of(tmp_path, recompute="selective", tp=1, pp=1, dp=8),))
    again = made.stages[0].recomputed
    assert {kernel.kind for kernel in again} == {KernelKind.MATMUL, KernelKind.MEMORY}
    assert all(kernel.batch_dims != (1,) for kernel in again if kernel.kind is KernelKind.MATMUL)
    assert all(kernel.count % 24 == 0 for kernel in again)


def test_hosts_are_joined_by_what_a_source_says_of_its_machine() -> None:
    plain = cluster_of("A100-SXM-80GB", 8).links[1]
    slower = cluster_of("A100-SXM-80GB", 8, fabric=fabric_of("bloom_176b_prequel_layouts.csv")).links[1]
    assert slower.bytes_per_s == plain.bytes_per_s / 4
    assert slower.efficiency == plain.efficiency
    assert fabric_of("unknown.csv") is None


def test_a_handful_is_fitted_and_the_fabric_tells_how_crowded_hosts_are() -> None:
    assert len(COEFFICIENTS) == 5
    fabric = fabric_of("hf_ultrascale_playbook_benchmarks.csv")
    cluster = cluster_of("H100-SXM-80GB", 8, fabric=fabric)
    logs = read(cluster, COEFFICIENTS)
    logs[[str(each) for each in COEFFICIENTS].index("between.latency_s")] = np.log(1e-3)
    made = apply(cluster, COEFFICIENTS, logs)
    assert made.links[1].latency_s == pytest.approx(1e-3)
    assert not made.links[1].trees
    assert made.overheads.crowded_s == fabric.crowded_s == pytest.approx(2e-4)
    assert cluster_of("H100-SXM-80GB", 8).overheads.crowded_s == 0.0
