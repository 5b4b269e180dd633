"""Ranks of a small process group, forked from this process: everything that is known here is known there at once.

    worker ──fork──► rank 0 ──gloo──► rank 1        each answers one line of JSON; the worker waits, with a deadline

Knows processes and pipes, no models. What a rank changes in its model stays in the rank.
"""

from __future__ import annotations

import datetime
import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["RankError", "on_forked_ranks"]


class RankError(Exception):
    """A rank raised, died or gave no answer in time; the message is the first that came."""


def on_forked_ranks(size: int, work: Callable[[dist.ProcessGroup], Any], *, seconds: float) -> list[Any]:
    """`work(group)` on `size` forked ranks that are one gloo group; what they return (JSON), in order.

    Raises `RankError` with what the first rank raised, or after `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        pipes: dict[int, int] = {}  # rank -> where its answer is read
        children: list[int] = []
        try:
            for rank in range(size):
                reading, writing = os.pipe()
                child = os.fork()
                if child == 0:
                    os.close(reading)
                    _live(rank, size, work, writing, Path(folder) / "store", seconds)
                os.close(writing)
                children.append(child)
                pipes[rank] = reading
            return _answers(pipes, time.monotonic() + seconds, seconds)
        finally:
            for child in children:
                os.kill(child, signal.SIGKILL)  # not waited for yet, so it is still ours
                os.waitpid(child, 0)
            for pipe in pipes.values():
                os.close(pipe)


def _live(
    rank: int, size: int, work: Callable[[dist.ProcessGroup], Any], pipe: int, store: Path, seconds: float
) -> None:
    """A rank from its first to its last breath; never returns."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        try:
            timeout = datetime.timedelta(seconds=seconds)
            dist.init_process_group("gloo", f"file://{store}", timeout, size, rank)
            group = dist.group.WORLD
            assert group is not None
            answer: dict[str, Any] = {"value": work(group)}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        with os.fdopen(pipe, "w") as file:
            file.write(json.dumps(answer) + "\n")
        time.sleep(seconds)  # killed by the parent: a group that is left while others still use it is an error there
    finally:
        os._exit(1)


def _answers(pipes: dict[int, int], deadline: float, seconds: float) -> list[Any]:
    texts = dict.fromkeys(pipes, b"")
    waiting = {pipe: rank for rank, pipe in pipes.items()}
    while waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"no answer of rank {min(waiting.values())} within {seconds:.0f} s")
        for pipe in ready:
            rank = waiting[pipe]
            piece = os.read(pipe, 1 << 16)
            texts[rank] += piece
            if not piece:
                raise RankError(f"rank {rank} died")
            if texts[rank].endswith(b"\n"):
                answer = json.loads(texts[rank])
                if "error" in answer:
                    raise RankError(answer["error"])
                del waiting[pipe]
    return [json.loads(texts[rank])["value"] for rank in sorted(pipes)]
