"""What a rank holds and sends where replicas divide the state of training, in the numbers of the ZeRO paper."""

from __future__ import annotations

import pytest

from shardwise.layout import Layout
from shardwise.plan.divide_states import StateBytes, divided, sent_bytes

# a model of 7.5 G parameters in 16 bit with 12 bytes of optimizer state each, as in the paper's figure 1
WHOLE = StateBytes(parameters=15_000, gradients=15_000, optimizer=90_000)  # megabytes


@pytest.mark.parametrize(("zero", "megabytes"), [(1, 31_406), (2, 16_641), (3, 1_876)])
def test_on_64_ranks_a_rank_holds_what_the_paper_says(zero: int, megabytes: int) -> None:
    left = divided(Layout(fsdp=64, zero=zero), WHOLE, largest=0)
    assert abs(left.parameters + left.gradients + left.optimizer - megabytes) <= 2


def test_what_is_whole_for_a_turn_is_two_units() -> None:
    left = divided(Layout(fsdp=4), WHOLE, largest=1_000)
    assert (left.parameters, left.gradients, left.optimizer) == (3_750 + 2_000, 3_750 + 2_000, 22_500)


def test_parameters_that_are_whole_for_a_step_stand_beside_their_parts() -> None:
    left = divided(Layout(fsdp=2, pp=2), WHOLE, largest=1_000)
    assert (left.parameters, left.gradients, left.optimizer) == (15_000 + 7_500, 15_000, 45_000)


def test_nobody_divides_anything_without_the_axis() -> None:
    assert divided(Layout(dp=8), WHOLE, largest=5) is WHOLE


def test_dividing_parameters_sends_half_as_much_again_as_a_sum() -> None:
    n, step = 4, {"parameters": 400, "gradients": 400, "num_micro_batches": 1}
    assert sent_bytes(Layout(dp=n), **step) == 600
    assert sent_bytes(Layout(fsdp=n, zero=1), **step) == sent_bytes(Layout(fsdp=n, zero=2), **step) == 600
    assert sent_bytes(Layout(fsdp=n), **step) == 900  # section 7 of the paper: 1.5 times
    assert sent_bytes(Layout(dp=2, fsdp=n), **step) == 900 + 100  # and the sum of the parts


def test_a_step_that_keeps_parameters_whole_sends_as_much_for_any_number_of_micro_batches() -> None:
    few, many = (
        sent_bytes(Layout(fsdp=2, pp=2), parameters=100, gradients=100, num_micro_batches=number) for number in (4, 64)
    )
    assert few == many == 100
