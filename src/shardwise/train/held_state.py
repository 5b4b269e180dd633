"""What one rank has of the state of training, or is to have, as boxes of whole tensors: parameters, moments, buffers.

The table of slices is a checkpoint's (`divided.targets_of`). Knows a program and its optimizer; refuses to know other
ranks and how anything travels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from shardwise.checkpoint.load import Target
from shardwise.checkpoint.manifest import TensorEntry
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.tensor_file import TORCH_DTYPES
from shardwise.execute.program import Program
from shardwise.parallel.states import State
from shardwise.train.divided import targets_of
from shardwise.train.state import moment_name, owns_buffer, persistent_buffers, room_for

__all__ = ["OPTIMIZER", "HereOfTensor", "Side", "Told", "held_of", "wanted_of"]

OPTIMIZER = "optimizer"
_PARAMETER, _BUFFER = "parameter", "buffer"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """A program and the optimizer over its states."""

    program: Program
    optimizer: torch.optim.Optimizer | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What a rank tells others of a tensor: how it is whole, and the slices that are here, or are to be."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    regions: tuple[TensorSlice, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return TORCH_DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return TensorSlice.whole(self.shape).num_elements * self.itemsize


@dataclasses.dataclass(slots=True, eq=False)
class HereOfTensor:
    """A tensor of one side on this rank: its slices, with their views once it is made."""

    told: Told
    make: Callable[[], Sequence[Target]]
    views: tuple[torch.Tensor, ...] = ()
    whole: torch.Tensor | None = None  # all of its memory here, where that can be freed

    def prepare(self) -> None:
        """Make the room for it, where there is none yet."""
        if not self.views:
            self.views = tuple(target.out for target in self.make())


def held_of(side: Side) -> dict[str, HereOfTensor]:
    """Everything that a checkpoint would have of this rank, and what other ranks would write of it."""
    found: dict[str, HereOfTensor] = {}
    program = side.program
    for name, state, value in _values(program):
        _add(found, program, name, name, value, kind=_PARAMETER, state=state)
        if state is None or side.optimizer is None:
            continue
        for each, moment in side.optimizer.state.get(value, {}).items():
            if torch.is_tensor(moment):
                saved = moment_name(name, each)
                _add(found, program, name, saved, moment, kind=OPTIMIZER, state=state)
                found[saved].whole = moment
    for name, buffer in persistent_buffers(program.model).items():
        if owns_buffer(program, name):
            _add(found, program, name, name, buffer, kind=_BUFFER)
    return found


def wanted_of(side: Side, known: Mapping[str, Told]) -> dict[str, HereOfTensor]:
    """Everything that this rank is to have; moments are made when they are prepared."""
    found: dict[str, HereOfTensor] = {}
    program, optimizer = side.program, side.optimizer
    moments: dict[str, list[str]] = {}
    for saved, told in known.items():
        if told.kind == OPTIMIZER:
            _, each, name = saved.split("/", 2)
            moments.setdefault(name, []).append(each)
    for name, state, value in _values(program):
        _add(found, program, name, name, value, kind=_PARAMETER, state=state)
        if state is None or optimizer is None or not value.requires_grad:
            continue
        for each in moments.get(name, ()):
            saved = moment_name(name, each)
            entry = TensorEntry(kind=OPTIMIZER, global_shape=known[saved].shape, dtype=known[saved].dtype, pieces=())
            found[saved] = _moment(program, optimizer, name, each, entry, state)
    for name, buffer in persistent_buffers(program.model).items():
        _add(found, program, name, name, buffer, kind=_BUFFER)
    return found


def _values(program: Program) -> Iterator[tuple[str, State | None, torch.Tensor]]:
    """Every parameter of which this rank holds something: its name, its state, and where its true value is."""
    states = program.states
    for name, parameter in program.parameters.items():
        divided = program.divides_state(name)
        state = program.part(name) if divided else states.get(name)
        if not divided or state is not None:
            yield name, state, parameter if state is None else state.parameter


def _add(
    found: dict[str, HereOfTensor],
    program: Program,
    parameter: str,
    name: str,
    tensor: torch.Tensor,
    *,
    kind: str,
    state: State | None = None,
) -> None:
    targets = tuple(targets_of(program, parameter, name, tensor.detach(), state=state))
    told = _told(kind, tensor, targets)
    found[name] = HereOfTensor(told=told, make=lambda: targets, views=tuple(target.out for target in targets))


def _moment(
    program: Program, optimizer: torch.optim.Optimizer, name: str, each: str, entry: TensorEntry, state: State
) -> HereOfTensor:
    saved = moment_name(name, each)

    def targets(moment: torch.Tensor) -> tuple[Target, ...]:
        return tuple(targets_of(program, name, saved, moment, state=state))

    def make() -> Sequence[Target]:
        moment = room_for(each, entry, state)
        optimizer.state[state.parameter][each] = moment
        return targets(moment)

    described = dataclasses.replace(state, parameter=_without_memory(state.parameter))
    likeness = room_for(each, entry, described)
    return HereOfTensor(told=_told(OPTIMIZER, likeness, targets(likeness)), make=make)


def _without_memory(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False)


def _told(kind: str, tensor: torch.Tensor, targets: Sequence[Target]) -> Told:
    shape = targets[0].global_shape if targets else tuple(tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Told(kind=kind, shape=shape, dtype=dtype, regions=tuple(target.region for target in targets))
