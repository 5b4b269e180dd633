"""The state of training from one program to another on the same ranks: parameters, moments, buffers; no file.

    round 1   embed.weight, its moments         every rank: room for its part under the new layout, boxes sent and
    round 2   layers.0.*, their moments         received, and what it remembered of them under the old layout freed
    …

The table of slices is a checkpoint's (`divided.targets_of` of both programs), ranks stand for its files. A round holds
some tensors at a time, so that a rank never has both moments of all. A round that fails anywhere is undone: what was
freed comes back from who has it now. Knows two programs and their optimizers; refuses to know why they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from shardwise.checkpoint.moves import Move, plan_moves
from shardwise.checkpoint.slices import TensorSlice
from shardwise.comm.exchange import exchange
from shardwise.errors import CheckpointError, LayoutError
from shardwise.train.held_state import OPTIMIZER, HereOfTensor, Side, Told, held_of, wanted_of

__all__ = ["MESSAGE_BYTES", "ROUND_BYTES", "Moved", "agree", "move_state"]

ROUND_BYTES = 64 << 20  # of tensors whose places change in one round, over all ranks
MESSAGE_BYTES = 16 << 20  # that a rank has under way, each way


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What travelled: bytes that this rank sent, bytes of all ranks' tensors, and in how many rounds."""

    sent_bytes: int
    state_bytes: int
    rounds: int


def move_state(old: Side, new: Side, *, round_bytes: int = ROUND_BYTES) -> Moved:
    """Make the state of `new` that of `old`, bit for bit, and `old`'s moments empty. Collective over all ranks.

    Both stand on the ranks of the default group. Raises LayoutError on every rank where it failed on one; then `old` is
    as it was.
    """
    held = held_of(old)
    of_ranks = _gathered({name: tensor.told for name, tensor in held.items()})
    known = {name: told for rank in of_ranks for name, told in rank.items()}
    wanted = wanted_of(new, known)
    wanted_of_ranks = _gathered({name: tensor.told for name, tensor in wanted.items()})
    _check(known, wanted_of_ranks)
    names = [name for name in sorted(known) if any(name in rank for rank in wanted_of_ranks)]
    try:
        plans = _plans(names, of_ranks, wanted_of_ranks)
    except CheckpointError as hole:  # on every rank alike
        raise LayoutError(f"a layout is handed over whole, but {hole}") from hole
    rounds = list(_rounds(names, known, round_bytes))
    sent = 0
    for number, group in enumerate(rounds):
        error: Exception | None = None
        try:
            for name in group:
                if name in wanted:
                    wanted[name].prepare()
        except Exception as raised:  # no room, above all
            error = raised
        try:
            agree(error)
        except LayoutError:
            for earlier in reversed(rounds[:number]):
                moments = [name for name in earlier if known[name].kind == OPTIMIZER]
                _put_back(moments, held, wanted, of_ranks, wanted_of_ranks)
            raise
        sent += _moved({name: plans[name] for name in group}, known, held, wanted)
        for name in group:
            if name in held:
                _free(held[name])
    new.program.numerics.from_state(old.program.numerics.to_state())
    new.program.updated()
    return Moved(sent_bytes=sent, state_bytes=sum(told.nbytes for told in known.values()), rounds=len(rounds))


def agree(error: Exception | None) -> None:
    """Whether no rank has an error. Collective; raises LayoutError on every rank, with the first one, where one has."""
    told = "" if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"
    of_ranks = _gathered(told)
    first = next(((rank, text) for rank, text in enumerate(of_ranks) if text), None)
    if first is not None:
        raise LayoutError(f"all ranks go over to a layout or none, but rank {first[0]} cannot: {first[1]}") from error


def _gathered(own: Any) -> list[Any]:
    """What every rank gave, by rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    return of_ranks


def _check(known: Mapping[str, Told], wanted: Sequence[Mapping[str, Told]]) -> None:
    """The same tensors on both sides. The same on every rank, so that all raise or none."""
    for of_rank in wanted:
        for name, told in of_rank.items():
            had = known.get(name)
            if had is None or (had.shape, had.dtype) != (told.shape, told.dtype):
                found = "is not held now" if had is None else f"is {had.dtype} {had.shape} now"
                raise LayoutError(
                    f"one layout hands over to another what both know, but {name}, {told.dtype} {told.shape} there, "
                    f"{found}; save a checkpoint, and resume on the other layout"
                )


def _rounds(names: Sequence[str], known: Mapping[str, Told], most: int) -> Iterator[list[str]]:
    group: list[str] = []
    nbytes = 0
    for name in names:
        group.append(name)
        nbytes += known[name].nbytes
        if nbytes >= most:
            yield group
            group, nbytes = [], 0
    if group:
        yield group


# -- a round ----------------------------------------------------------------------------------------


def _plans(
    names: Sequence[str], held: Sequence[Mapping[str, Told]], wanted: Sequence[Mapping[str, Told]]
) -> dict[str, tuple[Move, ...]]:
    """The moves of every tensor, the same on every rank. Raises CheckpointError for a hole."""

    def regions(of_ranks: Sequence[Mapping[str, Told]], name: str) -> list[Sequence[TensorSlice]]:
        return [of_rank[name].regions if name in of_rank else () for of_rank in of_ranks]

    return {name: plan_moves(name, regions(held, name), regions(wanted, name)) for name in names}


def _moved(
    plans: Mapping[str, Sequence[Move]],
    known: Mapping[str, Told],
    held: Mapping[str, HereOfTensor],
    wanted: Mapping[str, HereOfTensor],
) -> int:
    """Fill what is wanted of some tensors; returns bytes that this rank sent. Collective."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    own = dist.get_rank() if several else 0
    sent = 0
    batch: list[tuple[str, Move]] = []
    loads = [0] * (dist.get_world_size() if several else 1)
    for name, moves in plans.items():
        size = known[name].itemsize
        for move in moves:
            if move.source == move.target:
                if move.source == own:
                    _put(wanted[name], move, _taken(held[name], move))
                continue
            for part in move.in_parts(max(1, MESSAGE_BYTES // size)):
                nbytes = part.num_elements * size
                if max(loads[part.source], loads[part.target]) + nbytes > MESSAGE_BYTES:
                    sent += _send(batch, own, held, wanted)
                    batch, loads = [], [0] * len(loads)
                batch.append((name, part))
                loads[part.source] += nbytes
                loads[part.target] += nbytes
    return sent + _send(batch, own, held, wanted)


def _send(
    batch: Sequence[tuple[str, Move]], own: int, held: Mapping[str, HereOfTensor], wanted: Mapping[str, HereOfTensor]
) -> int:
    """One message for each pair of ranks; all ranks know the same batch."""
    leaving: dict[int, list[torch.Tensor]] = {}
    coming: dict[int, list[tuple[str, Move]]] = {}
    for name, move in batch:
        if move.source == own:
            leaving.setdefault(move.target, []).append(_bytes_of(_taken(held[name], move)))
        elif move.target == own:
            coming.setdefault(move.source, []).append((name, move))
    sends = {peer: torch.cat(boxes) for peer, boxes in leaving.items()}
    receives: dict[int, torch.Tensor] = {}
    for peer, moves in coming.items():
        nbytes = sum(move.num_elements * wanted[name].views[move.wanted].element_size() for name, move in moves)
        device = wanted[moves[0][0]].views[moves[0][1].wanted].device
        receives[peer] = torch.empty(nbytes, dtype=torch.uint8, device=device)
    exchange(sends, receives)
    for peer, moves in coming.items():
        start = 0
        for name, move in moves:
            view = wanted[name].views[move.wanted]
            stop = start + move.num_elements * view.element_size()
            box = receives[peer][start:stop].clone().view(view.dtype)  # of its own: aligned for its dtype
            _put(wanted[name], move, box.view(move.put.sizes))
            start = stop
    return sum(tensor.numel() for tensor in sends.values())


def _taken(tensor: HereOfTensor, move: Move) -> torch.Tensor:
    return _narrowed(tensor.views[move.piece], move.taken)


def _put(tensor: HereOfTensor, move: Move, values: torch.Tensor) -> None:
    _narrowed(tensor.views[move.wanted], move.put).copy_(values)


def _narrowed(tensor: torch.Tensor, box: TensorSlice) -> torch.Tensor:
    for dim, (start, length) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# -- memory -----------------------------------------------------------------------------------------


def _free(tensor: HereOfTensor) -> None:
    """The memory of a moment goes back; the tensor stays the same object, and can have its memory again."""
    if tensor.whole is not None and _owns_memory(tensor.whole):
        tensor.whole.untyped_storage().resize_(0)


def _owns_memory(tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    return storage.resizable() and storage.nbytes() == tensor.nbytes


def _put_back(
    names: Sequence[str],
    held: Mapping[str, HereOfTensor],
    wanted: Mapping[str, HereOfTensor],
    held_of_ranks: Sequence[Mapping[str, Told]],
    wanted_of_ranks: Sequence[Mapping[str, Told]],
) -> None:
    """A round undone: moments that were freed have their memory and their values again. Collective."""
    for name in names:
        tensor = held.get(name)
        if tensor is not None and tensor.whole is not None and tensor.whole.untyped_storage().nbytes() == 0:
            tensor.whole.untyped_storage().resize_(tensor.whole.nbytes)
    known = {name: told for of_rank in held_of_ranks for name, told in of_rank.items()}
    _moved(_plans(names, wanted_of_ranks, held_of_ranks), known, wanted, held)
