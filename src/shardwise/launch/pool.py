"""Warm ranks: started once, called many times, their process group alive between calls.

It starts, calls, times and ends ranks. It knows no layout, no model and no collective.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast
from uuid import uuid4

from shardwise.errors import LaunchError
from shardwise.launch.collect import OnMessage, collect
from shardwise.launch.environment import asked_threads
from shardwise.launch.outcome import Failure, Outcome, Success, failure_of_call
from shardwise.launch.payload import pack
from shardwise.launch.rank import Call, Start
from shardwise.launch.starter import RankProcess, RankStarter
from shardwise.launch.surroundings import surroundings_here

__all__ = ["RankPool"]

R = TypeVar("R")

_START_S = 120.0  # for forked ranks to meet
_END_S = 2.0


class RankPool:
    """`world_size` ranks on this machine that wait for calls.

    process_group_timeout_s  a gloo process group of all ranks is made when they start, with this bound on
                             each operation; None leaves it to the function (`init_process_group(context)`)
    num_threads              torch threads of a rank; None: OMP_NUM_THREADS, or this machine's cores are shared
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
        cores = len(os.sched_getaffinity(0))
        self._num_threads = num_threads or asked_threads() or max(1, cores // world_size)
        self._owns_starter = starter is None
        self._starter = starter or RankStarter(preload=preload)
        self._ranks: list[RankProcess] = []

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
        """Ends the ranks."""
        self._end_ranks(at_once=False)
        if self._owns_starter:
            self._starter.close()

    def run(
        self,
        function: Callable[..., R],
        *args: object,
        timeout_s: float | None = None,
        on_message: OnMessage | None = None,
    ) -> list[R]:
        """Calls `function(context, *args)` on every rank and returns the results in order of rank.

        context     a RankContext; what ranks give to `context.post` reaches `on_message(rank, value)` here
        timeout_s   deadline of the call; starting the ranks has its own

        An exception on a rank is raised here as itself, with the tracebacks of all ranks in its `__cause__`.
        LaunchError where a rank died, where the deadline passed (it says where each rank stood), and where
        function, arguments or results cannot travel. After any of them the ranks have been ended.
        """
        self.start()
        try:
            outcomes = self._call_everywhere(Call(function=function, args=args), timeout_s, on_message)
        except BaseException:
            self._end_ranks(at_once=True)
            raise
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if failures:
            self._end_ranks(at_once=True)
            raise failure_of_call(failures, world_size=self.world_size)
        by_rank = sorted(cast(list[Success], outcomes), key=lambda success: success.rank)
        return [cast(R, success.value) for success in by_rank]

    def _call_everywhere(self, call: Call, timeout_s: float | None, on_message: OnMessage | None) -> list[Outcome]:
        surroundings, packed = pack(surroundings_here()), pack(call)
        try:
            for process in self._ranks:
                with suppress(BrokenPipeError):  # it died while idle; `collect` says how
                    process.channel.send("call", (surroundings, packed))
        finally:
            os.close(surroundings)
            os.close(packed)
        return collect(self._ranks, self._starter, timeout_s=timeout_s, on_message=on_message)

    def start(self) -> None:
        """Starts the ranks, unless they run: what the first call does by itself."""
        if self._ranks:
            return
        meeting = Path(self._starter.folder) / f"meeting-{uuid4().hex}"
        try:
            for rank in range(self.world_size):
                process = self._starter.start_rank(rank)
                self._ranks.append(process)
                start = Start(
                    rank=rank,
                    world_size=self.world_size,
                    rendezvous=meeting.as_uri(),
                    num_threads=self._num_threads,
                    process_group_timeout_s=self._process_group_timeout_s,
                )
                process.channel.send_values("start", surroundings_here(), start)
            outcomes = collect(self._ranks, self._starter, timeout_s=_START_S)
        except BaseException:
            self._end_ranks(at_once=True)
            raise
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        if failures:
            self._end_ranks(at_once=True)
            raise failure_of_call(failures, world_size=self.world_size)

    def _end_ranks(self, *, at_once: bool) -> None:
        """Ranks that wait for a call end when their channel closes; others are killed."""
        ranks, self._ranks = self._ranks, []
        for process in ranks:
            process.channel.close()
        with suppress(LaunchError):  # the starter is gone, and with it the ranks
            if at_once or not self._ended(ranks):
                for process in ranks:
                    self._starter.signal_rank(process.pid, signal.SIGKILL)
                self._ended(ranks)

    def _ended(self, ranks: Sequence[RankProcess]) -> bool:
        limit = time.monotonic() + _END_S
        while time.monotonic() < limit:
            self._starter.poll()
            if all(process.pid in self._starter.exit_codes for process in ranks):
                return True
            time.sleep(0.002)
        return False
