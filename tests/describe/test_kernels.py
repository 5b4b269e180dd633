"""Kernels: how often, and of how many samples."""

import dataclasses

import pytest

from shardwise.describe.kernels import Kernel, KernelKind, Phase
from shardwise.errors import ModelError

PRODUCT = Kernel(
    kind=KernelKind.MATMUL,
    phase=Phase.WEIGHT,
    dtype="bfloat16",
    flops=96,
    nbytes=80,
    shape=(1, 4, 3, 4),
    batch_dims=(2,),
    batch_bytes=48,
    count=3,
)


def test_a_kernel_some_times_is_the_same_with_another_count():
    assert PRODUCT.times(7) == dataclasses.replace(PRODUCT, count=21)
    assert PRODUCT.times(1) is PRODUCT


@pytest.mark.parametrize(
    "change", [{"count": -1}, {"flops": -1}, {"batch_dims": (4,)}, {"batch_dims": (-1,)}, {"batch_bytes": 81}]
)
def test_numbers_that_no_kernel_has_are_refused(change):
    with pytest.raises(ModelError):
        dataclasses.replace(PRODUCT, **change)
