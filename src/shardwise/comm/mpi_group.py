"""A process group of torch.distributed whose every operation is one of MPI: no socket is opened, no store is asked.

    all_reduce      MPI_Iallreduce                     broadcast   MPI_Ibcast          send, recv   MPI_Isend, MPI_Irecv
    all_gather      MPI_Iallgather                     barrier     MPI_Ibarrier        all_to_all   MPI_Ialltoallv
    reduce_scatter  MPI_Ialltoall, then each rank adds its own part in the order of the ranks

All begin at once and are moved on by `mpi_world`; what is left to do in this rank's memory (a mean, a copy into a
tensor with gaps) is done by whoever waits. Ranks call collectives of a group in one order. Refuses to know what is
exchanged.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from shardwise.comm.mpi_types import MpiTypes, memory_of, name_of
from shardwise.comm.mpi_work import Begun, MpiWork, back, combine, dense_of, fits, into, mean_of, starts
from shardwise.comm.mpi_world import MpiWorld, UnderWay

__all__ = ["MpiGroup"]


class Options:
    """What torch and its users look up in a backend."""

    def __init__(self, timeout: timedelta) -> None:
        self._timeout = timeout


class MpiGroup(dist.ProcessGroup):
    """The ranks of one communicator of MPI."""

    def __init__(
        self, world: MpiWorld, communicator: Any, *, timeout: timedelta, name: str, types: MpiTypes, shares_memory: bool
    ) -> None:
        """`shares_memory`: whether shardwise may go around MPI where ranks of a host share memory."""
        super().__init__(communicator.Get_rank(), communicator.Get_size())  # type: ignore[call-arg]
        self._world: Final = world
        self._mpi: Final = world.mpi
        self._comm: Final = communicator
        self._types: Final = types
        self._own: Final = int(communicator.Get_rank())
        self._ranks: Final = int(communicator.Get_size())
        self._name = name
        self._open = True
        self.options = Options(timeout)
        self.shares_memory: Final = shares_memory

    def getBackendName(self) -> str:  # noqa: N802  # torch's
        return "mpi"

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._name

    def _get_backend(self, device: torch.device) -> MpiGroup:  # type: ignore[override]
        return self

    def shutdown(self) -> None:
        """Let go of the communicator."""
        if self._open:
            self._open = False
            with self._world.lock, contextlib.suppress(RuntimeError):
                self._comm.Free()

    def wait_for(self, each: UnderWay, what: str, timeout_s: float) -> None:
        """Until one request is done."""
        limit_s = timeout_s if timeout_s > 0 else self.options._timeout.total_seconds()
        self._world.wait(each, timeout_s=limit_s, what=f"{what} of {self._ranks} ranks over MPI")

    # -- sums ------------------------------------------------------------------------------------------

    def allreduce(self, tensors: Sequence[torch.Tensor], opts: Any = None) -> MpiWork:  # type: ignore[override]
        """In place."""
        name = name_of(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        return self._together("all-reduce", [self._all_reduce(tensor, name) for tensor in tensors])

    allreduce_coalesced = allreduce

    def _all_reduce(self, tensor: torch.Tensor, name: str) -> Begun:
        dense = dense_of(tensor)
        datatype, op = self._types.reduced(tensor.dtype, name)
        memory = [self._memory(dense), dense.numel(), datatype]

        def finish() -> None:
            mean_of(dense, name, self._ranks)
            into(tensor, dense)

        start = lambda: self._comm.Iallreduce(self._mpi.IN_PLACE, memory, op)  # noqa: E731
        return self._begin(start, dense, finish if dense is not tensor or name == "mean" else None)

    def reduce(self, tensors: Sequence[torch.Tensor], opts: Any) -> MpiWork:  # type: ignore[override]
        """On one rank."""
        name, tensor = name_of(opts.reduceOp), tensors[0]
        dense = dense_of(tensor)
        datatype, op = self._types.reduced(tensor.dtype, name)
        memory = [self._memory(dense), dense.numel(), datatype]
        if self._own != opts.rootRank:
            start = lambda: self._comm.Ireduce(memory, None, op, opts.rootRank)  # noqa: E731
            return self._together("reduce", [self._begin(start, dense)])

        def finish() -> None:
            mean_of(dense, name, self._ranks)
            into(tensor, dense)

        start = lambda: self._comm.Ireduce(self._mpi.IN_PLACE, memory, op, opts.rootRank)  # noqa: E731
        return self._together("reduce", [self._begin(start, dense, finish)])

    def reduce_scatter_single(self, out: torch.Tensor, flat: torch.Tensor, opts: Any = None) -> MpiWork:
        """This rank's part of the sum; the others' of each are exchanged and combined in the order of the ranks. `out`
        may be a part of `flat`."""
        name = name_of(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        return self._together("reduce-scatter", [self._reduce_scatter(out, dense_of(flat), name)])

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def _reduce_scatter(self, out: torch.Tensor, flat: torch.Tensor, name: str) -> Begun:
        fits("reduce-scatter", out.numel() * self._ranks, flat.numel())
        parts = torch.empty_like(flat).view(self._ranks, -1)
        datatype, count = self._types.moved(flat.dtype), out.numel()
        given, got = [self._memory(flat), count, datatype], [self._memory(parts), count, datatype]

        def finish() -> None:
            total = parts[0]
            for part in parts[1:]:
                combine(name, total, part)
            mean_of(total, name, self._ranks)
            out.copy_(total.view(out.shape))

        return self._begin(lambda: self._comm.Ialltoall(given, got), (flat, parts), finish)

    def reduce_scatter(  # type: ignore[override]
        self, outs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any = None
    ) -> MpiWork:
        """The same of parts that lie apart."""
        name = name_of(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        flats = [torch.cat([part.reshape(-1) for part in parts]) for parts in inputs]
        begun = [self._reduce_scatter(out, flat, name) for out, flat in zip(outs, flats, strict=True)]
        return self._together("reduce-scatter", begun)

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Several."""
        name = name_of(dist.ReduceOp.SUM if opts is None else opts.reduceOp)
        begun = [self._reduce_scatter(out, dense_of(flat), name) for out, flat in zip(outs, inputs, strict=True)]
        return self._together("reduce-scatter", begun)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    # -- what everybody has ----------------------------------------------------------------------------

    def all_gather_single(self, flat: torch.Tensor, own: torch.Tensor, opts: Any = None) -> MpiWork:
        """The ranks' tensors side by side. `own` may be a part of `flat`."""
        return self._together("all-gather", [self._all_gather(flat, own)])

    _allgather_base = all_gather_single  # type: ignore[assignment]

    def _all_gather(self, flat: torch.Tensor, own: torch.Tensor) -> Begun:
        fits("all-gather", own.numel() * self._ranks, flat.numel())
        whole, mine, datatype = dense_of(flat, copy=False), dense_of(own), self._types.moved(own.dtype)
        place = whole.view(-1)[self._own * own.numel() : (self._own + 1) * own.numel()]
        if mine.data_ptr() != place.data_ptr():
            place.copy_(mine.view(-1))
        memory = [self._memory(whole), own.numel(), datatype]
        start = lambda: self._comm.Iallgather(self._mpi.IN_PLACE, memory)  # noqa: E731
        return self._begin(start, whole, lambda: into(flat, whole))

    def allgather(  # type: ignore[override]
        self, outs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """The same into tensors that lie apart, which may differ in size."""
        return self._together("all-gather", [self._gather_all(o, i) for o, i in zip(outs, inputs, strict=True)])

    def _gather_all(self, outs: Sequence[torch.Tensor], own: torch.Tensor) -> Begun:
        counts = [out.numel() for out in outs]
        fits("all-gather", counts[self._own], own.numel())
        mine, datatype = dense_of(own), self._types.moved(own.dtype)
        flat = torch.empty(sum(counts), dtype=own.dtype)
        given = [self._memory(mine), mine.numel(), datatype]
        got = [self._memory(flat), counts, starts(counts), datatype]

        def finish() -> None:
            for out, part in zip(outs, torch.split(flat, counts), strict=True):
                out.copy_(part.view(out.shape))

        return self._begin(lambda: self._comm.Iallgatherv(given, got), (mine, flat), finish)

    def all_gather_single_coalesced(
        self, outs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None
    ) -> MpiWork:
        """Several."""
        return self._together("all-gather", [self._all_gather(o, i) for o, i in zip(outs, inputs, strict=True)])

    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]

    # -- from and to one rank --------------------------------------------------------------------------

    def broadcast(self, tensors: Sequence[torch.Tensor], opts: Any) -> MpiWork:  # type: ignore[override]
        """What one rank has."""
        begun = []
        for tensor in tensors:
            dense = dense_of(tensor)
            memory = [self._memory(dense), dense.numel(), self._types.moved(tensor.dtype)]
            begun.append(self._begin(self._start(self._comm.Ibcast, memory, opts.rootRank), dense, back(tensor, dense)))
        return self._together("broadcast", begun)

    def gather(self, outs: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor], opts: Any) -> MpiWork:  # type: ignore[override]
        """On one rank, the tensors of all."""
        mine, root = dense_of(inputs[0]), opts.rootRank
        datatype = self._types.moved(mine.dtype)
        given = [self._memory(mine), mine.numel(), datatype]
        if self._own != root:
            return self._together("gather", [self._begin(self._start(self._comm.Igatherv, given, None, root), mine)])
        counts = [out.numel() for out in outs[0]]
        flat = torch.empty(sum(counts), dtype=mine.dtype)
        got = [self._memory(flat), counts, starts(counts), datatype]

        def finish() -> None:
            for out, part in zip(outs[0], torch.split(flat, counts), strict=True):
                out.copy_(part.view(out.shape))

        return self._together(
            "gather", [self._begin(self._start(self._comm.Igatherv, given, got, root), (mine, flat), finish)]
        )

    def scatter(self, outs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], opts: Any) -> MpiWork:  # type: ignore[override]
        """One rank's tensors, one to each."""
        out, root = outs[0], opts.rootRank
        mine, datatype = dense_of(out, copy=False), self._types.moved(out.dtype)
        got = [self._memory(mine), mine.numel(), datatype]
        flat, given = mine, None
        if self._own == root:
            flat = torch.cat([part.reshape(-1) for part in inputs[0]])
            fits("scatter", out.numel() * self._ranks, flat.numel())
            given = [self._memory(flat), out.numel(), datatype]
        start = self._start(self._comm.Iscatter, given, got, root)
        return self._together("scatter", [self._begin(start, (mine, flat), lambda: into(out, mine))])

    # -- from all to all -------------------------------------------------------------------------------

    def all_to_all_single(
        self,
        out: torch.Tensor,
        flat: torch.Tensor,
        out_sizes: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        opts: Any = None,
    ) -> MpiWork:
        """Part i goes to rank i; sizes are of dim 0, equal ones if not given."""
        given, got = dense_of(flat), dense_of(out, copy=False)
        datatype = self._types.moved(flat.dtype)
        counts, out_counts = self._counts(given, sizes), self._counts(got, out_sizes)
        outgoing = [self._memory(given), counts, starts(counts), datatype]
        incoming = [self._memory(got), out_counts, starts(out_counts), datatype]
        start = self._start(self._comm.Ialltoallv, outgoing, incoming)
        return self._together("all-to-all", [self._begin(start, (given, got), lambda: into(out, got))])

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def _counts(self, flat: torch.Tensor, sizes: Sequence[int] | None) -> list[int]:
        if not sizes:
            fits("all-to-all", flat.numel() // self._ranks * self._ranks, flat.numel())
            return [flat.numel() // self._ranks] * self._ranks
        row = math.prod(flat.shape[1:])
        fits("all-to-all", sum(sizes) * row, flat.numel())
        return [size * row for size in sizes]

    def alltoall(self, outs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], opts: Any = None) -> MpiWork:
        """The same of tensors that lie apart."""
        counts, out_counts = [each.numel() for each in inputs], [each.numel() for each in outs]
        given = torch.cat([each.reshape(-1) for each in inputs])
        got, datatype = torch.empty(sum(out_counts), dtype=given.dtype), self._types.moved(given.dtype)
        outgoing = [self._memory(given), counts, starts(counts), datatype]
        incoming = [self._memory(got), out_counts, starts(out_counts), datatype]

        def finish() -> None:
            for out, part in zip(outs, torch.split(got, out_counts), strict=True):
                out.copy_(part.view(out.shape))

        start = self._start(self._comm.Ialltoallv, outgoing, incoming)
        return self._together("all-to-all", [self._begin(start, (given, got), finish)])

    def barrier(self, opts: Any = None) -> MpiWork:
        """Until all are here."""
        return self._together("barrier", [self._begin(lambda: self._comm.Ibarrier(), None)])

    # -- between two ranks -----------------------------------------------------------------------------

    def send(self, tensors: Sequence[torch.Tensor], peer: int, tag: int = 0) -> MpiWork:
        """A dense tensor, to one rank; it is not written before it has been waited for."""
        dense = dense_of(tensors[0])
        memory = [self._memory(dense), dense.numel(), self._types.moved(dense.dtype)]
        return self._together(
            f"sending to rank {peer}", [self._begin(self._start(self._comm.Isend, memory, peer, tag), dense)]
        )

    def recv(self, tensors: Sequence[torch.Tensor], peer: int, tag: int = 0) -> MpiWork:
        """The next tensor of one rank. RuntimeError where it has not as many bytes."""
        return self._receive(tensors[0], peer, tag, f"receiving from rank {peer}")

    def recv_anysource(self, tensors: Sequence[torch.Tensor], tag: int = 0) -> MpiWork:
        """The next tensor of any rank; `source_rank` of the result says which."""
        return self._receive(tensors[0], self._mpi.ANY_SOURCE, tag, "receiving from any rank")

    def _receive(self, tensor: torch.Tensor, peer: int, tag: int, what: str) -> MpiWork:
        dense, datatype = dense_of(tensor, copy=False), self._types.moved(tensor.dtype)
        memory = [self._memory(dense), dense.numel(), datatype]
        begun = self._begin(self._start(self._comm.Irecv, memory, peer, tag), dense)

        def finish() -> None:
            came = begun.under_way.status.Get_count(self._mpi.BYTE)
            if came != dense.nbytes:
                raise RuntimeError(f"{what}: {came} bytes came where {dense.nbytes} were expected")
            into(tensor, dense)

        begun.finish = finish
        return self._together(what, [begun])

    # -- common ----------------------------------------------------------------------------------------

    def _memory(self, tensor: torch.Tensor) -> Any:
        return memory_of(self._mpi, tensor)

    @staticmethod
    def _start(call: Callable[..., Any], *told: Any) -> Callable[[], Any]:
        return lambda: call(*told)

    def _begin(self, start: Callable[[], Any], kept: object, finish: Callable[[], None] | None = None) -> Begun:
        return Begun(self._world.start(start, kept), finish)

    def _together(self, what: str, begun: Sequence[Begun]) -> MpiWork:
        rest = [each.finish for each in begun if each.finish is not None]

        def finish() -> None:
            for each in rest:
                each()

        return MpiWork(self, what, [each.under_way for each in begun], finish if rest else None)
