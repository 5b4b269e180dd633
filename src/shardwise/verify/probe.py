"""Sum and norm of what every unit call returns, to find the first that differs. Knows hooks; runs nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten

from shardwise.execute.batches import MicroBatch
from shardwise.execute.program import Program
from shardwise.execute.streamed import Watch
from shardwise.parallel.tensor.divided_logits import DividedLogits
from shardwise.parallel.tensor.sequence_shard import SequenceShard
from shardwise.plan.cut import StageCut
from shardwise.schedule import Action, Kind
from shardwise.trace.absent import Absent
from shardwise.trace.tape import Tape

__all__ = ["Outputs", "probing", "streamed_probe"]

Outputs = dict[tuple[int, str, int], tuple[float, float]]  # (micro-batch, unit, call) -> (sum, norm)

_Place = Callable[[str], tuple[int, int] | None]  # unit that has run here -> (micro-batch, call)


@contextlib.contextmanager
def probing(program: Program, mine: Sequence[MicroBatch]) -> Iterator[Outputs]:
    """Note what every present unit returns in the first forward of each micro-batch through each stage."""
    here = {stage: _calls_of(program.cut.stages[stage], program.tape) for stage in program.place.stages}
    units = {unit: calls for each in here.values() for unit, calls in each.items()}
    row = program.row(len(mine))
    forwards = [each for each in row if isinstance(each, Action) and each.kind is Kind.F]
    pending = {
        unit: [(mine[f.micro_batch].index, call) for f in forwards for call in here[f.stage].get(unit, ())]
        for unit in units
    }

    def place(unit: str) -> tuple[int, int] | None:
        return pending[unit].pop(0) if pending[unit] else None

    outputs: Outputs = {}
    with _hooked(program.model, units, place, outputs):
        yield outputs


def streamed_probe(model: nn.Module, outputs: Outputs) -> Watch:
    """A watch of a streamed step that notes what the units of each stage return."""

    @contextlib.contextmanager
    def watch(micro_batch: MicroBatch, stage: StageCut, tape: Tape) -> Iterator[None]:
        here = _calls_of(stage, tape)

        def place(unit: str) -> tuple[int, int] | None:
            return (micro_batch.index, here[unit].pop(0)) if here[unit] else None

        with _hooked(model, here, place, outputs):
            yield

    return watch


def _calls_of(stage: StageCut, tape: Tape) -> dict[str, list[int]]:
    here: dict[str, list[int]] = {}
    for node in stage.calls:
        here.setdefault(tape.flow.nodes[node].name, []).append(tape.flow.nodes[node].call)
    return here


@contextlib.contextmanager
def _hooked(model: nn.Module, units: dict[str, list[int]], place: _Place, outputs: Outputs) -> Iterator[None]:
    def watch(unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
            if any(isinstance(tensor, (Absent, FakeTensor)) for tensor in tensors):
                return
            found = place(unit)
            if found is not None:
                outputs[(found[0], unit, found[1])] = _sum_and_norm(tensors)

        return hook

    handles = [model.get_submodule(unit).register_forward_hook(watch(unit)) for unit in units]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sum_and_norm(tensors: Sequence[torch.Tensor]) -> tuple[float, float]:
    with torch._C.DisableTorchFunction(), torch.no_grad():
        found = [_sum_and_square(tensor) for tensor in tensors if tensor.is_floating_point()]
        return sum(summed for summed, _ in found), sum(square for _, square in found) ** 0.5


def _sum_and_square(tensor: torch.Tensor) -> tuple[float, float]:
    """Of all elements; collective, where the ranks of a group have parts of them."""
    groups = []
    while isinstance(tensor, (DividedLogits, SequenceShard)):
        groups.append(tensor.group if isinstance(tensor, DividedLogits) else tensor.region.group)
        tensor = tensor.local
    local = tensor.double()
    both = torch.stack([local.sum(), local.square().sum()])
    for group in groups:
        both = group.all_reduce(both)
    return float(both[0]), float(both[1])
