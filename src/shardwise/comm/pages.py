"""Pages of mapped memory that a process gives back, and takes again, without a copy.

What several processes map stays where it is when one of them drops its pages: the next read finds it again. Knows
addresses; refuses to know what lies there.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

__all__ = ["drop_pages", "map_pages"]

_DONT_NEED, _POPULATE_READ = 4, 22  # of madvise(2); the second since Linux 5.14, elsewhere pages come one by one
_PAGE = 4096
_LIBC: Final = ctypes.CDLL(None)


def drop_pages(shared: torch.Tensor) -> None:
    """This process does not need the pages that lie whole in a tensor of shared memory now; values stay."""
    _advise(shared, _DONT_NEED)


def map_pages(shared: torch.Tensor) -> None:
    """This process is about to read all of a tensor of shared memory."""
    _advise(shared, _POPULATE_READ)


def _advise(tensor: torch.Tensor, advice: int) -> None:
    first = -(-tensor.data_ptr() // _PAGE) * _PAGE
    num_bytes = (tensor.data_ptr() + tensor.nbytes) // _PAGE * _PAGE - first
    if num_bytes > 0:
        _LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), ctypes.c_int(advice))
