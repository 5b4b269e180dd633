"""Sums and gathers of ranks of one host that map each other's memory: loads, stores and two looks at a board.

    rank 0  flat │a0│b0│        rank 0 adds a0 + a1 and stores it to both, rank 1 the same with b
    rank 1  flat │a1│b1│        scattered: each stores its own part; gathered: each loads the others'

Memory from `empty()` is worked on where it lies. Other tensors pass through stages, a piece at a time; of small ones
every rank adds all pieces itself, which saves the second look. There are no threads: a call begins at once, and is done
by the next call or `wait()` that finds all ranks there. Sums are made in the order of the ranks. Knows ranks and
memory; refuses to know how they met.
"""

from __future__ import annotations

import collections
import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import torch

from shardwise.comm.collective import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, REDUCE_SCATTER, All, Done
from shardwise.comm.point_to_point import Waitable
from shardwise.comm.shared_board import CALLS, Board, Call
from shardwise.comm.shared_region import Descriptor, Region, received, send
from shardwise.errors import TransferError

__all__ = ["SharedMemoryCollective"]

_STAGE_BYTES = 1 << 20  # of a piece of a tensor that is not shared: what is copied in is still in the cache when added
_STAGES = 4  # that are filled before the first must be free again
_SMALL_BYTES = 128 << 10  # up to here every rank adds everything
_CHUNK_BYTES = 256 << 10  # of each operand of a sum: what one pass leaves in the cache, the next finds there
_KINDS = (ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, ALL_TO_ALL, "small all_reduce")
_REDUCE, _SCATTER, _GATHER, _EXCHANGE, _SMALL = range(5)


Views = Sequence[torch.Tensor]  # what each rank has handed over, in the order of the ranks


@dataclasses.dataclass(slots=True, eq=False)
class _Under:
    """A call that is under way. `work` is this rank's part of it, once all ranks have begun."""

    number: int
    call: Call
    own: torch.Tensor  # what this rank hands over
    work: Callable[[Views], None]
    waits_for_all: bool  # whether others read or write what the caller will touch again
    then: Callable[[], None] | None  # once all have finished
    worked: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Stage:
    """A region for pieces, and the last call that used it."""

    number: int
    region: Region
    used_by: _Under | None = None


class SharedMemoryCollective:
    """A `Collective` over ranks that `sockets` connect, by place; it owns them. `board` has a row of each rank."""

    def __init__(self, *, rank: int, board: Board, sockets: Mapping[int, socket.socket]) -> None:
        self._rank: Final = rank
        self._size: Final = len(sockets) + 1
        self._board = board
        self._sockets = dict(sockets)
        self._made = 0
        self._own: dict[int, tuple[int, Region]] = {}  # by address
        self._unsent: dict[int, collections.deque[Descriptor]] = {i: collections.deque() for i in sockets}
        self._mapped: dict[int, dict[int, Region]] = {i: {} for i in sockets}
        self._stages: collections.deque[_Stage] = collections.deque()
        self._queue: collections.deque[_Under] = collections.deque()
        self._next = 0
        self._sent: collections.Counter[str] = collections.Counter()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def sent_bytes(self) -> Mapping[str, int]:
        return self._sent

    def make_stages(self) -> bool:
        """Get the memory for tensors that are not shared, before the first call; whether there is so much."""
        for _ in range(_STAGES):
            made = self._make(_STAGE_BYTES)
            if made is None:
                return False
            self._stages.append(_Stage(*made))
        return True

    def empty(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Collective`: a region of its own, or plain memory where there is none to be had."""
        made = self._make(numel * dtype.itemsize)
        return torch.empty(numel, dtype=dtype) if made is None else made[1].flat(0, numel, dtype)

    def all_reduce(self, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_REDUCE] += flat.nbytes
        if not flat.numel():
            return Done()
        where = self._where(flat) if flat.nbytes > _SMALL_BYTES else None
        if where is not None:
            return self._begin(_REDUCE, flat, where, self._add_own_part, waits_for_all=True)
        piece = _STAGE_BYTES // flat.element_size() // self._size * self._size
        works = [self._reduce_piece(flat[at : at + piece]) for at in range(0, flat.numel(), piece)]
        return works[0] if len(works) == 1 else All(works)

    def reduce_scatter(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[REDUCE_SCATTER] += flat.nbytes
        if not flat.numel():
            return Done()
        where = self._where(flat)
        if where is not None:
            own = slice(self._rank * out.numel(), (self._rank + 1) * out.numel())
            work = lambda views: _add([view[own] for view in views], out)  # noqa: E731
            return self._begin(_SCATTER, flat, where, work, waits_for_all=True)
        parts, piece = flat.view(self._size, -1), _STAGE_BYTES // flat.element_size() // self._size
        starts = range(0, out.numel(), piece)
        return All([self._scatter_piece(parts[:, at : at + piece], out[at : at + piece]) for at in starts])

    def all_gather(self, own: torch.Tensor, flat: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_GATHER] += flat.nbytes
        if not flat.numel():
            return Done()
        parts = flat.view(self._size, -1)
        if own.data_ptr() != parts[self._rank].data_ptr():
            parts[self._rank].copy_(own)
        where = self._where(own)
        if where is not None:
            return self._begin(_GATHER, own, where, lambda views: self._load(views, parts), waits_for_all=True)
        piece = _STAGE_BYTES // flat.element_size()
        starts = range(0, own.numel(), piece)
        return All([self._gather_piece(own[at : at + piece], parts[:, at : at + piece]) for at in starts])

    def all_to_all(self, flat: torch.Tensor, out: torch.Tensor) -> Waitable:
        """See `Collective`."""
        self._sent[ALL_TO_ALL] += flat.nbytes
        if not flat.numel():
            return Done()
        parts, where = out.view(self._size, -1), self._where(flat)
        if where is not None:
            work = lambda views: self._take(views, parts)  # noqa: E731
            return self._begin(_EXCHANGE, flat, where, work, waits_for_all=True)
        rows, piece = flat.view(self._size, -1), _STAGE_BYTES // flat.element_size() // self._size
        starts = range(0, rows.shape[1], piece)
        return All([self._exchange_piece(rows[:, at : at + piece], parts[:, at : at + piece]) for at in starts])

    def common(self, numel: int, dtype: torch.dtype) -> torch.Tensor | None:
        """A flat tensor of zeros that all ranks map: what one of them writes, all read behind `barrier`. None on all of
        them where there is no such memory. Collective."""
        made = self._make(numel * dtype.itemsize) if self._rank == 0 else None
        told = torch.zeros(self._size, dtype=torch.int64)
        if self._rank == 0:
            told[0] = -1 if made is None else made[0]
        self.all_reduce(told).wait()
        number = int(told[0])
        if number < 0 or made is not None:
            return None if made is None else made[1].flat(0, numel, dtype)
        mapped = self._mapped[0]
        while number not in mapped:
            self._send_descriptors()  # the peer may wait for ours
            each, mapped[each] = received(self._sockets[0])
        return mapped[number].flat(0, numel, dtype)

    def barrier(self) -> None:
        """Until all ranks are here, and see what the others have written."""
        self.all_reduce(torch.zeros(self._size)).wait()

    def close(self) -> None:
        """Let go of sockets and regions; tensors of `empty()` stay as they are."""
        for each in self._sockets.values():
            each.close()
        for descriptor in {id(d): d for waiting in self._unsent.values() for d in waiting}.values():
            descriptor.close()
        self._unsent = {i: collections.deque() for i in self._sockets}
        self._own.clear()
        self._mapped.clear()
        self._stages.clear()
        self._queue.clear()

    # -- calls ----------------------------------------------------------------------------------

    def _begin(
        self,
        kind: int,
        own: torch.Tensor,
        where: tuple[int, int],
        work: Callable[[Views], None],
        *,
        waits_for_all: bool = False,
        then: Callable[[], None] | None = None,
    ) -> _Waited:
        number, self._next = self._next, self._next + 1
        if number >= CALLS:  # its line on the board is used again
            self._until_finished(number - CALLS)
        if any(self._unsent.values()):
            self._send_descriptors()
        under = _Under(number, Call(kind, own.nbytes, *where), own, work, waits_for_all, then)
        self._queue.append(under)
        self._board.begin(number, under.call)
        self._advance()
        return _Waited(self, under)

    def _advance(self) -> None:
        """Do this rank's part of all calls that the others have begun too."""
        while self._queue and self._board.have_begun(self._queue[0].number):
            self._do(self._queue.popleft())

    def _do(self, under: _Under) -> None:
        views = []
        for place in range(self._size):
            theirs = self._board.call_of(place, under.number)
            if theirs[:2] != under.call[:2]:
                raise TransferError(
                    f"ranks of a group call the same in the same order, but the one at place {place} began "
                    f"{_KINDS[theirs.kind]} of {theirs.num_bytes} bytes where this one, at {self._rank}, began "
                    f"{_KINDS[under.call.kind]} of {under.call.num_bytes}; all ranks must run the same code"
                )
            views.append(under.own if place == self._rank else self._view(place, theirs, under.own))
        under.work(views)
        under.worked = True
        self._board.finish(under.number)

    def wait_for(self, under: _Under) -> None:
        """Until a call is done and what it was about may be read and written. RuntimeError if a rank is gone."""
        while not under.worked:
            self._board.until_begun(self._queue[0].number)
            self._advance()
        if under.waits_for_all or under.then is not None:
            self._board.until_finished(under.number)
        if under.then is not None:
            under.then()
            under.then = None

    def _until_finished(self, number: int) -> None:
        """Until all ranks have done their part of a call, and of those before it."""
        while self._queue and self._queue[0].number <= number:
            self._board.until_begun(self._queue[0].number)
            self._advance()
        self._board.until_finished(number)

    # -- what a rank does in a call ---------------------------------------------------------------

    def _add_own_part(self, views: Views) -> None:
        """Add what the ranks have of this rank's part, and store the sum to all of them."""
        numel = views[0].numel()
        part = -(-numel // self._size)
        step = _CHUNK_BYTES // views[0].element_size()
        end = min((self._rank + 1) * part, numel)
        for start in range(self._rank * part, end, step):
            chunks = [view[start : min(start + step, end)] for view in views]
            total = chunks[self._rank]
            _add(chunks, total)
            for place, chunk in enumerate(chunks):
                if place != self._rank:
                    chunk.copy_(total)

    def _load(self, views: Views, parts: torch.Tensor) -> None:
        for place, view in enumerate(views):
            if place != self._rank:
                parts[place].copy_(view.view(parts[place].shape))

    def _take(self, views: Views, parts: torch.Tensor) -> None:
        """What each rank has for this one."""
        numel = parts.shape[1]
        for place, view in enumerate(views):
            parts[place].copy_(view[self._rank * numel : (self._rank + 1) * numel])

    def _reduce_piece(self, flat: torch.Tensor) -> _Waited:
        stage = self._staged(flat)
        if self._size == 2 or flat.nbytes <= _SMALL_BYTES:  # every rank adds everything
            return self._begin_staged(_SMALL, stage, flat, lambda views: _add(views, flat))
        own = stage.region.flat(0, flat.numel(), flat.dtype)
        return self._begin_staged(_REDUCE, stage, flat, self._add_own_part, then=lambda: _copy(own, flat))

    def _scatter_piece(self, parts: torch.Tensor, out: torch.Tensor) -> _Waited:
        stage, own = self._staged(parts), slice(self._rank * out.numel(), (self._rank + 1) * out.numel())
        return self._begin_staged(_SCATTER, stage, parts, lambda views: _add([view[own] for view in views], out))

    def _gather_piece(self, own: torch.Tensor, parts: torch.Tensor) -> _Waited:
        return self._begin_staged(_GATHER, self._staged(own), own, lambda views: self._load(views, parts))

    def _exchange_piece(self, rows: torch.Tensor, parts: torch.Tensor) -> _Waited:
        return self._begin_staged(_EXCHANGE, self._staged(rows), rows, lambda views: self._take(views, parts))

    def _staged(self, piece: torch.Tensor) -> _Stage:
        """A stage that nobody reads any more, with a copy of the piece."""
        stage = self._stages.popleft()
        self._stages.append(stage)
        if stage.used_by is not None:
            self.wait_for(stage.used_by)
            self._until_finished(stage.used_by.number)
            stage.used_by = None
        stage.region.flat(0, piece.numel(), piece.dtype).view(piece.shape).copy_(piece)
        return stage

    def _begin_staged(
        self,
        kind: int,
        stage: _Stage,
        piece: torch.Tensor,
        work: Callable[[Views], None],
        then: Callable[[], None] | None = None,
    ) -> _Waited:
        own = stage.region.flat(0, piece.numel(), piece.dtype)
        begun = self._begin(kind, own, (stage.number, 0), work, then=then)
        stage.used_by = begun.under
        return begun

    # -- where the memory is ---------------------------------------------------------------------

    def _make(self, num_bytes: int) -> tuple[int, Region] | None:
        try:
            descriptor = Descriptor(self._made, max(num_bytes, 1))
        except OSError:
            return None
        self._made += 1
        self._own[descriptor.region.memory.data_ptr()] = descriptor.number, descriptor.region
        for waiting in self._unsent.values():
            waiting.append(descriptor)
        self._send_descriptors()
        return descriptor.number, descriptor.region

    def _send_descriptors(self) -> None:
        for place, waiting in self._unsent.items():
            while waiting and send(self._sockets[place], waiting[0]):
                descriptor = waiting.popleft()
                if not any(descriptor in others for others in self._unsent.values()):
                    descriptor.close()

    def _where(self, flat: torch.Tensor) -> tuple[int, int] | None:
        """(region, byte offset) of a tensor in memory that this rank shares."""
        found = self._own.get(flat.untyped_storage().data_ptr())
        return None if found is None else (found[0], int(flat.storage_offset()) * flat.element_size())

    def _view(self, place: int, call: Call, like: torch.Tensor) -> torch.Tensor:
        """What the rank at a place handed over in a call."""
        mapped = self._mapped[place]
        while call.region not in mapped:
            self._send_descriptors()  # the peer may wait for ours
            number, mapped[number] = received(self._sockets[place])
        return mapped[call.region].flat(call.offset, like.numel(), like.dtype)


@dataclasses.dataclass(frozen=True, slots=True)
class _Waited:
    """A call that somebody may wait for."""

    collective: SharedMemoryCollective
    under: _Under

    def wait(self) -> None:
        self.collective.wait_for(self.under)


def _add(values: Views, out: torch.Tensor) -> None:
    """The sum in the order of the ranks; `out` may be one of the values."""
    if len(values) == 1:
        out.copy_(values[0])
        return
    total = values[0]
    for value in values[1:-1]:
        total = total + value if total is values[0] else total.add_(value)
    torch.add(total, values[-1], out=out)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    target.copy_(source)
