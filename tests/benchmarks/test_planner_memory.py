"""Bytes of published stacks: the sums of Korthikanti et al., nanotron's stages; and a fit finds what it was given."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks.planner.activations import Keeps, block_bytes, saved_bytes, weight_bytes
from benchmarks.planner.memory_cases import held_of
from benchmarks.planner.memory_fit import MemoryFit, fit_memory, fits, measured_place, predicted
from benchmarks.planner.memory_score import memory_figures, memory_table, with_memory
from benchmarks.planner.memory_tables import galvatron, zero_table
from benchmarks.planner.partition import shares_of
from benchmarks.planner.rows import Row
from benchmarks.planner.shapes import Architecture, Shard
from benchmarks.planner.stacks import Stack, stack_of

GPT = Architecture(layers=4, hidden=1024, ffn=4096, mats=2, heads=16, kv_heads=16, head_dim=64, vocab=51200, tied=True)
MEGATRON = Stack(name="Megatron-LM", fused_attention=False, dropout=True)
NANOTRON = "hf_ultrascale_playbook_benchmarks.csv"
S, B, H, A = 512, 2, 1024, 16


def _shard(tp: int = 1, *, sp: bool = False) -> Shard:
    return Shard(arch=GPT, samples=B, sequence=S, whole=S, tp=tp, cp=1, ep=1, sp=sp)


@pytest.mark.parametrize(
    ("tp", "sp", "recompute", "of_a_block"),
    [
        (1, False, "none", S * B * H * (34 + 5 * A * S / H)),  # table 2 of arXiv:2205.05198, line by line
        (8, False, "none", S * B * H * (10 + 24 / 8 + 5 * A * S / (H * 8))),
        (8, True, "none", S * B * H / 8 * (34 + 5 * A * S / H)),
        (8, True, "selective", S * B * H / 8 * 34),
        (1, False, "full", S * B * H * 2),
    ],
)
def test_a_block_keeps_what_korthikanti_counts(tp: int, sp: bool, recompute: str, of_a_block: float) -> None:
    assert block_bytes(_shard(tp, sp=sp), MEGATRON, recompute=recompute, keeps=Keeps()) == of_a_block


def test_weights_wait_for_32_of_its_34() -> None:
    assert weight_bytes(_shard(), MEGATRON, layers=3, keeps=Keeps()) == 3 * 32 * S * B * H


def test_gathered_inputs_are_whole_tokens_twice_a_block() -> None:
    few, many = (
        block_bytes(_shard(8, sp=True), MEGATRON, recompute="none", keeps=Keeps(gathered=share)) for share in (0.0, 1.0)
    )
    assert many - few == 4 * S * B * H * 7 / 8


def test_a_stage_keeps_its_blocks_the_first_one_masks_the_last_one_what_the_head_reads() -> None:
    blocks = 3 * block_bytes(_shard(), MEGATRON, recompute="none")
    ends = saved_bytes(_shard(), MEGATRON, layers=3, recompute="none", first=True, last=True)
    assert ends - blocks == S * B * H + 4 * S * B * H


def test_nanotron_fills_stages_by_cost() -> None:
    arch = Architecture(
        layers=16, hidden=2048, ffn=8192, mats=3, heads=32, kv_heads=32, head_dim=64, vocab=131072, tied=True
    )
    four = shares_of(arch, 4, stack_of(_row()))  # the head costs four layers: five a stage
    assert [share.layers for share in four] == [5, 5, 5, 1]
    assert [share.head for share in four] == [False, False, False, True]
    assert [share.blocks for share in shares_of(arch, 32, stack_of(_row()))].count(0) > 0


def test_ends_count_as_a_layer() -> None:
    shares = shares_of(dataclasses.replace(GPT, layers=6), 4, Stack(name="", split="ends"))
    assert [share.layers for share in shares] == [1, 2, 2, 1]


def _row(**changes: object) -> Row:
    fields: dict[str, object] = {
        field.name: "" if field.type == "str" else None if "None" in str(field.type) else 1
        for field in dataclasses.fields(Row)
    }
    fields.update(file=NANOTRON, tier="A", status="ok", gpu="H100-SXM-80GB", family="dense", model="llama-like-1B")
    fields.update(layers=16, hidden=2048, ffn_hidden=8192, mlp_mats=3, heads=32, kv_heads=32, head_dim=64)
    fields.update(vocab=131072, tied=True, seq_len=4096, global_batch_seqs=256, micro_batch=1, n_gpus=8)
    fields.update(gpus_per_node=8, dp=8, zero="1", sp=False, memory_kind="rank-0 peak", step_time_s=1.0)
    return Row(**(fields | changes))  # type: ignore[arg-type]


def _measured() -> list[Row]:
    """Rows whose memory is what a fit with these coefficients says."""
    truth = MemoryFit(values={**MemoryFit.default().values, "framework": 2.0, "activations": 1.2, "gathered": 0.6})
    rows = []
    for tp in (1, 2, 4, 8):
        for micro_batch in (1, 2, 4):
            for pp in (1, 2):
                row = _row(tp=tp, pp=pp, sp=tp > 1, micro_batch=micro_batch, n_gpus=8 * tp * pp)
                held = held_of(row)
                assert held is not None
                rows.append(dataclasses.replace(row, memory_gib=measured_place(held, truth) / 2**30))
    return rows


def test_a_fit_finds_what_made_the_rows() -> None:
    rows = _measured()
    held = [found for row in rows if (found := held_of(row)) is not None]
    values = fit_memory(held)(rows[0]).values
    assert values["framework"] == pytest.approx(2.0, abs=0.2)
    assert values["activations"] == pytest.approx(1.2, abs=0.05)
    assert values["gathered"] == pytest.approx(0.6, abs=0.1)
    assert memory_figures(rows, rows, folds=3)["by_source"][NANOTRON]["memory_median"] < 0.01


def test_figures_of_memory_join_those_of_time() -> None:
    rows = _measured()
    joined = with_memory({"by_source": {NANOTRON: {"rows": 5, "time_median": 0.1}}, "groups": 3}, rows, rows)
    assert joined["by_source"][NANOTRON].keys() >= {"rows", "time_median", "memory_median", "memory_rows"}
    assert joined["groups"] == 3
    assert joined["oom_accuracy"] == 1.0
    assert NANOTRON in memory_table(rows)


def test_a_row_does_not_run_where_a_rule_is_broken_or_a_device_is_too_small() -> None:
    fit = MemoryFit.default()
    fewer = held_of(_row(pp=8, n_gpus=64, global_batch_seqs=24, micro_batch=1))
    assert fewer is not None
    assert "fewer micro-batches" in fewer.runs
    assert not fits(fewer, fit)
    empty = held_of(_row(pp=32, n_gpus=256))
    assert empty is not None
    assert "without a block" in empty.runs
    small, large = (held_of(_row(micro_batch=count)) for count in (1, 16))
    assert small is not None
    assert large is not None
    assert (fits(small, fit), fits(large, fit)) == (True, False)
    assert predicted(large, fit).max() > predicted(small, fit).max()


def test_the_zero_papers_table_is_met() -> None:
    row = {"model_params": "7.5B", "optimizer_k": "12", "dp": "64", "stage": "ZeRO-2 (Pos+g)"}
    (compared,) = zero_table([{**row, "model_state_gb_per_device": "16.6"}])
    assert abs(compared.errors[0]) < 0.005
    assert "1 rows" in str(compared)


def test_a_layer_more_of_llama_with_flash_attention_is_met() -> None:
    same = {"family": "llama_fa", "profile": "bf16_hidden4096_head32_seqlen2048", "pp": "1", "tp": "8", "dp": "1"}
    same |= {"recompute_full": "0", "vocab_tp": "0", "sp": "0", "global_batch_seqs": "8", "seq_len": ""}
    measured = (("1", "1018.541015625", "918.8994140625"), ("2", "1767.04150390625", "1305.52490234375"))
    rows = [
        {
            **same,
            "layers_profiled": layers,
            "activation_MiB_after_forward": kept,
            "model_states_MiB_after_backward": held,
        }
        for layers, kept, held in measured
    ]
    states, activations = galvatron(rows)
    assert abs(states.errors[0]) < 0.002
    assert abs(activations.errors[0]) < 0.001


def test_a_device_has_what_its_name_says() -> None:
    fit = MemoryFit.default()
    fuller = _row(micro_batch=4)  # takes some 70 GiB
    runs = [
        fits(held, fit)
        for gpu in ("H100-SXM-80GB", "H100-96GB", "V100-32GB", "unheard-of 40GB", "unheard-of")
        if (held := held_of(dataclasses.replace(fuller, gpu=gpu))) is not None
    ]
    assert runs == [True, True, False, False, True]
