"""Matrices of which ranks have parts, brought together on one of them for a function of the whole, and dealt out again.

    shard 0, part 0  ▌▌░░            every matrix has one rank that computes it, the least busy of its holders;
    shard 0, part 1  ░░▌▌  ──► owner ──f──► the same parts back       all matrices travel in one exchange each way
    shard 1, …

Parts are shards of units (slices of a dim) and, of those, flat runs of elements. Knows who has what; refuses to know
what is computed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist

from shardwise.describe.tensor import Slice
from shardwise.execute.program import Program
from shardwise.parallel.tensor.slices import cut, paste

__all__ = ["Held", "Matrices", "Piece", "matrices_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What a rank has of a matrix: of its shard's tensor the elements [start, start + numel), row-major."""

    rank: int  # in the group
    shard: int
    start: int
    numel: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A matrix of this rank's group. `pieces` are those of the ranks that bring it together, which `owner` is one of;
    `shapes` are the tensors of the shards, `part` how they are cut from the whole (None: each has the whole)."""

    name: str
    shapes: Mapping[int, tuple[int, ...]]
    part: Slice | None
    pieces: tuple[Piece, ...]
    owner: int

    def is_of(self, rank: int) -> bool:
        """Whether the rank has a part of it."""
        return any(piece.rank == rank for piece in self.pieces)


class Matrices:
    """The matrices of one rank and the group that holds their other parts; without a group all are whole here."""

    def __init__(self, held: Sequence[Held], *, rank: int = 0, group: dist.ProcessGroup | None = None) -> None:
        self._held = list(held)
        self._rank = rank
        self._group = group

    def map(
        self, parts: Mapping[str, torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """`function` of the whole of every matrix of which somebody gives a part, in the shape of this rank's part.

        Collective over the group, whose ranks give parts in one dtype.
        """
        known = {held.name for held in self._held if held.is_of(self._rank)}
        here = {name: function(part) for name, part in parts.items() if name not in known}
        if self._group is None:
            return here
        wanted = self._wanted(parts)
        return here | self._exchanged(wanted, parts, function)

    def _wanted(self, parts: Mapping[str, torch.Tensor]) -> list[Held]:
        """The matrices that take part now: on some rank there is a gradient."""
        flags = torch.tensor([float(held.is_of(self._rank) and held.name in parts) for held in self._held])
        device = next((part.device for part in parts.values()), None)
        if dist.get_backend(self._group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        if device is not None:
            flags = flags.to(device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        return [held for held, flag in zip(self._held, flags.tolist(), strict=True) if flag]

    def _exchanged(
        self,
        wanted: Sequence[Held],
        parts: Mapping[str, torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        size = dist.get_world_size(self._group)
        like = next(iter(parts.values()), torch.empty(0))
        to_owners: list[list[torch.Tensor]] = [[] for _ in range(size)]
        for held in wanted:
            for piece in held.pieces:
                if piece.rank == self._rank:
                    own = parts.get(held.name)
                    flat = like.new_zeros(piece.numel) if own is None else own.reshape(-1)
                    to_owners[held.owner].append(flat)
        mine = [held for held in wanted if held.owner == self._rank]
        from_ranks = [
            [(held.name, piece) for held in mine for piece in held.pieces if piece.rank == rank] for rank in range(size)
        ]
        arrived = self._all_to_all(to_owners, [[piece.numel for _, piece in row] for row in from_ranks], like)
        locals_: dict[tuple[str, int], torch.Tensor] = {}
        for held in mine:
            for shard in {piece.shard for piece in held.pieces}:
                locals_[held.name, shard] = like.new_zeros(math.prod(held.shapes[shard]))
        for row, tensors in zip(from_ranks, arrived, strict=True):
            for (name, piece), tensor in zip(row, tensors, strict=True):
                locals_[name, piece.shard][piece.start : piece.start + piece.numel] = tensor
        for held in mine:
            self._apply(held, locals_, function)
        back = [
            [locals_[name, piece.shard][piece.start : piece.start + piece.numel] for name, piece in row]
            for row in from_ranks
        ]
        own_pieces = [(h, piece) for h in wanted for piece in h.pieces if piece.rank == self._rank]
        own_rows = [[(h.name, piece) for h, piece in own_pieces if h.owner == rank] for rank in range(size)]
        returned = self._all_to_all(back, [[piece.numel for _, piece in row] for row in own_rows], like)
        found: dict[str, torch.Tensor] = {}
        for row, tensors in zip(own_rows, returned, strict=True):
            for (name, _), tensor in zip(row, tensors, strict=True):
                if name in parts:
                    found[name] = tensor.view(parts[name].shape)
        return found

    def _apply(
        self,
        held: Held,
        locals_: dict[tuple[str, int], torch.Tensor],
        function: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        shards = sorted({piece.shard for piece in held.pieces})
        if held.part is None:
            (shard,) = shards
            whole = function(locals_[held.name, shard].view(held.shapes[shard]))
            locals_[held.name, shard] = whole.reshape(-1)
            return
        pasted = [
            paste(locals_[held.name, shard].view(held.shapes[shard]), held.part, shard, owned=True) for shard in shards
        ]
        whole = function(torch.stack(pasted).sum(0))
        for shard in shards:
            locals_[held.name, shard] = cut(whole, held.part, shard).reshape(-1)

    def _all_to_all(
        self, sends: Sequence[Sequence[torch.Tensor]], sizes: Sequence[Sequence[int]], like: torch.Tensor
    ) -> list[tuple[torch.Tensor, ...]]:
        """`sends[r]` goes to rank r; of rank r come tensors of `sizes[r]`."""
        outgoing = torch.cat([like.new_empty(0), *(each for row in sends for each in row)])
        arrived = like.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            arrived,
            outgoing,
            output_split_sizes=[sum(row) for row in sizes],
            input_split_sizes=[sum(each.numel() for each in row) for row in sends],
            group=self._group,
        )
        rows = arrived.split([sum(row) for row in sizes])  # type: ignore[no-untyped-call]
        return [tuple(row.split(list(own))) for row, own in zip(rows, sizes, strict=True)]


def matrices_of(program: Program, names: Sequence[str]) -> Matrices:
    """The matrices `names` of a program's rank. Collective over the world: groups are made where there are parts."""
    place = program.place
    if place.fsdp == 1 and place.tp == 1:
        return Matrices(())
    mine: dist.ProcessGroup | None = None
    members: list[int] = []
    for ranks in _groups(program):
        group = dist.new_group(ranks)
        if place.rank in ranks:
            assert isinstance(group, dist.ProcessGroup)
            mine, members = group, ranks
    told: list[dict[str, tuple[int, int, int, tuple[int, ...]]] | None] = [None] * len(members)
    dist.all_gather_object(told, _own_parts(program, names), group=mine)
    program.on_close(lambda: dist.destroy_process_group(mine))
    held = _held(program, [each or {} for each in told])
    return Matrices(held, rank=members.index(place.rank), group=mine)


def _groups(program: Program) -> list[list[int]]:
    """Who holds the parts of the same matrices: the parts of the state, of all shards."""
    place = program.place
    of_shard = [[rank - rank % place.tp for rank in ranks] for ranks in place.ranks_dividing_states()]
    firsts = sorted({tuple(ranks) for ranks in of_shard})
    return [[first + shard for first in ranks for shard in range(place.tp)] for ranks in firsts]


def _own_parts(program: Program, names: Sequence[str]) -> dict[str, tuple[int, int, int, tuple[int, ...]]]:
    """Name -> shard, start, elements, shape of the shard's tensor; none for what the rank has no element of."""
    states = program.states
    return {
        name: (program.place.shard, states[name].start, states[name].parameter.numel(), states[name].shape)
        for name in names
        if name in states
    }


def _held(program: Program, told: Sequence[Mapping[str, tuple[int, int, int, tuple[int, ...]]]]) -> list[Held]:
    """All matrices that this group brings together, in one order on all ranks; none that every rank has whole."""
    order = list(dict.fromkeys(name for own in told for name in own))
    busy = [0.0] * len(told)
    found: list[Held] = []
    for name in sorted(order):
        part = program.part_of(name)
        pieces = [Piece(rank=r, shard=own[name][0], start=own[name][1], numel=own[name][2])
                  for r, own in enumerate(told) if name in own]  # fmt: skip
        shapes = {own[name][0]: own[name][3] for own in told if name in own}
        if part is None:
            for shard, shape in shapes.items():
                own = [piece for piece in pieces if piece.shard == shard]
                if all(piece.numel == math.prod(shape) for piece in own):
                    continue  # whole wherever it is
                owner = _least_busy(busy, own, shape)
                found.append(Held(name=name, shapes={shard: shape}, part=None, pieces=tuple(own), owner=owner))
        else:
            owner = _least_busy(busy, pieces, next(iter(shapes.values())))
            found.append(Held(name=name, shapes=shapes, part=part, pieces=tuple(pieces), owner=owner))
    return found


def _least_busy(busy: list[float], pieces: Sequence[Piece], shape: tuple[int, ...]) -> int:
    """Of the holders; its load grows by what a product of the matrix with itself takes."""
    owner = min({piece.rank for piece in pieces}, key=lambda r: (busy[r], r))
    rows, columns = shape[-2] if len(shape) < 4 else shape[0], math.prod(shape[1:]) if len(shape) > 3 else shape[-1]
    busy[owner] += float(math.prod(shape[:-2]) if len(shape) == 3 else 1) * rows * columns * min(rows, columns)
    return owner
