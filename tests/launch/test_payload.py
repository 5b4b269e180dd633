"""Values travel through memory: whole, shared once, and private to whoever reads them."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch
from torch import nn

from shardwise.errors import LaunchError
from shardwise.launch.payload import pack, unpack


def travelled(value: object) -> object:
    descriptor = pack(value)
    try:
        return unpack(descriptor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3),
        torch.arange(6).reshape(2, 3).T,
        torch.ones(1).expand(4),
        torch.empty(0, 3),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
    ],
    ids=["whole", "transposed", "stride 0", "empty", "bfloat16 scalar", "bool", "complex"],
)
def test_a_tensor_arrives_with_its_values_and_strides(tensor: torch.Tensor) -> None:
    arrived = travelled(tensor)
    assert isinstance(arrived, torch.Tensor)
    assert torch.equal(arrived, tensor)
    assert (arrived.dtype, arrived.stride()) == (tensor.dtype, tensor.stride())


def test_a_module_arrives_with_tied_weights_tied() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    arrived = travelled(nn.Sequential(embedding, head))
    assert arrived[0].weight is arrived[1].weight
    assert isinstance(arrived[0].weight, nn.Parameter)
    assert torch.equal(arrived[0].weight, embedding.weight)


def test_views_of_one_storage_arrive_as_views_of_one_storage() -> None:
    base = torch.arange(10.0)
    whole, part = travelled((base, base[2:5]))
    whole[3] = 99
    assert part.tolist() == [2, 99, 4]


def test_bytes_of_a_shared_storage_are_written_once() -> None:
    big = torch.zeros(1 << 18)  # 1 MiB
    one, many = pack(big), pack([big, big[1:], big.view(2, -1)])
    assert os.fstat(many).st_size < os.fstat(one).st_size + 10_000
    os.close(one)
    os.close(many)


def test_readers_may_write_without_being_seen() -> None:
    descriptor = pack((torch.zeros(3), np.zeros(3)))
    first, second = unpack(descriptor), unpack(descriptor)
    first[0][0], first[1][0] = 7, 7
    assert second[0][0] == 0
    assert second[1][0] == 0
    os.close(descriptor)


def test_the_value_outlives_its_descriptor() -> None:
    arrived = travelled(torch.full((1 << 16,), 3.0))
    assert arrived.sum() == 3 * 2**16


def test_what_was_trained_on_can_still_be_sent() -> None:
    linear = nn.Linear(2, 2)
    linear(torch.ones(1, 2)).sum().backward()
    assert torch.equal(travelled(linear).weight, linear.weight)


def test_functions_and_classes_made_on_the_spot_arrive() -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

    shift = 3
    assert travelled(lambda box: box.value + shift)(Local(4)) == 7
    assert isinstance(travelled(Local(4)), Local)


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(LaunchError, match="dict cannot travel between processes.*lock.*keep open files, locks"):
        pack({"lock": threading.Lock()})
