"""Calls on ranks that another launcher started, as `RankPool` makes them on its own: rank 0 calls, the others serve.

    rank 0   call 0 ──► the store ──► rank 1, 2, 3: the same function, all at once
             results of all ◄── gathered over their process group

An error on a rank is raised there and ends all (`ending_together`). Refuses to know what is called.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import cloudpickle
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from shardwise.launch.context import RankContext

__all__ = ["LaunchedRanks"]

R = TypeVar("R")


class LaunchedRanks:
    """All ranks of a launcher, which have a default process group and have met in `store`."""

    def __init__(self, context: RankContext, store: Store) -> None:
        self._context = context
        self._store = store
        self._calls = itertools.count()

    @property
    def world_size(self) -> int:
        return self._context.world_size

    def run(self, function: Callable[..., R], *args: object, timeout_s: float | None = None) -> list[R]:
        """Calls `function(context, *args)` on every rank, from rank 0; the results in order of rank. How long a rank
        may take is what its process group was made with."""
        self._store.set(self._next(), cloudpickle.dumps((function, args)).hex())
        return self._together(function, args)

    def serve(self) -> None:
        """Take part in what rank 0 calls, until it closes. Every other rank calls it."""
        while True:
            key = self._next()
            told = pickle.loads(bytes.fromhex(bytes(self._store.get(key)).decode()))
            if told is None:
                return
            function, args = told
            self._together(function, args)

    def close(self) -> None:
        """The others are not needed any more."""
        self._store.set(self._next(), pickle.dumps(None).hex())

    def _next(self) -> str:
        return f"call {next(self._calls)}"

    def _together(self, function: Callable[..., R], args: tuple[object, ...]) -> list[R]:
        own = function(self._context, *args)
        gathered: list[Any] | None = [None] * self.world_size if self._context.rank == 0 else None
        dist.gather_object(own, gathered, dst=0)
        return cast(list[R], gathered or [])
