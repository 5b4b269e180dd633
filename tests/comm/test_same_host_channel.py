"""Two ends of a channel in one process: order, floods, what is expected against what arrives, and what is left."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import torch

from shardwise.comm.same_host_channel import INLINE_BYTES, Channel, Receipt
from shardwise.comm.segments import SEGMENT_BYTES, Outbox

SIZES = [0, 1, INLINE_BYTES, INLINE_BYTES + 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 8 << 20]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    left, right = (Channel(end, peer, timeout_s=5.0) for end, peer in zip(socket.socketpair(), (1, 0), strict=True))
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def narrow() -> Iterator[tuple[Channel, Channel]]:
    """Sockets that hold a few messages."""
    sockets = socket.socketpair()
    left, right = (Channel(end, peer, timeout_s=5.0) for end, peer in zip(sockets, (1, 0), strict=True))
    for end in sockets:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
    yield left, right
    left.close()
    right.close()


def random_bytes(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8)


def send(channel: Channel, tensor: torch.Tensor) -> None:
    channel.send(tensor.data_ptr(), tensor.nbytes)


def post(channel: Channel, size: int) -> tuple[torch.Tensor, Receipt]:
    tensor = torch.zeros(size, dtype=torch.uint8)
    receipt = Receipt(tensor.data_ptr(), size, tensor)
    channel.post(receipt)
    return tensor, receipt


def pump(*channels: Channel) -> None:
    """Until nothing moves any more."""
    moved = True
    while moved:
        moved = False
        for channel in channels:
            before = channel.written
            channel.flush()
            moved |= channel.read(wait=False) or channel.written > before


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("posted_first", [True, False])
def test_a_message_arrives_whenever_its_receipt_is_posted(
    ends: tuple[Channel, Channel], size: int, posted_first: bool
) -> None:
    left, right = ends
    message = random_bytes(size)
    if posted_first:
        tensor, receipt = post(right, size)
        send(left, message)
        pump(left, right)
    else:
        send(left, message)
        pump(left, right)
        tensor, receipt = post(right, size)
    assert receipt.done
    assert torch.equal(tensor, message)


def test_a_sent_tensor_may_be_written_again_at_once(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    message = torch.ones(100_000, dtype=torch.uint8)
    send(left, message)
    message.zero_()
    tensor, _ = post(right, 100_000)
    pump(left, right)
    assert tensor.all()


def test_messages_of_all_sizes_stay_in_order_both_ways(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    sizes = [SIZES[i % 6] for i in range(40)]
    there, back = [random_bytes(size) for size in sizes], [random_bytes(size) for size in reversed(sizes)]
    for one, other in zip(there, back, strict=True):
        send(left, one)
        send(right, other)
    pump(left, right)
    arrived = [
        (post(right, one.numel())[0], post(left, other.numel())[0]) for one, other in zip(there, back, strict=True)
    ]
    for one, other, (at_right, at_left) in zip(there, back, arrived, strict=True):
        assert torch.equal(at_right, one)
        assert torch.equal(at_left, other)


def test_a_flood_does_not_stop_the_writer_and_arrives_later(narrow: tuple[Channel, Channel]) -> None:
    left, right = narrow
    sizes = [(10, INLINE_BYTES, INLINE_BYTES + 1, 0, SEGMENT_BYTES + 1)[i % 5] for i in range(100)]
    messages = [random_bytes(size) for size in sizes]
    for message in messages:
        send(left, message)
    assert left.written < left.posted
    receipts = [post(right, size) for size in sizes]
    pump(left, right)
    assert left.written == left.posted
    assert all(receipt.done and torch.equal(tensor, m) for (tensor, receipt), m in zip(receipts, messages, strict=True))


def test_what_the_socket_did_not_take_goes_with_the_next_message(narrow: tuple[Channel, Channel]) -> None:
    left, right = narrow
    messages = [random_bytes(INLINE_BYTES) for _ in range(20)]
    for message in messages:
        send(left, message)
    assert left.has_unwritten
    receipts = [post(right, INLINE_BYTES) for _ in messages]
    while right.read(wait=False):
        pass
    before = left.written
    send(left, random_bytes(1))  # nobody waits, and the peer is to go on
    assert left.written > before
    pump(left, right)
    assert all(receipt.done and torch.equal(tensor, m) for (tensor, receipt), m in zip(receipts, messages, strict=True))


def test_a_socket_takes_hundreds_of_messages_that_nobody_reads(ends: tuple[Channel, Channel]) -> None:
    left, _ = ends
    for _ in range(250):
        send(left, random_bytes(INLINE_BYTES))
    assert left.written == left.posted


@pytest.mark.parametrize("sent, expected", [(100, 101), (100_001, 100), (100, 3 << 20), (3 << 20, 2 << 20)])
def test_another_size_is_an_error_with_both_numbers_and_the_next_message_is_whole(
    ends: tuple[Channel, Channel], sent: int, expected: int
) -> None:
    left, right = ends
    send(left, random_bytes(sent))
    following = random_bytes(10)
    send(left, following)
    tensor, receipt = post(right, expected)
    after, _ = post(right, 10)
    pump(left, right)
    assert receipt.error == f"a message of {sent} bytes arrived where {expected} bytes were expected"
    assert not tensor.any()
    assert torch.equal(after, following)


def test_what_was_sent_before_the_peer_closed_arrives(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    small, large = random_bytes(10), random_bytes(2 << 20)
    send(left, small)
    send(left, large)
    left.close()
    receipts = [post(right, 10), post(right, 2 << 20)]
    while not right.closed_by_peer:
        assert right.read(wait=True)
    assert torch.equal(receipts[0][0], small)
    assert torch.equal(receipts[1][0], large)
    assert right.send(small.data_ptr(), 10) > right.written  # never taken, and no exception here


def test_a_read_that_waits_gives_up_after_the_timeout() -> None:
    first, second = socket.socketpair()
    channel = Channel(first, 1, timeout_s=0.05)
    assert channel.read(wait=True) is False
    channel.close()
    second.close()


def test_segments_are_used_again(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    for _ in range(100):
        send(left, random_bytes(20_000))
        post(right, 20_000)
        pump(left, right)
    assert number_of_mapped_segments() <= 2 * 10


def test_surplus_segments_go_back_to_the_system(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    for _ in range(100):
        send(left, random_bytes(20_000))
    assert number_of_mapped_segments() >= 100
    pump(left, right)
    for _ in range(100):
        post(right, 20_000)
    pump(left, right)
    assert number_of_mapped_segments() <= 2 * 41


def test_nothing_is_left_after_closing() -> None:
    before = (len(os.listdir("/proc/self/fd")), number_of_mapped_segments())
    for _ in range(3):
        left, right = (Channel(end, 0, timeout_s=5.0) for end in socket.socketpair())
        for _ in range(300):  # descriptors in the queue, in the socket, and received
            send(left, random_bytes(20_000))
        right.read(wait=False)
        left.close()
        right.close()
    assert (len(os.listdir("/proc/self/fd")), number_of_mapped_segments()) == before


def test_an_outbox_fills_the_segment_that_was_freed_last() -> None:
    outbox = Outbox()
    for _ in range(3):
        os.close(outbox.make()[1])
    message = random_bytes(10)
    used = [outbox.fill(message.data_ptr(), 10) for _ in range(3)]
    assert not outbox.has_free
    outbox.release(used[1])
    outbox.release(used[0])
    assert outbox.fill(message.data_ptr(), 10) == used[0]
    assert outbox.drop() == used[1]


def number_of_mapped_segments() -> int:
    with open("/proc/self/maps") as maps:
        return sum("memfd:shardwise" in line for line in maps)
