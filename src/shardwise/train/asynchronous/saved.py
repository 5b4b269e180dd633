"""Workers in a checkpoint: what the rule keeps, and of every worker what is its own, all by the names of parameters.

    NAME                                 the weights that all workers together stand for: any run goes on from them
    optimizer/exp_avg/NAME               the inner optimizer of worker 0, which a run without workers goes on with
    workers/common/velocity/NAME         what the rule keeps, the same on every worker
    workers/2/optimizer/exp_avg/NAME     the inner optimizer of worker 2
    workers/2/value/NAME                 its own weights, where it is between two exchanges

A run with other workers takes what is there: a worker that was not saved begins at the common weights with the inner
optimizer of worker 0. Knows names and fragments; refuses to know files and folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from shardwise.checkpoint.load import load_into
from shardwise.checkpoint.save import Shard
from shardwise.checkpoint.source import Source
from shardwise.execute.program import Program
from shardwise.train.asynchronous.fragment import Fragment
from shardwise.train.asynchronous.outer import Outer, Travelling
from shardwise.train.asynchronous.workers import Workers
from shardwise.train.divided import shards_of, targets_of
from shardwise.train.state import room_for

__all__ = ["restore_worker", "shards_of_worker", "state_of_workers"]

_COMMON, _MEAN, _VALUE, _OPTIMIZER = "common", "mean", "value", "optimizer"
_STATE = "workers"  # in the state of a checkpoint: steps and tokens since the last exchange, by worker and fragment


def shards_of_worker(
    program: Program, optimizer: torch.optim.Optimizer | None, workers: Workers, outer: Outer
) -> Iterator[Shard]:
    """What this rank writes of its worker, besides what a run without workers saves (which worker 0 writes)."""
    states = program.states
    tensors = {f"{workers.index}/{each}": by_name for each, by_name in _own(outer).items()}
    if workers.index == 0:
        tensors |= {f"{_COMMON}/{each}": by_name for each, by_name in _common(outer).items()}
    elif optimizer is not None:
        for name, state in states.items():
            for each, moment in optimizer.state.get(state.parameter, {}).items():
                if torch.is_tensor(moment):
                    tensors.setdefault(f"{workers.index}/{_OPTIMIZER}/{each}", {})[name] = moment.detach()
    for where, by_name in tensors.items():
        for name, tensor in by_name.items():
            if program.owns_part(name) if program.divides_state(name) else program.owns(name):
                yield from shards_of(program, name, _name(where, name), tensor, kind="other", state=states[name])


def state_of_workers(workers: Workers, outer: Outer) -> dict[str, object]:
    """What a checkpoint's state tells of them. Collective."""
    return {_STATE: workers.values([[fragment.steps, fragment.tokens] for fragment in outer.fragments])}


def restore_worker(
    source: Source, program: Program, optimizer: torch.optim.Optimizer | None, workers: Workers, outer: Outer
) -> None:
    """Put what was saved of this worker and of the rule where this rank has it. Raises CheckpointError."""
    saved, states = source.manifest.tensors, program.states

    def read(where: str, fragment: Fragment) -> torch.Tensor | None:
        """A flat tensor of the fragment, where all of it was saved."""
        if not fragment.names or any(_name(where, name) not in saved for name in fragment.names):
            return None
        flat = torch.zeros(fragment.num_elements, dtype=fragment.dtype)
        for name, view in fragment.views(flat).items():
            load_into(source, targets_of(program, name, _name(where, name), view, state=states[name]))
        return flat

    told = source.manifest.state.get(_STATE)
    for index, fragment in enumerate(outer.fragments):
        own = (*outer.rule.own, *(("start", "sent") if outer.rule.stale else ()))
        names = {**dict.fromkeys(outer.rule.common, _COMMON), **dict.fromkeys(own, str(workers.index))}
        found = {each: read(f"{where}/{each}", fragment) for each, where in names.items()}
        fragment.kept |= {each: flat for each, flat in found.items() if flat is not None}
        mean = read(f"{_COMMON}/{_MEAN}", fragment)
        if mean is not None and "sent" in fragment.kept:
            outer.travelling[index] = Travelling(weighed=mean, tokens=torch.ones(1, dtype=torch.float64))
        value = read(f"{workers.index}/{_VALUE}", fragment)
        fragment.write(fragment.kept["start"] if value is None else value)
        if isinstance(told, list) and workers.index < len(told) and len(told[workers.index]) == len(outer.fragments):
            steps, tokens = told[workers.index][index]
            fragment.steps, fragment.tokens = int(steps), float(tokens)
    if optimizer is not None and workers.index > 0:
        _restore_moments(source, program, optimizer, f"workers/{workers.index}/{_OPTIMIZER}/")
    program.updated()


def _restore_moments(source: Source, program: Program, optimizer: torch.optim.Optimizer, prefix: str) -> None:
    states = program.states
    for saved, entry in source.manifest.tensors.items():
        each, _, name = saved.removeprefix(prefix).partition("/")
        if saved.startswith(prefix) and name in states:
            moment = room_for(each, entry, states[name])
            load_into(source, targets_of(program, name, saved, moment, state=states[name]))
            optimizer.state[states[name].parameter][each] = moment


def _common(outer: Outer) -> dict[str, dict[str, torch.Tensor]]:
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for index, fragment in enumerate(outer.fragments):
        for each in outer.rule.common:
            kept.setdefault(each, {}).update(fragment.views(fragment.kept[each]))
        mean = outer.mean_of(index)
        if mean is not None:
            kept.setdefault(_MEAN, {}).update(fragment.views(mean))
    return kept


def _own(outer: Outer) -> Mapping[str, dict[str, torch.Tensor]]:
    kept: dict[str, dict[str, torch.Tensor]] = {}
    for fragment in outer.fragments:
        for each in (*outer.rule.own, *(("start", "sent") if outer.rule.stale else ())):
            if each in fragment.kept:
                kept.setdefault(each, {}).update(fragment.views(fragment.kept[each]))
        if fragment.steps:
            kept.setdefault(_VALUE, {}).update(fragment.views(fragment.value()))
    return kept


def _name(where: str, name: str) -> str:
    return f"workers/{where}/{name}"
