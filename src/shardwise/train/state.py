"""Saving and resuming a run: parameters, optimizer state and buffers by name, each written by one rank.

Tensors are saved whole under their names, so any layout resumes what any other saved. The state of the run is the
step and what the order of data depends on; random numbers are keyed by the step and need nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn

from shardwise.checkpoint.load import load_into
from shardwise.checkpoint.manifest import TensorEntry
from shardwise.checkpoint.save import Shard, write_rank
from shardwise.checkpoint.source import Source
from shardwise.checkpoint.storage import begin, commit, prune
from shardwise.checkpoint.tensor_file import TORCH_DTYPES
from shardwise.errors import CheckpointError
from shardwise.execute.program import Program
from shardwise.parallel.states import State
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.divided import shards_of, targets_of

__all__ = [
    "check_model",
    "check_state",
    "moment_name",
    "owns_buffer",
    "persistent_buffers",
    "restore",
    "room_for",
    "save",
    "saves",
]

_STEP = "step"  # what torch's optimizers call the number of their updates
_OLDER = "older"  # the weights that the next step is computed with, where they are not the newest


def save(
    root: Path,
    step: int,
    *,
    program: Program,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, object],
    keep: int,
    older: Mapping[str, torch.Tensor] | None = None,
    workers: Workers | None = None,
    of_worker: Iterable[Shard] = (),
) -> None:
    """Write a checkpoint of `step` finished steps. Every rank calls it, on a folder that all share.

    `older` are the weights that the next step is computed with, by name, where they are not the newest. Of several
    `workers` the first saves what a run without workers does, and each what is `of_worker`. It appears whole or not at
    all. Raises CheckpointError.
    """
    rank, world_size = program.place.rank, program.place.world_size
    first_rank = 0 if workers is None else workers.index * world_size
    told = [str(begin(root, step)) if rank + first_rank == 0 else ""]
    if world_size > 1 and first_rank == 0:
        dist.broadcast_object_list(told, src=0)
    if workers is not None:
        told = workers.of_first(told)
    folder = Path(told[0])
    shards = itertools.chain(_shards(program, optimizer, older or {}) if first_rank == 0 else (), of_worker)
    entries = write_rank(folder, first_rank + rank, shards)
    gathered: list[Mapping[str, TensorEntry] | None] = [entries]
    if world_size > 1:
        gathered = [None] * world_size
        dist.gather_object(entries, gathered if rank == 0 else None, dst=0)
    if workers is not None:
        gathered = [each for of_worker_k in workers.values(gathered) for each in of_worker_k]
    if rank + first_rank == 0:
        commit(folder, [each for each in gathered if each is not None], state=dict(state))
        prune(root, keep=keep)
    if world_size > 1:
        dist.barrier()  # nobody goes on, nor looks for the latest, before it is whole
    if workers is not None:
        workers.values(None)


def check_state(source: Source, state: Mapping[str, object]) -> None:
    """A run continues only on the data, order and seed, and with the optimizer, it began with. What a checkpoint does
    not tell does not count. Raises CheckpointError with what differs."""
    saved = source.manifest.state
    differing = [f"{name}={value!r} instead of {saved.get(name)!r}" for name, value in state.items()
                 if saved.get(name, value) != value]  # fmt: skip
    if differing:
        raise CheckpointError(
            "a resumed run has the seed, the global batch, the optimizer and the data it began with, but "
            f"{source.folder} was saved by another: {'; '.join(differing)}; correct them, or start without resuming in "
            "another folder"
        )


def check_model(source: Source, model: nn.Module) -> None:
    """A run continues with the model it began with: the same parameters in the same shapes.

    Raises CheckpointError with the numbers and the first that differs.
    """
    saved = {name: tuple(t.global_shape) for name, t in source.manifest.tensors.items() if t.kind == "parameter"}
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    missing = [name for name in wanted if name not in saved]
    unknown = [name for name in saved if name not in wanted]
    other = [name for name in wanted if name in saved and saved[name] != wanted[name]]
    told = [
        *([f"{len(missing)} of the model's {len(wanted)} are not in it, such as {missing[0]}"] if missing else []),
        *([f"{len(unknown)} of its {len(saved)} are not in the model, such as {unknown[0]}"] if unknown else []),
        *(
            [f"{len(other)} have another shape: {other[0]} was {saved[other[0]]}, is {wanted[other[0]]}"]
            if other
            else []
        ),
    ]
    if told:
        raise CheckpointError(
            f"a resumed run has the model it began with, but the parameters in {source.folder} are others: "
            f"{'; '.join(told)}; set [model] as it was, or start without resuming in another folder"
        )


def restore(
    source: Source,
    *,
    program: Program,
    optimizer: torch.optim.Optimizer | None,
    older: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Put the saved optimizer state and buffers where this rank has them; parameters were filled when built.

    `older` are weights of the next step that are not the newest, written where such were saved, else left alone.
    Raises CheckpointError where something is missing or of another shape.
    """
    saved = source.manifest.tensors
    for name, buffer in program.model.named_buffers():
        if name in saved:
            load_into(source, targets_of(program, name, name, buffer))
    for name, value in (older or {}).items():
        if moment_name(name, _OLDER) in saved:
            load_into(source, targets_of(program, name, moment_name(name, _OLDER), value))
    parameters = program.parameters
    moments = _saved_moments(source)
    for name, state in program.states.items():
        value = state.parameter
        if value.dtype != parameters[name].dtype:  # with more digits than what the model computes with
            load_into(source, targets_of(program, name, name, value.detach(), state=state), cast=True)
        if optimizer is None or name not in moments:
            continue
        made = {each: room_for(each, entry, state) for each, entry in moments[name].items()}
        for each, moment in made.items():
            load_into(source, targets_of(program, name, moment_name(name, each), moment, state=state))
        optimizer.state[value] = made
    program.updated()


def _saved_moments(source: Source) -> dict[str, dict[str, TensorEntry]]:
    """Name of a parameter -> what was saved of an optimizer's state of it, by the optimizer's own names."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for saved, entry in source.manifest.tensors.items():
        if entry.kind == "optimizer":
            _, each, name = saved.split("/", 2)
            if each != _OLDER:
                found.setdefault(name, {})[each] = entry
    return found


def saves(program: Program, name: str) -> bool:
    """Whether this rank writes what it has of a parameter's state: nobody before it has the same."""
    return program.owns_part(name) if program.divides_state(name) else program.owns(name)


def room_for(each: str, entry: TensorEntry, state: State) -> torch.Tensor:
    """A tensor like the state's, or a single number such as a count of steps."""
    single = not entry.global_shape and (len(state.shape) > 0 or each == _STEP)
    size = () if single else tuple(state.parameter.shape)
    return torch.zeros(size, dtype=TORCH_DTYPES[entry.dtype], device=state.parameter.device)


def _shards(
    program: Program, optimizer: torch.optim.Optimizer | None, older: Mapping[str, torch.Tensor]
) -> Iterator[Shard]:
    """What this rank writes: of every tensor that several hold, the first holder writes it."""
    states = program.states
    for name, parameter in program.parameters.items():
        divided = program.divides_state(name)
        state = program.part(name) if divided else states.get(name)
        if (divided and state is None) or not saves(program, name):
            continue
        value = parameter if state is None else state.parameter
        yield from shards_of(program, name, name, value.detach(), kind="parameter", state=state)
        if state is not None and optimizer is not None:
            for each, moment in optimizer.state.get(value, {}).items():
                if torch.is_tensor(moment):
                    saved = moment_name(name, each)
                    yield from shards_of(program, name, saved, moment.detach(), kind="optimizer", state=state)
        if name in older:
            yield from shards_of(program, name, moment_name(name, _OLDER), older[name], kind="optimizer")
    for name, buffer in persistent_buffers(program.model).items():
        if owns_buffer(program, name):
            yield from shards_of(program, name, name, buffer.detach(), kind="buffer")


def moment_name(name: str, each: str) -> str:
    """What `each` of an optimizer's state of a parameter is saved as."""
    return f"optimizer/{each}/{name}"


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that are saved, by name."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def owns_buffer(program: Program, name: str) -> bool:
    """A buffer is written where the first parameter of its module is, or of the closest module that has one."""
    place = program.place
    stage = 0
    prefix = name
    while "." in prefix:
        prefix = prefix.rpartition(".")[0]
        near = [held for held in program.holders if held.startswith(prefix + ".")]
        if near:
            stage = program.holders[near[0]][0]
            break
    return place.owner_of[stage] == place.position and place.replica == 0 and place.context == 0
