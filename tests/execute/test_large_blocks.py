"""Freed tensors of a rank with a large model leave no holes behind. In processes of their own: it cannot be undone."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from shardwise.execute.large_blocks import BLOCK_BYTES, LARGE_BYTES, give_back_large_blocks

# Blocks of 1 MiB, each followed by a small one that stays, are written and freed. Prints MiB still resident of them.
HOLES = f"""
import ctypes, sys
from pathlib import Path
from shardwise.execute.large_blocks import give_back_large_blocks, passing

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def left():
    libc.free(libc.malloc(16 << 20))  # glibc raises its bound to the largest block that was freed
    for _ in range(2000):
        libc.malloc(2000)  # into the holes that imports have left: those below are to lie between the blocks
    before, blocks = resident(), []
    for _ in range(64):
        blocks.append(libc.malloc(1 << 20))
        ctypes.memset(blocks[-1], 1, 1 << 20)
        libc.malloc(2000)
    for block in blocks:
        libc.free(block)
    return (resident() - before) >> 20

if sys.argv[1] == "passing":
    with passing():
        inside = left()
    print(inside, left())
else:
    assert give_back_large_blocks(int(sys.argv[1])) is (int(sys.argv[1]) >= {LARGE_BYTES})
    print(left())
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")


def printed(argument: object) -> list[int]:
    command = [sys.executable, "-c", HOLES, str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [int(number) for number in done.stdout.split()]


def left_resident(held_bytes: int) -> int:
    """MiB of 64."""
    return printed(held_bytes)[0]


def test_freed_blocks_of_a_large_rank_go_back_to_the_system() -> None:
    assert left_resident(LARGE_BYTES) < 4


def test_a_small_rank_keeps_glibcs_own_way_and_its_holes() -> None:
    assert left_resident(LARGE_BYTES - 1) > 32


def test_work_that_passes_leaves_no_holes_and_what_follows_uses_the_heap_again() -> None:
    inside, behind = printed("passing")
    assert inside < 4
    assert behind > 32


def test_a_small_rank_changes_nothing_in_its_process() -> None:
    assert give_back_large_blocks(BLOCK_BYTES) is False
