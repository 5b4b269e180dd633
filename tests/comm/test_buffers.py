"""Memory for messages is used again when nobody holds what came in it, and not before."""

from __future__ import annotations

import torch

from shardwise.comm.buffers import ReceiveBuffers


def test_a_tensor_that_was_let_go_gives_its_memory_to_the_next() -> None:
    buffers = ReceiveBuffers()
    address = buffers.take((2, 3), torch.float32).data_ptr()
    assert buffers.take((2, 3), torch.float32).data_ptr() == address


def test_two_that_are_held_at_once_have_memory_of_their_own() -> None:
    buffers = ReceiveBuffers()
    first, second = (buffers.take((4,), torch.float32) for _ in range(2))
    assert first.data_ptr() != second.data_ptr()


def test_a_view_keeps_the_memory() -> None:
    buffers = ReceiveBuffers()
    view = buffers.take((4,), torch.float32)[1:3]
    assert buffers.take((4,), torch.float32).data_ptr() != view.data_ptr() - 4


def test_an_array_keeps_the_memory() -> None:
    buffers = ReceiveBuffers()
    array = buffers.take((4,), torch.float32).numpy()
    assert buffers.take((4,), torch.float32).data_ptr() != array.ctypes.data


def test_a_graph_keeps_what_it_saved_until_its_backward() -> None:
    buffers = ReceiveBuffers()
    leaf = buffers.take((4,), torch.float32).fill_(2.0).requires_grad_()
    address = leaf.data_ptr()
    loss = leaf.square().sum()
    gradient_of = torch.autograd.graph.get_gradient_edge(leaf)
    del leaf
    other = buffers.take((4,), torch.float32).zero_()
    assert other.data_ptr() != address
    (gradient,) = torch.autograd.grad(loss, [gradient_of])
    assert gradient.tolist() == [4.0] * 4
    del loss, gradient_of
    assert buffers.take((4,), torch.float32).data_ptr() == address


def test_other_shapes_and_dtypes_have_buffers_of_their_own() -> None:
    buffers = ReceiveBuffers()
    shapes = [((4,), torch.float32), ((2, 2), torch.float32), ((4,), torch.int64)]
    taken = [buffers.take(shape, dtype) for shape, dtype in shapes]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in taken] == shapes


def test_what_a_step_did_not_use_is_not_kept() -> None:
    buffers = ReceiveBuffers()
    buffers.take((4,), torch.float32)
    buffers.end_step()
    buffers.take((8,), torch.float32)
    assert buffers.nbytes == 48
    buffers.end_step()
    assert buffers.nbytes == 32
