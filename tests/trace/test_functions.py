"""Torch functions as the glue calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from shardwise.trace.functions import as_one_function, grouped_mm_like, is_constructor, name_of


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * 2


class Listening(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "func, name",
    [
        (torch.add, "add"),
        (torch.Tensor.add_, "add_"),
        (torch.Tensor.T.__get__, "T"),
        (torch.nn.functional.cross_entropy, "cross_entropy"),
        (torch.Tensor.__getitem__, "__getitem__"),
    ],
)
def test_functions_have_readable_names(func: Any, name: str) -> None:
    assert name_of(func) == name


def test_what_takes_a_tensor_for_its_shape_reads_no_values() -> None:
    assert is_constructor(torch.zeros_like)
    assert is_constructor(torch.Tensor.new_full)
    assert not is_constructor(torch.clone)


@pytest.mark.parametrize(
    "a, b, groups, shape",
    [
        ((10, 3), (4, 3, 5), 4, (10, 5)),
        ((3, 10), (10, 5), 4, (4, 3, 5)),
        ((4, 6, 3), (3, 5), 4, (6, 5)),
        ((4, 6, 3), (4, 3, 5), None, (4, 6, 5)),
    ],
    ids=["rows in groups", "inner dim in groups", "columns in groups", "batched"],
)
def test_a_grouped_product_has_the_shape_of_its_kind(
    a: tuple[int, ...], b: tuple[int, ...], groups: int | None, shape: tuple[int, ...]
) -> None:
    ends = None if groups is None else torch.arange(1, groups + 1, dtype=torch.int32)
    made = grouped_mm_like(torch.ones(a), torch.ones(b), ends, out_dtype=torch.bfloat16)
    assert made.shape == shape
    assert made.dtype == torch.bfloat16


def test_an_autograd_function_is_one_function_that_equals_itself() -> None:
    mode = Listening()
    x = torch.ones(2, requires_grad=True)
    with as_one_function(lambda: mode), mode:
        Doubled.apply(x)
        Doubled.apply(x).sum().backward()
    first, second, *rest = mode.heard
    assert first == second
    assert hash(first) == hash(second)
    assert name_of(first) == "Doubled"
    assert torch.add not in rest
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]


class Doubling(torch.Tensor):
    """A tensor whose sum is that of its double, by an autograd function."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            doubled = [Doubled.apply(arg) if func is torch.sum else arg for arg in args]
            return func(*doubled, **(kwargs or {}))


def test_an_autograd_function_inside_of_a_function_that_the_mode_was_told_of_is_not_told() -> None:
    mode = Listening()
    with as_one_function(lambda: mode), mode:
        assert torch.sum(torch.ones(2).as_subclass(Doubling)) == 4
    assert torch.sum in mode.heard
    assert "Doubled" not in {name_of(func) for func in mode.heard}


def test_an_autograd_function_is_itself_where_no_mode_asks() -> None:
    mode = Listening()
    with as_one_function(lambda: None), mode:
        assert Doubled.apply(torch.ones(2)).tolist() == [2, 2]
    assert "Doubled" not in {name_of(func) for func in mode.heard}


def test_autograd_functions_are_as_before_afterwards() -> None:
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(ZeroDivisionError), as_one_function(lambda: None):
        raise ZeroDivisionError
    assert torch.autograd.Function.__dict__["apply"] is before
