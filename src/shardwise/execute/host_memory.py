"""Where tensors wait that a device has no room for, and come back from.

    accelerator   pinned memory of the host, copied beside the work on a stream of its own
    CPU           a file without a name in the folder for temporary files: the process holds the bytes no more

A tensor is put away, asked for, and taken back once. Knows tensors and bytes; refuses to know what they are for.
"""

from __future__ import annotations

import os
import tempfile
from typing import Protocol

import torch

__all__ = ["Away", "HostMemory", "PinnedMemory", "ScratchFile", "host_memory"]


class Away(Protocol):
    """A tensor that waits elsewhere."""

    def bring(self) -> None:
        """Begin to bring it back, where that can be begun."""
        ...

    def tensor(self) -> torch.Tensor:
        """The tensor, with the values it had; asked for once."""
        ...


class HostMemory(Protocol):
    """Room for tensors."""

    def put(self, tensor: torch.Tensor) -> Away:
        """Keep the values of `tensor` as they are now; its own memory is free once nobody else holds it."""
        ...

    def close(self) -> None: ...


def host_memory(device: torch.device) -> HostMemory:
    """What there is for tensors of `device`."""
    return ScratchFile() if device.type == "cpu" else PinnedMemory(device)


class ScratchFile:
    """Room in a file that nobody else sees. What is taken back leaves room for what comes next."""

    def __init__(self, folder: str | None = None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        self._end = 0
        self._free: dict[int, list[int]] = {}  # bytes -> places
        self.written_bytes = 0

    def put(self, tensor: torch.Tensor) -> Away:
        dense, like = _dense(tensor)
        nbytes = dense.numel() * dense.element_size()
        room = self._free.get(nbytes)
        place = room.pop() if room else self._end
        if place == self._end:
            self._end += nbytes
        _write(self._file.fileno(), _bytes_of(dense), place)
        self.written_bytes += nbytes
        return _InFile(self, place, like)

    def read(self, place: int, like: torch.Tensor) -> torch.Tensor:
        """The bytes at `place` as a dense tensor like a (meta) tensor; they may be written over."""
        made = torch.empty_like(like, device="cpu")
        _read(self._file.fileno(), _bytes_of(_dense(made)[0]), place)
        self._free.setdefault(made.numel() * made.element_size(), []).append(place)
        return made

    def forget(self, place: int, nbytes: int) -> None:
        """Nobody will ask for it."""
        self._free.setdefault(nbytes, []).append(place)

    def close(self) -> None:
        self._file.close()


class _InFile:
    def __init__(self, file: ScratchFile, place: int, like: torch.Tensor) -> None:
        self._file, self._place, self._like = file, place, like
        self._there = True

    def bring(self) -> None:
        """Reading takes the processor itself: it is done when asked for."""

    def tensor(self) -> torch.Tensor:
        assert self._there, "a tensor is taken back once"
        self._there = False
        return self._file.read(self._place, self._like)

    def __del__(self) -> None:
        if self._there:  # a graph that was freed without a backward
            self._file.forget(self._place, self._like.numel() * self._like.element_size())


def _dense(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All elements in a row as they lie in memory, and a meta tensor that lies so."""
    own = tensor.detach()
    if not _is_dense(own):
        own = own.contiguous()
    like = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device="meta")
    return own.as_strided((own.numel(),), (1,), own.storage_offset()), like


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a stretch of memory, in whatever order of dims."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _bytes_of(dense: torch.Tensor) -> memoryview:
    return memoryview(dense.view(torch.uint8).numpy().data) if dense.numel() else memoryview(b"")


def _write(number: int, left: memoryview, place: int) -> None:
    while left:
        done = os.pwrite(number, left, place)
        left, place = left[done:], place + done


def _read(number: int, left: memoryview, place: int) -> None:
    while left:
        done = os.preadv(number, [left], place)
        if done == 0:
            raise OSError(f"a scratch file ends {len(left)} bytes early")
        left, place = left[done:], place + done


class PinnedMemory:
    """Pinned memory; copies run on one stream there and one back, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.there, self.back = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._free: dict[int, list[torch.Tensor]] = {}  # bytes -> blocks

    def put(self, tensor: torch.Tensor) -> Away:
        dense, like = _dense(tensor)
        nbytes = dense.numel() * dense.element_size()
        room = self._free.get(nbytes)
        block = room.pop() if room else torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.there.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self.there):
            block.copy_(dense.view(torch.uint8), non_blocking=True)
            dense.record_stream(self.there)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self.there)
        return _Pinned(self, block, arrived, like)

    def load(self, block: torch.Tensor, arrived: torch.cuda.Event) -> tuple[torch.Tensor, torch.cuda.Event]:
        """The block on the device, and when it is there."""
        made = torch.empty(block.shape, dtype=torch.uint8, device=self._device)
        self.back.wait_stream(torch.cuda.current_stream(self._device))  # who had its memory before is done
        self.back.wait_event(arrived)
        with torch.cuda.stream(self.back):
            made.copy_(block, non_blocking=True)
            made.record_stream(self.back)
            there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            there.record(self.back)
        return made, there

    def give_back(self, block: torch.Tensor) -> None:
        """The block may be written over by copies that are begun from now on, in the order of `there`."""
        self.there.wait_stream(self.back)
        self._free.setdefault(block.numel(), []).append(block)

    def close(self) -> None:
        self.there.synchronize()
        self.back.synchronize()
        self._free.clear()


class _Pinned:
    def __init__(
        self, memory: PinnedMemory, block: torch.Tensor, arrived: torch.cuda.Event, like: torch.Tensor
    ) -> None:
        self._memory, self._block, self._arrived, self._like = memory, block, arrived, like
        self._coming: tuple[torch.Tensor, torch.cuda.Event] | None = None

    def bring(self) -> None:
        if self._coming is None:
            self._coming = self._memory.load(self._block, self._arrived)

    def tensor(self) -> torch.Tensor:
        self.bring()
        assert self._coming is not None
        made, there = self._coming
        torch.cuda.current_stream(made.device).wait_event(there)
        made.record_stream(torch.cuda.current_stream(made.device))
        self._memory.give_back(self._block)
        self._coming = None
        return made.view(self._like.dtype).as_strided(self._like.shape, self._like.stride())
