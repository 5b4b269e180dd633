"""Blocks are timed whole, beside the kernels that a trace says they are made of."""

from __future__ import annotations

import torch

from shardwise.describe.kernels import KernelKind, Phase
from shardwise.trace.probe_blocks import block_kernels, block_seconds, block_shapes

CPU = torch.device("cpu")


def flops_of(kernels, kind) -> int:
    return sum(kernel.flops * kernel.count for kernel in kernels if kernel.kind is kind)


def test_the_kernels_of_a_block_are_all_its_products_and_what_is_between() -> None:
    _, tokens, width, _ = shape = block_shapes()[0]
    forward, backward = block_kernels(shape)
    assert flops_of(forward, KernelKind.MATMUL) == 2 * 12 * width**2 * tokens
    assert flops_of(backward, KernelKind.MATMUL) == 2 * flops_of(forward, KernelKind.MATMUL)
    assert flops_of(forward, KernelKind.ATTENTION) > 0
    assert {kernel.phase for kernel in backward} == {Phase.INPUT, Phase.WEIGHT}
    assert sum(kernel.count for kernel in forward if kernel.kind is KernelKind.MEMORY) >= 5


def test_a_block_is_timed_forward_and_backward_behind_the_others_beginning() -> None:
    begun = []
    seconds = block_seconds(block_shapes(quick=True)[0], CPU, window_s=1e-4, begin=lambda: begun.append(1))
    assert len(begun) == 1
    assert all(1e-6 < each < 30 for each in seconds)


def test_blocks_differ_in_what_bounds_them() -> None:
    shapes = block_shapes()
    shares = [shape.tokens / shape.width for shape in shapes]
    assert max(shares) / min(shares) > 4
    assert {shape.kind for shape in shapes} == {shape.kind for shape in block_shapes(quick=True)}
    assert set(block_shapes(quick=True)) < set(shapes)


def test_every_kind_of_block_has_its_products_counted() -> None:
    for shape in block_shapes(quick=True):
        forward, backward = block_kernels(shape)
        assert flops_of(backward, KernelKind.MATMUL) == 2 * flops_of(forward, KernelKind.MATMUL) > 0
        assert all(seconds > 0 for seconds in block_seconds(shape, CPU, window_s=1e-4))
