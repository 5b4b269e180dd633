"""MPI in this process: started once, and moved on by whoever waits and by one thread where nobody does.

    rank's own thread    starts requests, and looks whether they are done      one lock: MPI is called by one thread
    progress thread      the same, while something is under way                at a time (MPI_THREAD_SERIALIZED)

MPI moves a large message only inside its calls. A rank that computes, or waits for shared memory, would keep its peers
waiting, for ever where they wait in a circle; so there is a thread that calls it. It sleeps between calls, longer the
longer nothing has moved. Refuses to know tensors and process groups.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from torch._C._distributed_c10d import Store

from shardwise.errors import LaunchError

__all__ = ["MpiWorld", "UnderWay", "mpi_world"]

READY, GO, ASK, ANSWER = 1, 2, 3, 4  # tags of what ranks tell each other before groups are made, and of the store

_LOOKS = 300  # before a rank that has a core of its own sleeps
_SHORTEST_S, _LONGEST_S = 5e-5, 1e-3  # of sleeps while something is under way
_IDLE_S = 2e-2  # while nothing is, and somebody may ask


class UnderWay:
    """One request of MPI, and what it reads or writes meanwhile."""

    __slots__ = ("done", "error", "kept", "request", "status")

    def __init__(self, request: Any, status: Any, kept: object) -> None:
        self.request = request
        self.status = status
        self.kept = kept
        self.done = False
        self.error: RuntimeError | None = None

    def test(self) -> bool:
        """Whether it is done, perhaps with an error; called with the lock of the world."""
        if not self.done:
            try:
                self.done = bool(self.request.Test(self.status))
            except RuntimeError as error:  # MPI tells it once, to whoever looks
                self.done, self.error = True, error
            if self.done:
                self.kept = None
        return self.done


class MpiWorld:
    """All processes that one `mpirun` has started. `mpi` is the module of mpi4py, `comm` ours alone."""

    def __init__(self, mpi: Any) -> None:
        self.mpi: Final = mpi
        self.comm: Final = mpi.COMM_WORLD.Dup()
        self.rank: Final = int(self.comm.Get_rank())
        self.size: Final = int(self.comm.Get_size())
        on_host = self.comm.Split_type(mpi.COMM_TYPE_SHARED)
        cores = set().union(*on_host.allgather(os.sched_getaffinity(0)))  # mpirun binds each rank to one
        self._looks = _LOOKS if on_host.Get_size() <= len(cores) else 2
        on_host.Free()
        self.lock: Final = threading.Lock()
        self._under_way: list[UnderWay] = []
        self._serve: Callable[[], bool] | None = None
        self._wake = threading.Event()
        self._sleeps = False
        self._ends = False
        self._failed = False
        self._thread = threading.Thread(target=self._progress, name="shardwise-mpi", daemon=True)
        self._thread.start()
        atexit.register(self._finalise)

    def start(self, make: Callable[[], Any], kept: object) -> UnderWay:
        """A request that `make` starts; `kept` lives until it is done, whether it is waited for or not."""
        with self.lock:
            made = UnderWay(make(), self.mpi.Status(), kept)
            if not made.test():
                self._under_way.append(made)
        if self._sleeps and not made.done:
            self._wake.set()
        return made

    def wait(self, each: UnderWay, *, timeout_s: float, what: str) -> None:
        """Until it is done. RuntimeError after `timeout_s`, or where MPI reports one."""
        if not each.done:
            self.wait_until(each.test, timeout_s=timeout_s, what=what)
        if each.error is not None:
            raise RuntimeError(f"{what}: {each.error}") from each.error

    def wait_until(self, is_done: Callable[[], bool], *, timeout_s: float, what: str) -> None:
        """Until `is_done`, which is called with the lock and may call MPI without waiting."""
        limit, pause_s = 0.0, _SHORTEST_S
        for turn in itertools.count():
            with self.lock:
                if is_done():
                    return
            if turn < self._looks:
                os.sched_yield()
                continue
            now = time.monotonic()
            limit = limit or now + timeout_s
            if now >= limit:
                raise RuntimeError(f"{what} took longer than {timeout_s:g} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_S)

    def serve(self, serve: Callable[[], bool]) -> None:
        """From now on the progress thread calls `serve` with the lock; it answers whether anything was to be done."""
        self._serve = serve
        self._wake.set()

    def communicator(self, store: Store, *, rank: int, size: int, timeout_s: float, tag: int) -> Any:
        """That of a group of processes, of which this one is `rank` of `size`. Its members call it, in the order in
        which they make groups; `store` is theirs alone.

        MPI makes one while all its members are inside one call, in which nobody answers questions of a store: so they
        go in when none of them asks any more.
        """
        store.set(f"mpi/{rank}", str(self.rank))
        ranks = [int(store.get(f"mpi/{each}")) for each in range(size)]
        self._ready(ranks, rank, timeout_s)
        with self.lock:
            everybody = self.comm.Get_group()
            members = everybody.Incl(ranks)
            made = self.comm.Create_group(members, tag=tag)
            members.Free()
            everybody.Free()
        return made

    def _ready(self, ranks: Sequence[int], rank: int, timeout_s: float) -> None:
        """The first member hears of all others that they are ready, and tells them to go on."""
        told = [(self._receive, each, READY) for each in ranks[1:]] + [(self._send, each, GO) for each in ranks[1:]]
        if rank > 0:
            told = [(self._send, ranks[0], READY), (self._receive, ranks[0], GO)]
        for tell, peer, tag in told:
            self.wait(tell(peer, tag), timeout_s=timeout_s, what=f"making a group of ranks {list(ranks)}")

    def _send(self, peer: int, tag: int) -> UnderWay:
        return self.start(lambda: self.comm.Isend([None, 0, self.mpi.BYTE], peer, tag), None)

    def _receive(self, peer: int, tag: int) -> UnderWay:
        return self.start(lambda: self.comm.Irecv([None, 0, self.mpi.BYTE], peer, tag), None)

    def fail(self) -> None:
        """This process ends because of an error: MPI is not ended in order, which would wait for everybody, and the
        launcher ends the others."""
        self._failed = True

    def _progress(self) -> None:
        pause_s = _SHORTEST_S
        while not self._ends:
            if not self._under_way and self._serve is None:
                self._sleeps = True
                if not self._under_way and self._serve is None and not self._ends:  # whoever came before saw no sleeper
                    self._wake.wait()
                self._wake.clear()
                self._sleeps = False
                continue
            with self.lock:
                before = len(self._under_way)
                moved = self._serve is not None and self._serve()
                self._under_way = [each for each in self._under_way if not each.test()]
            moved = moved or len(self._under_way) < before
            longest_s = _LONGEST_S if self._under_way else _IDLE_S
            pause_s = _SHORTEST_S if moved else min(2 * pause_s, longest_s)
            time.sleep(pause_s)

    def _finalise(self) -> None:
        """At the end of the process: in order, but for an error."""
        failed = self._failed or getattr(sys, "last_value", None) is not None
        if not failed:  # questions of others are answered until everybody is here
            leaving = self.start(lambda: self.comm.Ibarrier(), None)
            self.wait(leaving, timeout_s=float("inf"), what="the end")
        self._ends = True
        self._wake.set()
        self._thread.join()
        if not failed and not self.mpi.Is_finalized():
            self.mpi.Finalize()


@functools.cache
def mpi_world() -> MpiWorld:
    """The one of this process; the first call starts MPI, and every process of the job makes it.

    What MPI is to be told by the environment is set before. Raises `LaunchError` where there is no mpi4py or no MPI.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f'MPI is reached through mpi4py, which cannot be imported: {error}; pip install "shardwise[mpi]", beside '
            "an MPI of the system (Debian: openmpi-bin libopenmpi-dev)"
        ) from error
    given = MPI.Query_thread() if MPI.Is_initialized() else MPI.Init_thread(MPI.THREAD_SERIALIZED)
    if given < MPI.THREAD_SERIALIZED:
        raise LaunchError(
            f"MPI is called from two threads, one at a time, but this one allows level {given} of "
            f"{MPI.THREAD_SERIALIZED}; start it with MPI_THREAD_SERIALIZED, or do not initialise it before shardwise"
        )
    return MpiWorld(MPI)
