"""Parts cut out of tensors and pasted back."""

from __future__ import annotations

import pytest
import torch

from shardwise.describe.tensor import Slice
from shardwise.errors import DataflowError
from shardwise.parallel.tensor.slices import cut, join, local_shape, paste, whole_shape

QKV = Slice.even(1, 6, 2, parts=(2, 2, 2))
KEYS = Slice(dim=0, size=2, ranges=(((0, 1),), ((0, 1),), ((1, 2),), ((1, 2),)))


def test_a_packed_projection_is_cut_part_by_part() -> None:
    whole = torch.arange(6).expand(2, 6)

    assert cut(whole, QKV, 0)[0].tolist() == [0, 2, 4]
    assert cut(whole, QKV, 1)[0].tolist() == [1, 3, 5]


def test_pasted_parts_add_up_to_the_whole() -> None:
    whole = torch.randn(3, 6)

    assert torch.equal(sum(paste(cut(whole, QKV, rank), QKV, rank) for rank in range(2)), whole)


def test_what_several_hold_is_pasted_once_by_its_owners() -> None:
    whole = torch.randn(2, 3)

    assert torch.equal(sum(paste(cut(whole, KEYS, rank), KEYS, rank, owned=True) for rank in range(4)), whole)
    assert [int(cut(whole, KEYS, rank, owned=True).count_nonzero()) for rank in range(4)] == [3, 0, 3, 0]


@pytest.mark.parametrize(("part", "shape"), [(QKV, (3, 6)), (KEYS, (2, 3)), (Slice.even(0, 4, 2), (8, 1))])
def test_parts_are_joined_to_the_whole_that_they_were_cut_from(part: Slice, shape: tuple[int, ...]) -> None:
    whole = torch.randn(shape, dtype=torch.float64)
    parts = [cut(whole, part, rank) for rank in range(part.num_ranks)]

    joined = join(parts, part, within=0.0)
    assert joined is not None
    assert torch.equal(joined, whole)


def test_nothing_is_joined_of_which_two_ranks_hold_different_values() -> None:
    whole = torch.randn(2, 3, dtype=torch.float64)
    parts = [cut(whole, KEYS, rank) for rank in range(4)]
    parts[3] = parts[3] * (1 + 1e-4)

    assert join(parts, KEYS, within=1e-6) is None
    assert join(parts, KEYS, within=1e-3) is not None


def test_heads_folded_into_the_batch_are_cut_in_every_sample() -> None:
    heads = Slice.even(0, 4, 2)
    whole = torch.arange(8).view(8, 1)  # 2 samples × 4 heads

    assert cut(whole, heads, 1).flatten().tolist() == [2, 3, 6, 7]
    assert paste(cut(whole, heads, 1), heads, 1).flatten().tolist() == [0, 0, 2, 3, 0, 0, 6, 7]


def test_shapes_follow_without_tensors() -> None:
    assert local_shape((8, 5), Slice.even(0, 4, 2), 1) == (4, 5)
    assert whole_shape((4, 5), Slice.even(0, 4, 2), 1) == (8, 5)


def test_a_part_has_memory_of_its_own() -> None:
    whole = torch.zeros(4, 2)
    part = cut(whole, Slice.even(0, 4, 2), 0)
    part += 1

    assert float(whole.sum()) == 0.0


def test_parts_and_wholes_are_no_views_so_that_autograd_lets_code_write_into_them() -> None:
    part = cut(torch.zeros(4, 2), Slice.even(0, 4, 2), 0)

    assert part._base is None
    assert paste(part, Slice.even(0, 4, 2), 0)._base is None


def test_a_tensor_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataflowError, match="a multiple of 4 elements, and this one has 6"):
        cut(torch.zeros(6), Slice.even(0, 4, 2), 0)
