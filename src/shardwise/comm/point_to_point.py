"""Tensors between two ranks, asynchronously and in order. Knows what crosses an edge, not why.

Tensors that broadcast (stride 0) travel compactly and are spread out again; with `headers` every tensor is preceded
by what it claims to be, so that a mismatch is an error that names the edge and not a crash in the transport.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from shardwise.comm.buffers import ReceiveBuffers
from shardwise.errors import TransferError

__all__ = ["Expected", "Incoming", "Outgoing", "Transport", "Waitable", "receive", "send"]

_HEADER_LENGTH = 16
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Waitable(Protocol):
    """Something that is under way."""

    def wait(self) -> object: ...


class Transport(Protocol):
    """Moves contiguous tensors between ranks; sends and receives of a pair match in order."""

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable: ...

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable: ...


@dataclasses.dataclass(frozen=True, slots=True)
class ProcessGroupTransport:
    """torch.distributed's own point-to-point calls on the default group."""

    def isend(self, tensor: torch.Tensor, peer: int) -> Waitable:
        work = dist.isend(tensor, peer)
        assert work is not None
        return work

    def irecv(self, tensor: torch.Tensor, peer: int) -> Waitable:
        work = dist.irecv(tensor, peer)
        assert work is not None
        return work


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What an edge promises: the same on both sides, because both derive it from the same trace."""

    what: str  # names the edge in errors
    check: int  # a number that both sides must have computed alike
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    compact_shape: tuple[int, ...] = dataclasses.field(init=False)  # every broadcast dim (stride 0) narrowed to 1

    def __post_init__(self) -> None:
        dims = zip(self.shape, self.strides, strict=True)
        object.__setattr__(
            self, "compact_shape", tuple(1 if stride == 0 and size > 1 else size for size, stride in dims)
        )


@dataclasses.dataclass(slots=True)
class Outgoing:
    """A send under way; keeps its tensors alive until it is done."""

    works: Sequence[Waitable]
    tensors: Sequence[torch.Tensor]
    what: str
    peer: int

    def wait(self) -> None:
        """Until the tensors may be reused. Raises `TransferError` if the peer is gone."""
        try:
            for work in self.works:
                work.wait()
        except RuntimeError as error:
            raise _failed(f"sending {self.what} to rank {self.peer}", error) from error


@dataclasses.dataclass(slots=True)
class Incoming:
    """A receive under way."""

    works: Sequence[Waitable]
    buffer: torch.Tensor
    header: torch.Tensor | None
    expected: Expected
    peer: int

    def wait(self) -> torch.Tensor:
        """The tensor, in its full shape. Raises `TransferError` if something else arrived or the peer is gone."""
        if self.header is not None:
            try:
                self.works[0].wait()
            except RuntimeError as error:
                raise _failed(f"waiting for {self.expected.what} from rank {self.peer}", error) from error
            claimed = self.header.tolist()
            promised = _header(self.expected).tolist()
            if claimed != promised:
                raise TransferError(
                    f"rank {self.peer} sends what this rank expects, but for {self.expected.what} it sent "
                    f"{_read(claimed)} where {_read(promised)} was expected; all ranks must run the same code on the "
                    "same batch"
                )
        # gloo: a second wait for one receive waits for another message, so the header's is not waited for again
        try:
            self.works[-1].wait()
        except RuntimeError as error:
            raise _failed(f"waiting for {self.expected.what} from rank {self.peer}", error) from error
        if self.expected.compact_shape == self.expected.shape:
            return self.buffer
        return self.buffer.expand(self.expected.shape)


def send(transport: Transport, tensor: torch.Tensor, expected: Expected, peer: int, *, headers: bool) -> Outgoing:
    """Start sending `tensor`; it must not be written until the result has been waited for."""
    compact = _compacted(tensor.detach(), expected).contiguous()
    works: list[Waitable] = []
    tensors = [compact]
    if headers:
        header = _header(expected).to(compact.device)
        tensors.append(header)
        works.append(transport.isend(header, peer))
    works.append(transport.isend(compact, peer))
    return Outgoing(works, tensors, expected.what, peer)


def receive(
    transport: Transport,
    expected: Expected,
    peer: int,
    *,
    device: torch.device,
    headers: bool,
    buffers: ReceiveBuffers | None = None,
) -> Incoming:
    """Post a receive of what `expected` says, into memory of `buffers` or its own."""
    works: list[Waitable] = []
    header = None
    if headers:
        header = torch.zeros(_HEADER_LENGTH, dtype=torch.int64, device=device)
        works.append(transport.irecv(header, peer))
    if buffers is None:
        buffer = torch.empty(expected.compact_shape, dtype=expected.dtype, device=device)
    else:
        buffer = buffers.take(expected.compact_shape, expected.dtype)
    works.append(transport.irecv(buffer, peer))
    return Incoming(works, buffer, header, expected, peer)


def _compacted(tensor: torch.Tensor, expected: Expected) -> torch.Tensor:
    """The tensor with every dim along which it is repeated narrowed to 1."""
    if expected.compact_shape == expected.shape:
        return tensor
    for dim, (narrow, size) in enumerate(zip(expected.compact_shape, expected.shape, strict=True)):
        if narrow != size:
            if tensor.stride(dim) != 0:
                raise TransferError(
                    f"{expected.what} was traced as repeated along dim {dim} and is not: its strides are not "
                    "determined by the signature; make it contiguous in the model"
                )
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _header(expected: Expected) -> torch.Tensor:
    numbers = [expected.check, _DTYPES.index(expected.dtype), len(expected.shape), *expected.compact_shape]
    return torch.tensor([*numbers, *([0] * (_HEADER_LENGTH - len(numbers)))], dtype=torch.int64)


def _read(header: Sequence[int]) -> str:
    known = 0 <= header[1] < len(_DTYPES)
    dtype = str(_DTYPES[header[1]]).removeprefix("torch.") if known else f"dtype {header[1]}"
    return f"{dtype} {tuple(header[3 : 3 + header[2]])} (check {header[0] % 100000})"


def _failed(doing: str, error: RuntimeError) -> TransferError:
    return TransferError(f"{doing} failed: {str(error).splitlines()[0]}; the rank is gone or too slow")
