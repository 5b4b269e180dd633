"""Emulated 16-bit products are the native ones within rounding, forward and backward, and overflow as they do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from shardwise.parallel.precision.emulated import Emulated, rounded

DTYPES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # one unit in the last place, relative
Product = Callable[..., torch.Tensor]

CASES: dict[str, tuple[Product, list[tuple[int, ...]]]] = {
    "linear": (F.linear, [(3, 5, 8), (6, 8), (6,)]),
    "linear without bias": (F.linear, [(3, 5, 8), (6, 8)]),
    "matmul": (torch.matmul, [(4, 8), (8, 6)]),
    "batched matmul": (torch.matmul, [(2, 3, 4, 8), (2, 3, 8, 6)]),
    "bmm": (torch.bmm, [(3, 4, 8), (3, 8, 6)]),
    "addmm": (torch.addmm, [(4, 6), (4, 8), (8, 6)]),
    "baddbmm": (torch.baddbmm, [(3, 4, 6), (3, 4, 8), (3, 8, 6)]),
    "matrix times vector": (torch.mv, [(4, 8), (8,)]),
    "einsum": (lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), [(2, 3, 4, 8), (2, 3, 5, 8)]),
    "conv1d": (F.conv1d, [(2, 4, 9), (6, 4, 3), (6,)]),
    "conv2d": (F.conv2d, [(2, 4, 6, 6), (5, 4, 3, 3), (5,)]),
    "conv_transpose1d": (F.conv_transpose1d, [(2, 4, 9), (4, 6, 3), (6,)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 6, 8)] * 3),
    "causal attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), [(2, 2, 6, 8)] * 3),
}


def outcome(product: Product, operands: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradients of the operands, in float32."""
    leaves = [operand.clone().requires_grad_() for operand in operands]
    out = product(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [tensor.detach().float() for tensor in (out, *gradients)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_product_is_the_native_one_within_rounding(case: str, dtype: torch.dtype) -> None:
    product, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    operands = [rounded(torch.randn(shape, generator=generator), dtype) for shape in shapes]
    upstream = rounded(torch.randn(product(*operands).shape, generator=generator), dtype)
    with Emulated(dtype):
        emulated = outcome(product, operands, upstream)
    native = outcome(product, [operand.to(dtype) for operand in operands], upstream)
    for ours, theirs in zip(emulated, native, strict=True):
        # both round a sum; attention rounds what is between its two products as well, convolutions before the bias
        places = 4 if "attention" in case else 2 if "conv" in case else 1
        bound = places * DTYPES[dtype] * theirs.abs().max()
        assert (ours - theirs).abs().max() <= bound
    assert torch.equal(emulated[0], rounded(emulated[0], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operands_are_rounded_and_multiplied_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(7, 33, generator=generator), torch.randn(5, 33, generator=generator)
    with Emulated(dtype):
        got = F.linear(x, w)
    assert torch.equal(got, rounded(F.linear(rounded(x, dtype), rounded(w, dtype)), dtype))
    assert not torch.equal(got, rounded(F.linear(x, w), dtype))


def test_float16_overflows_to_infinity_as_the_native_product_does_and_bfloat16_does_not() -> None:
    x = torch.full((1, 4), 200.0)
    with Emulated(torch.float16):
        assert torch.isinf(x @ x.t()).all()
    assert torch.isinf(x.half() @ x.half().t()).all()
    with Emulated(torch.bfloat16):
        assert torch.isfinite(x @ x.t()).all()


def test_an_operand_beyond_float16_is_infinite() -> None:
    x = torch.full((1, 4), 1e5)
    with Emulated(torch.float16):
        assert torch.isinf(x @ torch.ones(4, 1)).all()


def test_a_product_that_adds_to_a_gradient_rounds_the_product_and_sums_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    into, a, b = (torch.randn(4, 4, generator=generator) for _ in range(3))
    wanted = into + rounded(rounded(a, torch.bfloat16) @ rounded(b, torch.bfloat16), torch.bfloat16)
    got = into.clone()
    with Emulated(torch.bfloat16):
        got.addmm_(a, b)
    assert torch.equal(got, wanted)


def test_what_is_no_product_stays_in_float32() -> None:
    x = torch.full((8,), 1.0 + 2.0**-12)
    with Emulated(torch.bfloat16):
        assert torch.equal(x + 1, torch.full((8,), 2.0 + 2.0**-12))
        assert torch.equal(F.layer_norm(x * torch.arange(8), (8,)), F.layer_norm(x * torch.arange(8), (8,)))


def test_other_dtypes_are_left_alone() -> None:
    x = torch.randn(4, 4, dtype=torch.float64)
    with Emulated(torch.bfloat16):
        assert torch.equal(x @ x, torch.mm(x, x))
        assert (torch.arange(4).view(2, 2) @ torch.arange(4).view(2, 2)).dtype == torch.int64
