"""What a backward spends on gradients of weights: by flops where there are any, else by bytes."""

from __future__ import annotations

import dataclasses

import pytest

from hand_profiles import chain
from shardwise.plan.work import work_of


def profile_with(**fields):
    profile = chain([10**6] * 2)
    first, second = profile.calls
    return dataclasses.replace(profile, calls=(dataclasses.replace(first, **fields), second))


def share(profile) -> float:
    work = work_of(profile)
    return work.weight[0] / work.backward[0]


def test_a_product_with_a_parameter_costs_its_gradient_as_much_as_its_forward() -> None:
    assert share(profile_with(weight_flops=10**6)) == pytest.approx(1 / 2)


def test_attention_leaves_less_to_weights() -> None:
    assert share(profile_with(backward_flops=4 * 10**6, weight_flops=10**6)) == pytest.approx(1 / 4)


def test_the_first_layer_has_no_gradient_of_its_input() -> None:
    assert share(profile_with(backward_flops=10**6, weight_flops=10**6)) == pytest.approx(1)


def test_what_nobody_counted_is_halved() -> None:
    assert share(profile_with()) == pytest.approx(1 / 2)


def test_without_flops_it_is_the_share_of_bytes() -> None:
    table = profile_with(forward_flops=0, backward_flops=0, saved_bytes=0)  # writes 16 bytes, made 32
    assert share(table) == pytest.approx(16 / 48)


def test_measured_seconds_are_split_alike() -> None:
    profile = profile_with(backward_flops=4 * 10**6, weight_flops=10**6)
    timed = dataclasses.replace(
        profile, calls=tuple(dataclasses.replace(call, forward_s=1.0, backward_s=3.0) for call in profile.calls)
    )
    work = work_of(timed)
    assert work.in_seconds
    assert work.weight[0] == pytest.approx(3 / 4)
