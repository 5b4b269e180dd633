"""The cases of the searched schedules are what their rule says, and a comparison is of the same stages and limits."""

from __future__ import annotations

import pytest

from benchmarks.schedules.searched.cases import CONDITIONS, PLACEMENTS, Case, cases, smaller_cases
from benchmarks.schedules.searched.compare import compared
from benchmarks.schedules.searched.models import MODELS
from benchmarks.schedules.searched.run import figures
from shardwise.schedule import Kind
from shardwise.schedule.placement import stages_of_ranks


def case_of(condition: str, *, model: str = "gpt2") -> Case:
    return Case(model=MODELS[model], num_ranks=2, num_micro_batches=4, condition=condition)


def test_there_are_twenty_cases_and_as_many_smaller_ones() -> None:
    assert len({case.name for case in cases()}) == 20
    assert len({case.name for case in smaller_cases()}) == 20


@pytest.mark.parametrize("model", MODELS)
def test_any_cut_has_all_of_the_model(model: str) -> None:
    units = MODELS[model].units
    for placement, chunks in PLACEMENTS:
        ranks = stages_of_ranks(placement, num_ranks=2, chunks=chunks)
        case = case_of("slow-one", model=model)
        for cut in (case.cut(chunks), case.cut(chunks, ranks), case.cut(chunks, ranks, aware=True)):
            assert cut.num_stages == 2 * chunks
            assert sum(cut.memory.activation_bytes) == pytest.approx(sum(unit.kept_bytes for unit in units))
            assert all(seconds > 0 for seconds in cut.costs.compute_seconds[Kind.F])


def test_a_block_costs_what_its_configuration_says() -> None:
    # Llama-3-8B: 218,103,808 weights in the matrices of a block; 2 flops each a token; causal attention half of 4 t^2 h
    block = MODELS["llama-3-8b"].units[1]
    assert block.flops[2] == 2 * 218_103_808 * 4096
    assert block.flops[0] - block.flops[2] == 2 * 4096 * 4096 * 4096


def test_the_limit_is_the_same_for_every_cut_and_placement() -> None:
    for condition, share in (("as-1f1b", 1.0), ("slow-one", 1.5)):
        limits = {case_of(condition).cut(chunks).memory.limit_bytes for chunks in (1, 2, 4)}
        kept = case_of("free").cut(1).memory.activation_bytes
        assert limits == {(share * max(2 * kept[0], kept[1]),) * 2}
    assert case_of("free").cut(1).memory.limit_bytes is None


def test_a_cut_for_a_slow_device_gives_it_less() -> None:
    case = case_of("slow-one", model="llama-3-8b")
    equal, aware = case.cut(1), case.cut(1, [(0,), (1,)], aware=True)
    assert case.speeds == (1.0, 0.5)
    assert aware.costs.compute_seconds[Kind.F][1] < 0.75 * equal.costs.compute_seconds[Kind.F][1]


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_comparison_is_never_lost(condition: str) -> None:
    row = compared(case_of(condition), seconds=0.1)
    assert row.bound <= row.searched * (1 + 1e-9)
    assert row.searched <= row.ordered <= row.best[1] * (1 + 1e-9)
    assert row.searched_aware <= row.aware * (1 + 1e-9)


def test_figures_are_medians_and_the_worst() -> None:
    found = {
        "cases": [
            {"gain": 1.0 + gain, "gain_of_order_alone": 1.0, "gain_of_aware_cuts": 1.0 + gain / 2}
            for gain in (0.4, 0.0, 0.2)
        ],
        "proofs": [
            {"above": 0.01, "closed": True},
            {"above": 0.0, "closed": True},
            {"above": 0.3, "closed": False},
        ],
    }
    assert figures(found) == {
        "searched_gain_median": 1.2,
        "searched_worst": 1.0,
        "searched_above_optimum": 0.01,
        "searched_gain_median_of_order_alone": 1.0,
        "searched_gain_median_of_aware_cuts": 1.1,
    }
