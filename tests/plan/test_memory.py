"""What a rank holds at the worst moment of a step: against sums by hand, and against the ZeRO paper's table 1."""

from __future__ import annotations

import dataclasses

import pytest

from shardwise.describe.cluster import Overheads
from shardwise.errors import LayoutError
from shardwise.layout import Layout, Offload
from shardwise.plan.job import Job, PerParameter
from shardwise.plan.memory import memory_lines
from shardwise.plan.stage_work import StageWork

ADAM = Job(global_batch=8)  # float32: 4 bytes of parameter, 4 of gradient, 8 of AdamW's moments
STAGE = StageWork(
    stage=0,
    parameters=1_000,
    trained=900,
    unit_parameters=(300, 400, 300),
    kernels=(),
    saved_bytes=5_000,
    weight_bytes=2_000,
    transient_bytes=700,
    logits_bytes=1_500,
)


def test_while_the_loss_is_there_a_rank_keeps_all_micro_batches_in_flight_and_earlier_gradients() -> None:
    lines = memory_lines([STAGE], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2])
    assert (lines.parameters, lines.gradients, lines.optimizer) == (4_000, 3_600, 7_200)
    assert (lines.activations, lines.logits, lines.transient) == (10_000, 1_500, 0)
    assert lines.total == 4_000 + 3_600 + 7_200 + 10_000 + 1_500


def test_a_stage_without_a_loss_is_fullest_while_one_unit_computes() -> None:
    stage = dataclasses.replace(STAGE, logits_bytes=0)
    lines = memory_lines([stage], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2])
    assert (lines.transient, lines.logits) == (700, 0)


def test_before_the_first_backward_there_are_no_gradients_unless_they_stay() -> None:
    stage = dataclasses.replace(STAGE, saved_bytes=50_000)
    for stays, gradients in ((False, 0), (True, 3_600)):
        job = dataclasses.replace(ADAM, gradients_stay=stays)
        lines = memory_lines([stage], Layout(pp=2), job, num_micro_batches=2, in_flight=[2])
        assert lines.gradients == gradients


def test_when_one_micro_batch_is_done_its_activations_have_made_room_for_gradients() -> None:
    stage = dataclasses.replace(STAGE, saved_bytes=1_000, logits_bytes=0)
    lines = memory_lines([stage], Layout(pp=2), ADAM, num_micro_batches=2, in_flight=[2])
    assert (lines.activations, lines.gradients, lines.transient) == (1_000, 3_600, 700)


def test_behind_all_backwards_the_optimizer_has_its_temporaries() -> None:
    per = PerParameter(parameter=2, gradient=4, master=4, optimizer=8, fresh=2, temporary=100)
    job = dataclasses.replace(ADAM, per_parameter=per)
    lines = memory_lines([STAGE], Layout(), job, num_micro_batches=8, in_flight=[1])
    assert (lines.activations, lines.transient) == (0, 90_000)
    assert (lines.parameters, lines.gradients, lines.masters) == (2_000, 6 * 900, 3_600)


def test_stages_of_one_rank_add_up_but_their_units_work_one_after_the_other() -> None:
    lines = memory_lines([STAGE, STAGE], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2, 1.5])
    assert lines.activations == 3.5 * 5_000
    assert lines.logits == 1_500
    assert lines.parameters == 8_000


def test_what_is_whole_of_divided_states_is_in_buffers() -> None:
    lines = memory_lines([STAGE], Layout(fsdp=4), ADAM, num_micro_batches=2, in_flight=[1])
    assert (lines.parameters, lines.gradients, lines.optimizer) == (1_000, 900, 1_800)
    assert lines.buffers == 800 * 4 + 800 * 4  # of two units: parameters and gradients
    by_step = memory_lines([STAGE], Layout(fsdp=4, pp=2), ADAM, num_micro_batches=8, in_flight=[2])
    assert (by_step.parameters, by_step.gradients, by_step.buffers) == (1_000, 3_600, 4_000)


def test_replicas_that_sum_in_a_buffer_of_their_own_hold_it_unless_parameters_are_divided() -> None:
    job = dataclasses.replace(ADAM, per_parameter=PerParameter(wire=2))
    held = [
        memory_lines([STAGE], layout, job, num_micro_batches=2, in_flight=[1]).buffers
        for layout in (Layout(), Layout(dp=2), Layout(fsdp=2, zero=1))
    ]
    assert held == [0, 1_800, 1_800]


def test_messages_wait_in_buffers() -> None:
    stage = dataclasses.replace(STAGE, sends={1: 250.0}, gradients={1: 200.0})
    assert memory_lines([stage], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2]).buffers == 450


def test_a_schedule_without_a_flush_holds_two_versions() -> None:
    one = memory_lines([STAGE], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2])
    two = memory_lines([STAGE], Layout(pp=2, schedule="pipedream-2bw"), ADAM, num_micro_batches=8, in_flight=[2])
    assert (two.parameters - one.parameters, two.gradients - one.gradients) == (900 * 4, 900 * 4)


def test_what_waits_in_the_host_is_not_on_the_device() -> None:
    here, there = (
        memory_lines([STAGE], Layout(pp=4, offload=offload), ADAM, num_micro_batches=8, in_flight=[4])
        for offload in (Offload.NONE, Offload.BOTH)
    )
    assert (here.activations, there.activations) == (20_000, 10_000)
    assert (here.optimizer, there.optimizer) == (7_200, 0)


def test_framework_and_fragments_of_what_comes_and_goes_come_on_top() -> None:
    overheads = Overheads(framework_bytes=1_000, slack=0.1)
    bare = memory_lines([STAGE], Layout(), ADAM, num_micro_batches=2, in_flight=[1])
    lines = memory_lines([STAGE], Layout(), ADAM, num_micro_batches=2, in_flight=[1], overheads=overheads)
    assert lines.slack == pytest.approx(0.1 * (5_000 + 1_500))
    assert lines.total == pytest.approx(bare.total + 650 + 1_000)


@pytest.mark.parametrize("less", ["zero", "tp", "recompute", "in flight"])
def test_less_is_never_more(less: str) -> None:
    stage, layout, in_flight = STAGE, Layout(fsdp=8, zero=1), 4.0
    totals = []
    for turn in range(3):
        totals.append(memory_lines([stage], layout, ADAM, num_micro_batches=8, in_flight=[in_flight]).total)
        if less == "zero":
            layout = dataclasses.replace(layout, zero=turn + 2 if turn < 2 else 3)
            stage = dataclasses.replace(stage, unit_parameters=(50,) * 20)
        elif less == "tp":
            numbers = {name: getattr(stage, name) // 2 for name in ("parameters", "trained", "saved_bytes")}
            stage = dataclasses.replace(stage, **numbers, weight_bytes=0)
        elif less == "recompute":
            stage = dataclasses.replace(stage, saved_bytes=stage.saved_bytes / 4, transient_bytes=stage.saved_bytes)
        else:
            in_flight /= 2
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_a_number_of_micro_batches_for_every_stage() -> None:
    with pytest.raises(LayoutError, match="give one number a stage"):
        memory_lines([STAGE], Layout(), ADAM, num_micro_batches=2, in_flight=[1, 1])


# Rajbhandari et al. 2020, table 1: GB of a model's states on one device, by replicas, for stages 1, 2 and 3
_TABLE_1 = {
    7.5e9: {
        1: ("120", "120", "120"),
        4: ("52.5", "41.3", "30"),
        16: ("35.6", "21.6", "7.5"),
        64: ("31.4", "16.6", "1.88"),
        256: ("30.4", "15.4", "0.47"),
        1024: ("30.1", "15.1", "0.12"),
    },
    128e9: {
        1: ("2048", "2048", "2048"),
        4: ("896", "704", "512"),
        16: ("608", "368", "128"),
        64: ("536", "284", "32"),
        256: ("518", "263", "8"),
        1024: ("513", "257", "2"),
    },
    1e12: {
        1: ("16000", "16000", "16000"),
        4: ("7000", "5500", "4000"),
        16: ("4750", "2875", "1000"),
        64: ("4187", "2218", "250"),
        256: ("4046", "2054", "62.5"),
        1024: ("4011", "2013", "15.6"),
    },
}


@pytest.mark.parametrize("parameters", _TABLE_1)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_states_are_those_of_table_1_to_its_digits(parameters: float, zero: int) -> None:
    job = Job(global_batch=1, per_parameter=PerParameter(parameter=2, gradient=2, master=4, optimizer=8))
    stage = StageWork(stage=0, parameters=round(parameters), trained=round(parameters), kernels=(), saved_bytes=0)
    for replicas, columns in _TABLE_1[parameters].items():
        lines = memory_lines([stage], Layout(fsdp=replicas, zero=zero), job, num_micro_batches=1, in_flight=[1])
        printed = columns[zero - 1]
        last_digit = 10.0 ** -len(printed.partition(".")[2])
        assert abs(lines.total / 1e9 - float(printed)) <= 1.01 * last_digit


def test_small_gradients_are_made_beside_the_buckets_in_which_replicas_sum_them() -> None:
    stage, replicas = dataclasses.replace(STAGE, small_trained=100), Layout(dp=2)
    beside = [
        memory_lines([one], replicas, ADAM, num_micro_batches=2, in_flight=[1]).gradients for one in (STAGE, stage)
    ]
    assert beside == [3_600, 3_600 + 400]
    alone = memory_lines([stage], Layout(pp=2), ADAM, num_micro_batches=8, in_flight=[2])
    assert alone.gradients == 3_600
