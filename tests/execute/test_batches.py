"""Splitting a batch: what is cut along the samples, what is shared, and what is refused."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import BatchError
from shardwise.execute.batches import batch_size, select, signature, split


def rows(micro_batches: object) -> list[list[tuple[int, ...]]]:
    return [[part.samples for part in replica] for replica in micro_batches]  # type: ignore[attr-defined]


def dealt(batch: object, micro_batches: int, replicas: int = 1, **options: object) -> object:
    return split(batch, micro_batches=micro_batches, replicas=replicas, weights=lambda _: 1.0, **options)  # type: ignore[arg-type]


def test_samples_are_dealt_in_order() -> None:
    parts = dealt({"x": torch.arange(8)}, 2, 2)

    assert rows(parts) == [[(0, 1), (2, 3)], [(4, 5), (6, 7)]]
    assert [part.index for replica in parts for part in replica] == [0, 1, 2, 3]  # type: ignore[attr-defined]


def test_micro_batches_that_are_normalised_together_are_one_stretch_of_samples() -> None:
    assert rows(dealt({"x": torch.arange(8)}, 2, 2, together=True)) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


def test_a_last_micro_batch_may_be_smaller() -> None:
    assert rows(dealt({"x": torch.arange(7)}, 3)) == [[(0, 1), (2, 3), (4, 5, 6)]]


def test_scalars_and_tensors_of_another_length_are_shared() -> None:
    batch = {"x": torch.arange(6).view(6, 1), "table": torch.arange(5), "scale": torch.tensor(2.0), "flag": True}

    part = select(batch, [0, 1], size=6)

    assert part["x"].tolist() == [[0], [1]]
    assert part["table"].shape == (5,)
    assert part["scale"] == 2.0
    assert part["flag"] is True


def test_a_named_dim_is_cut() -> None:
    positions = torch.arange(12).view(3, 4, 1)
    part = select({"x": torch.zeros(4, 2), "position_ids": positions}, [1, 2], size=4, batch_dims={"position_ids": 1})

    assert part["position_ids"].shape == (3, 2, 1)


def test_an_ambiguous_tensor_is_an_error_with_the_line_to_add() -> None:
    batch = {"input_ids": torch.zeros(4, 2), "position_ids": torch.zeros(3, 4)}

    with pytest.raises(BatchError, match="position_ids = 1"):
        select(batch, [0], size=4)

    assert select(batch, [0], size=4, batch_dims={"position_ids": -1})["position_ids"].shape == (3, 4)
    assert select(batch, [0], size=4, batch_dims={"position_ids": 1})["position_ids"].shape == (3, 1)


def test_a_named_dim_of_another_size_is_refused() -> None:
    with pytest.raises(BatchError, match=r"dim 1 of x are the 4 samples; its shape is \(4, 2\)"):
        select({"x": torch.zeros(4, 2)}, [0], size=4, batch_dims={"x": 1})


def test_fewer_samples_than_micro_batches_is_refused_with_a_number_that_works() -> None:
    with pytest.raises(BatchError, match="need 8 samples, the batch has 6; use at most 3 micro-batches"):
        dealt({"x": torch.zeros(6)}, 4, 2)


def test_the_batch_size_is_that_of_the_inputs() -> None:
    assert batch_size({"input_ids": torch.zeros(3, 5)}) == 3
    assert batch_size((torch.zeros(2), torch.zeros(2))) == 2
    with pytest.raises(BatchError, match="at least one tensor"):
        batch_size({"flag": True})


def test_a_signature_knows_shapes_dtypes_constants_and_the_mode() -> None:
    one = signature({"x": torch.zeros(2, 3), "n": 1}, True)

    assert one == signature({"x": torch.ones(2, 3), "n": 1}, True), "values do not matter"
    assert one != signature({"x": torch.zeros(2, 4), "n": 1}, True)
    assert one != signature({"x": torch.zeros(2, 3).int(), "n": 1}, True)
    assert one != signature({"x": torch.zeros(2, 3), "n": 2}, True)
    assert one != signature({"x": torch.zeros(2, 3), "n": 1}, False)
