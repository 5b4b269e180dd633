"""Operations on fake tensors are answered from memory as torch answers them, and only where it is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.trace.shapes import Shapes

Made = Callable[..., Any]


class Answering(TorchDispatchMode):
    """Sends everything to one `Shapes`, and compares each answer with torch's own."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.shapes = Shapes(fake)
        self.asked_torch = 0
        by_torch = self.shapes._by_torch

        def counted(func: Any, args: Any, kwargs: Any) -> Any:
            self.asked_torch += 1
            return by_torch(func, args, kwargs)

        self.shapes._by_torch = counted  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        return self.shapes.run(func, args, kwargs)


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def form(tensor: torch.Tensor) -> tuple[Any, ...]:
    nbytes = tensor.untyped_storage().nbytes()
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.storage_offset(), nbytes


OPERATIONS: dict[str, Made] = {
    "product": lambda x, w: x @ w,
    "linear": lambda x, w: F.linear(x, w.t()),
    "promotion": lambda x, w: x.double() + w[0],
    "number": lambda x, w: x * 2 + 1.5,
    "reduction": lambda x, w: x.sum(-1, keepdim=True).mean(),
    "several": lambda x, w: torch.max(x, dim=-1).values,
    "normalised": lambda x, w: F.layer_norm(x, (6,), w[0], w[1]),
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "transposed": lambda x, w: x.t(),
    "sliced": lambda x, w: x[2:, ::2],
    "chunks": lambda x, w: torch.stack(x.chunk(2, dim=-1)),
    "expanded": lambda x, w: x[:, None].expand(-1, 3, -1).reshape(-1, 6),
    "reshaped": lambda x, w: x.t().reshape(-1).view(6, 8),
    "in place": lambda x, w: x.clone().add_(1).mul_(w[0]),
    "complex": lambda x, w: torch.view_as_complex(x.reshape(8, 3, 2)).conj().imag,
    "embedding": lambda x, w: F.embedding(torch.arange(4), x),
    "normalised batch": lambda x, w: F.batch_norm(x, torch.zeros(6), torch.ones(6), w[0], w[1], training=True),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_second_answer_is_like_the_first_and_like_torchs(name: str, fake: FakeTensorMode) -> None:
    operation = OPERATIONS[name]
    with fake:
        x, w = torch.ones(8, 6), torch.ones(6, 6)
        wanted = form(operation(x, w))
    with Answering(fake):
        answers = [operation(x, w) for _ in range(3)]
    assert [form(answer) for answer in answers] == [wanted] * 3
    assert len({id(answer) for answer in answers}) == 3


def test_torch_is_asked_once_for_equal_arguments(fake: FakeTensorMode) -> None:
    with fake:
        x, y, longer = torch.ones(8, 6), torch.ones(8, 6), torch.ones(9, 6)
    with Answering(fake) as mode:
        for tensor in (x, y, x, longer, x.t(), x.t()):
            tensor + 1
    assert mode.asked_torch == 4  # 8x6, 9x6, the view x.t() and the sum of it


def test_another_number_type_is_another_question(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.ones(3, dtype=torch.int64)
    with Answering(fake):
        assert [(x * number).dtype for number in (1, 1.0, True, 1)] == [
            torch.int64,
            torch.float32,
            torch.int64,
            torch.int64,
        ]


def test_a_view_shares_the_memory_of_what_it_is_a_view_of(fake: FakeTensorMode) -> None:
    with fake:
        x, y = torch.ones(8, 6), torch.ones(8, 6)
    with Answering(fake):
        views = [tensor[2:] for tensor in (x, y, x)]
    memory = [tensor.untyped_storage()._cdata for tensor in (*views, x, y)]
    assert memory[0] == memory[2] == memory[3]
    assert memory[1] == memory[4] != memory[0]


def test_a_view_of_a_view_starts_where_that_one_starts(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.ones(8, 6)
        parts = [x[:2], x[2:4], x[4:6]]
    with Answering(fake):
        assert [part[1:].storage_offset() for part in parts] == [6, 18, 30]


def test_new_memory_is_new_every_time(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.ones(8, 6)
    with Answering(fake):
        made = [x + 1 for _ in range(3)]
    assert len({tensor.untyped_storage()._cdata for tensor in (x, *made)}) == 4


def test_a_write_answers_the_tensor_it_wrote(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.ones(8, 6)
    with Answering(fake):
        assert all(x.add_(1) is x for _ in range(3))


def test_gradients_go_through_answers_from_memory(fake: FakeTensorMode) -> None:
    with fake:
        weights = [torch.nn.Parameter(torch.ones(6, 6)) for _ in range(3)]
        x = torch.ones(8, 6)
    with Answering(fake):
        for weight in weights:
            x = torch.tanh(x @ weight.t())
        x.sum().backward()
    assert [weight.grad.shape for weight in weights if weight.grad is not None] == [(6, 6)] * 3


def test_a_default_type_is_part_of_the_question(fake: FakeTensorMode) -> None:
    with fake:
        x = torch.ones(3, dtype=torch.int64)
    with Answering(fake):
        single = (x / 2).dtype
        torch.set_default_dtype(torch.float64)
        try:
            double = (x / 2).dtype
        finally:
            torch.set_default_dtype(torch.float32)
    assert (single, double) == (torch.float32, torch.float64)
