"""Copies of one gradient on several ranks are told from the reference's by their marks."""

from __future__ import annotations

import pytest
import torch

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.slices import cut
from shardwise.verify.comparison import errors_of
from shardwise.verify.copies import Copy, distances_of, marks_of

WHOLE = torch.randn(12, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(12, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
HEADS = Slice(dim=0, size=3, ranges=(((0, 2),), ((1, 3),)))  # the second of three heads is on both ranks


def distance(copy: torch.Tensor | None, *cuts: tuple[Slice, int], whole: torch.Tensor | None = WHOLE) -> float:
    return distances_of([{"w": Copy(marks=marks_of(copy), cuts=cuts)}], {"w": whole})["w"]


def test_equal_copies_are_no_distance_apart() -> None:
    assert distance(WHOLE) == 0.0
    assert distance(cut(WHOLE, HEADS, 1), (HEADS, 1)) == 0.0
    assert distance(None, whole=None) == 0.0
    assert distance(torch.zeros(12, 7), whole=None) == 0.0


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0])
def test_the_distance_is_about_that_of_the_tensors(scale: float) -> None:
    true = scale * float(OTHER.norm())
    assert 0.3 * true < distance(WHOLE + scale * OTHER) < 2 * true


@pytest.mark.parametrize("place", [0, 41, 83])
def test_one_element_that_differs_is_seen_wherever_it_stands(place: int) -> None:
    copy = WHOLE.clone()
    copy.view(-1)[place] += 0.5
    assert distance(copy) == pytest.approx(0.5)


def test_elements_in_another_order_are_another_tensor() -> None:
    assert distance(WHOLE.flip(0)) > 0.3 * float(WHOLE.norm())


def test_signs_go_on_beyond_one_piece() -> None:
    large = torch.randn(200_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = large.roll(2**16)
    true = float((large - moved).norm())
    assert 0.3 * true < distance(moved, whole=large) < 2 * true


def test_the_part_of_another_rank_is_another_tensor() -> None:
    assert distance(cut(WHOLE, HEADS, 0), (HEADS, 1)) > 0.3


def test_a_copy_that_is_missing_or_no_number_is_as_far_as_it_can_be() -> None:
    assert distance(None) > 0.3 * float(WHOLE.norm())
    assert distance(WHOLE * float("nan")) == float("inf")


def test_the_farthest_copy_counts_in_the_error_of_its_parameter() -> None:
    ranks = [{"w": Copy(marks=marks_of(WHOLE + scale * OTHER))} for scale in (0.0, 1e-3, 0.0)]
    far = distances_of(ranks, {"w": WHOLE})
    gradients, updates = {"w": WHOLE}, {"w": torch.zeros_like(WHOLE)}
    (error,) = errors_of(gradients, updates, gradients, updates, by_sign=False, distances=far)
    assert 3e-4 < error.gradient < 3e-3
    assert error.update == 0.0
