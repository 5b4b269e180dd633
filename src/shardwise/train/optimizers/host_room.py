"""Room on the host for what an optimizer remembers: pinned memory of an accelerator's host, or a mapped file.

    accelerator   the moments lie in pinned memory, values and gradients visit it
    CPU           the moments lie in files without names that are mapped: between updates no page of them is in memory
                  that the process holds (the system may keep them as long as it has room)

Knows tensors and pages; no optimizer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import torch

__all__ = ["Room"]

_DONTNEED = 4  # <sys/mman.h>


class Room:
    """Makes tensors of zeros on the host of `device`."""

    def __init__(self, device: torch.device) -> None:
        self._mapped = device.type == "cpu"
        self._libc = ctypes.CDLL(None, use_errno=True) if self._mapped else None

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) of zeros."""
        if not self._mapped:
            return torch.zeros(numel, dtype=dtype, pin_memory=True)
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        number, path = tempfile.mkstemp(prefix="shardwise-")
        try:
            os.ftruncate(number, numel * dtype.itemsize)
            return torch.from_file(path, shared=True, size=numel, dtype=dtype)
        finally:
            os.close(number)
            os.unlink(path)

    def leave(self, tensor: torch.Tensor) -> None:
        """The process holds the pages of `tensor`, made here, no more; they come back from the file when read."""
        if self._libc is None or tensor.numel() == 0:
            return
        nbytes = -(-tensor.untyped_storage().nbytes() // mmap.PAGESIZE) * mmap.PAGESIZE
        self._libc.madvise(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(nbytes), _DONTNEED)
