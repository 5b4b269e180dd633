"""Warm ranks: started once, called many times, their process group alive between calls.

It starts, calls, times and ends ranks. It knows no layout, no model and no collective.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

from shardwise.errors import LaunchError
from shardwise.launch.channel import Channel, Message
from shardwise.launch.outcome import Failure, Outcome, Success, failure_of_call
from shardwise.launch.payload import pack
from shardwise.launch.rank import Call, Start, stack_file
from shardwise.launch.starter import RankProcess, RankStarter, describe_exit
from shardwise.launch.surroundings import surroundings_here

__all__ = ["RankPool"]

R = TypeVar("R")

_GRACE_S = 1.0  # how long the others may still report after the first failure
_STACKS_S = 0.5  # how long stuck ranks get to write down where they stand


class RankPool:
    """`world_size` ranks on this machine that wait for calls.

    process_group_timeout_s  a gloo process group of all ranks is made when they start, with this bound on each
                             operation; None leaves it to the function (`init_process_group(context)`)
    num_threads              torch threads of a rank; None shares this machine's cores
    starter                  to share between pools; else one is made and ended with the pool
    preload                  modules imported once, before the ranks are forked (without a `starter`)

    Ranks start with the first call, live until `close`, and are started anew for the call after a failed one.
    They end without running `atexit` handlers. Use from one thread, with `with`.
    """

    def __init__(
        self,
        world_size: int,
        *,
        process_group_timeout_s: float | None = 60.0,
        num_threads: int | None = None,
        starter: RankStarter | None = None,
        preload: Sequence[str] = (),
    ) -> None:
        if world_size < 1:
            raise LaunchError(f"world_size={world_size} must be at least 1")
        self.world_size = world_size
        self._process_group_timeout_s = process_group_timeout_s
        self._num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // world_size)
        self._owns_starter = starter is None
        self._starter = starter or RankStarter(preload=preload)
        self._ranks: list[RankProcess] = []
        self._generation = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids in order of rank; empty when no ranks run."""
        return tuple(process.pid for process in self._ranks)

    def close(self) -> None:
        """Ends the ranks at once."""
        self._end_ranks()
        if self._owns_starter:
            self._starter.close()

    def run(
        self,
        function: Callable[..., R],
        *args: object,
        timeout_s: float | None = None,
        on_message: Callable[[int, object], None] | None = None,
    ) -> list[R]:
        """Calls `function(context, *args)` on every rank and returns the results in order of rank.

        context     a RankContext; what ranks give to `context.post` reaches `on_message(rank, value)` here
        timeout_s   deadline of the whole call

        An exception on a rank is raised here as itself, with the tracebacks of all ranks in its `__cause__`.
        LaunchError where a rank died, where the deadline passed (it says where each rank stood), and where
        function, arguments or results cannot travel. After any of them the ranks have been ended.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            if not self._ranks:
                self._start_ranks(deadline)
            call = pack(Call(function=function, args=args))
            outcomes = self._everywhere("call", call, deadline=deadline, on_message=on_message)
        except BaseException:
            self._end_ranks()
            raise
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if failures:
            self._end_ranks()
            raise failure_of_call(failures, world_size=self.world_size)
        by_rank = sorted(cast(list[Success], outcomes), key=lambda success: success.rank)
        return [cast(R, success.value) for success in by_rank]
