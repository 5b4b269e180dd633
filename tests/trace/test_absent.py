"""A tensor without a value answers what it is, and never what it holds."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import DataflowError
from shardwise.trace.absent import Absent, absent_parameter, first_absent


def absent(**changes: object) -> Absent:
    return Absent(
        **{"what": "layers.3#0 output 0", "shape": (2, 3), "dtype": torch.float16, "device": "cpu", **changes}
    )


def test_it_answers_what_it_is() -> None:
    tensor = absent(strides=(1, 2), requires_grad=True)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((2, 3), torch.float16, "cpu")
    assert (tensor.stride(), tensor.requires_grad, tensor.numel(), tensor.dim()) == ((1, 2), True, 6, 2)


@pytest.mark.parametrize("use", [lambda t: t + 1, lambda t: t.sum(), lambda t: torch.cat([t, t]), lambda t: t.mul_(2)])
def test_computing_with_it_is_an_error_that_names_it(use: object) -> None:
    with pytest.raises(DataflowError, match="layers.3#0 output 0 is not on this stage"):
        use(absent())  # type: ignore[operator]


def test_what_asks_for_shape_and_dtype_only_is_answered() -> None:
    assert torch.equal(torch.zeros_like(absent()), torch.zeros(2, 3, dtype=torch.float16))
    assert torch.equal(absent().new_ones(4), torch.ones(4, dtype=torch.float16))


def test_it_is_found_inside_structures() -> None:
    tensor = absent()
    assert first_absent(([1, {"a": tensor}], None)) is tensor
    assert first_absent([torch.zeros(1)]) is None


def test_an_absent_parameter_is_a_parameter() -> None:
    parameter = absent_parameter(
        name="head.weight", shape=(4, 2), dtype=torch.float32, device="cpu", requires_grad=True
    )
    assert isinstance(parameter, torch.nn.Parameter)
    with pytest.raises(DataflowError, match="parameter head.weight"):
        parameter.sum()
