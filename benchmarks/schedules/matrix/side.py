"""One case on one rank: the layout beside one device, step by step, tensor by tensor.

One device is plain torch: the whole batch in one forward and backward, without any code of shardwise. Where the model
draws random numbers, which only shardwise's own streams make independent of the layout, it is shardwise on one rank.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from benchmarks.schedules.matrix.cases import FROM_FILE, PASSES, Case
from benchmarks.schedules.matrix.models import MODELS, batch_of
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.parallel.tensor.slices import cut
from shardwise.plan.sources import GivenSource, breadth_first, source_of
from shardwise.schedule import Placement
from shardwise.schedule.passes.gradients import with_reductions
from shardwise.schedule.passes.recompute import with_recompute
from shardwise.schedule.placement import stages_of_ranks
from shardwise.schedule.torch_csv import write_csv
from shardwise.verify.comparison import errors_of, relative

__all__ = ["STEPS", "TOLERANCE", "Result", "run_case"]

STEPS = 3  # headers are on in the first alone
TOLERANCE = 1e-5  # float32 sums taken in another order, over some layers
RATE = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The largest relative errors of one rank, over all steps; `kinds` are the actions that its row held."""

    loss: float
    gradient: float
    norm: float
    weight: float
    evaluation: float
    kinds: str

    @property
    def worst(self) -> float:
        errors = (self.loss, self.gradient, self.norm, self.weight, self.evaluation)
        return math.inf if any(math.isnan(error) for error in errors) else max(errors)


def run_case(rank: RankContext, case: Case, *, change: Callable[[Program], None] | None = None) -> Result:
    """Train `STEPS` steps both ways. Collective. `change` may break the program, for tests of the test."""
    torch.manual_seed(0)
    one = MODELS[case.model](case.num_blocks)
    with tempfile.TemporaryDirectory() as folder:
        layout = _layout(case, Path(folder))
        model = copy.deepcopy(one)
        batch = batch_of(case.num_samples)
        parts = split(batch, micro_batches=case.micro_batches, replicas=case.dp, weights=weigher(model))
        program = assemble(
            model,
            parts[0][0].inputs,
            layout=layout,
            rank=rank.rank,
            schedule=_passed(layout, case),
            num_micro_batches=case.micro_batches,
        )
    device = _OneDevice(one, parts) if case.model != "dropout" else _OneRank(one, parts, seed=layout.seed)
    if change is not None:
        change(program)
    try:
        return _compare(program, device, parts)
    finally:
        program.close()
        device.close()


def _compare(program: Program, device: _OneDevice | _OneRank, parts: Sequence[Sequence[MicroBatch]]) -> Result:
    mine = parts[program.place.replica]
    loss = gradient = norm = weight = 0.0
    for step in range(STEPS):
        before = {name: p.detach().clone() for name, p in program.parameters.items()}
        whole_before = {name: p.detach().clone() for name, p in device.parameters.items()}
        result = program.step(mine, step=step)
        wanted = device.step(step)
        norm = max(norm, relative(program.gradient_norm(), _norm(device.parameters)))
        gradients = {name: p.grad for name, p in program.parameters.items()}
        wanted_gradients = {name: _part(program, name, device.parameters[name].grad) for name in gradients}
        for parameters in (program.parameters, device.parameters):
            _update(parameters)
        updates = {name: p.detach() - before[name] for name, p in program.parameters.items()}
        wanted_updates = {
            name: _part(program, name, device.parameters[name].detach() - whole_before[name]) for name in updates
        }
        errors = errors_of(
            gradients,
            updates,
            wanted_gradients,
            {name: update for name, update in wanted_updates.items() if update is not None},
            by_sign=False,
            roundings={name: float(w.norm()) * torch.finfo(w.dtype).eps for name, w in before.items()},
        )
        loss = max(loss, relative(result.loss, wanted))
        gradient = max(gradient, *(error.gradient for error in errors))
        weight = max(weight, *(error.update for error in errors))
    row = program.row(len(mine))
    return Result(
        loss=loss,
        gradient=gradient,
        norm=norm,
        weight=weight,
        evaluation=_evaluate(program, device, mine),
        kinds="".join(sorted({str(item.kind) for item in row})),
    )


def _evaluate(program: Program, device: _OneDevice | _OneRank, mine: Sequence[MicroBatch]) -> float:
    """Forward-only, with as many micro-batches as a step and, with one replica, with one less."""
    program.model.eval()
    error = relative(program.evaluate(mine).loss, device.evaluate())
    if program.place.dp == 1:
        fewer = [dataclasses.replace(each, index=m) for m, each in enumerate(mine[1:])]
        error = max(error, relative(program.evaluate(fewer).loss, device.evaluate(skip=1)))
    program.model.train()
    return error


def _norm(parameters: Mapping[str, nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters.values() if p.grad is not None))


def _update(parameters: Mapping[str, nn.Parameter]) -> None:
    """A step of SGD; gradients are gone afterwards."""
    with torch.no_grad():
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=RATE)
            parameter.grad = None


def _part(program: Program, name: str, whole: torch.Tensor | None) -> torch.Tensor | None:
    """What of a whole tensor belongs on this rank."""
    part = program.part_of(name)
    return whole if part is None or whole is None else cut(whole, part, program.place.shard)


class _OneDevice:
    """The model in plain torch."""

    def __init__(self, model: nn.Module, parts: Sequence[Sequence[MicroBatch]]) -> None:
        self._model = model
        self._parts = [each for own in parts for each in own]
        self.parameters = dict(model.named_parameters())

    def step(self, step: int) -> float:
        """The gradients of the whole batch in one forward and backward; its loss."""
        loss = self._loss(self._parts)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def evaluate(self, skip: int = 0) -> float:
        """The mean loss without the first `skip` micro-batches."""
        self._model.eval()
        with torch.no_grad():
            loss = float(self._loss(self._parts[skip:]))
        self._model.train()
        return loss

    def close(self) -> None:
        """There is nothing to take apart."""

    def _loss(self, parts: Sequence[MicroBatch]) -> torch.Tensor:
        batch = {name: torch.cat([each.inputs[name] for each in parts]) for name in parts[0].inputs}
        loss: torch.Tensor = self._model(**batch)["loss"]
        return loss


class _OneRank:
    """The model under a layout of one rank, by the same micro-batches."""

    def __init__(self, model: nn.Module, parts: Sequence[Sequence[MicroBatch]], *, seed: int) -> None:
        self._parts = [each for own in parts for each in own]
        self._program = assemble(model, self._parts[0].inputs, layout=Layout(seed=seed), rank=0)
        self.parameters = self._program.parameters

    def step(self, step: int) -> float:
        """The gradients of all micro-batches, accumulated; the mean loss."""
        return self._program.step(self._parts, step=step).loss

    def evaluate(self, skip: int = 0) -> float:
        """The mean loss without the first `skip` micro-batches."""
        self._program.model.eval()
        kept = [dataclasses.replace(each, index=m) for m, each in enumerate(self._parts[skip:])]
        loss = self._program.evaluate(kept).loss
        self._program.model.train()
        return loss

    def close(self) -> None:
        """Take the program out of the model."""
        self._program.close()


def _layout(case: Case, folder: Path) -> Layout:
    schedule = case.schedule
    if schedule == FROM_FILE:
        ranks = stages_of_ranks(Placement.V, num_ranks=case.pp, chunks=case.chunks)
        path = folder / "schedule.csv"
        path.write_text(write_csv(breadth_first(ranks, case.micro_batches)), encoding="utf-8")
        schedule = str(path)
    return Layout(
        dp=case.dp,
        pp=case.pp,
        tp=case.tp,
        schedule=schedule,
        chunks=case.chunks,
        micro_batches=case.micro_batches,
        seed=3,
    )


def _passed(layout: Layout, case: Case) -> GivenSource | None:
    """The layout's schedule behind a pass; None where there is none: the layout's own is used."""
    if case.composition not in PASSES:
        return None
    source = source_of(layout)
    assert source is not None
    schedule = source(case.micro_batches)
    if case.composition == "recompute":
        return GivenSource(schedule=with_recompute(schedule, range(0, schedule.num_stages, 2)))
    return GivenSource(schedule=with_reductions(schedule))
