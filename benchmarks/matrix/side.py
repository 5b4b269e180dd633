"""One case on one rank: the layout beside one device, step by step, tensor by tensor.

One device is plain torch: the whole batch in one forward and backward, torch's own optimizer, without any code of
shardwise. What a rank holds (parameters, gradients, and the elements that its optimizer updates) is held against the
same elements of one device, and the ranks' elements together must be all there are.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn

from benchmarks.matrix.cases import Case
from benchmarks.matrix.models import Decoder, batch_of
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.states import State
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.slices import cut
from shardwise.train.optimizer import optimizer_over
from shardwise.train.run_tables import TrainingOptions
from shardwise.train.update import update
from shardwise.verify.comparison import errors_of, relative

__all__ = ["STEPS", "TOLERANCE", "Plans", "Result", "plans_for", "run_case"]

STEPS = 3
TOLERANCE = 1e-5  # float32 sums taken in another order, over some layers
CLIP = 0.15  # a fraction of every norm that occurs
_RATE, _BETAS, _DECAY = 0.05, (0.9, 0.95), 0.1
_EPSILON = 1e-2  # as large as an element of a gradient: AdamW's update is then no sign, and differs as gradients do


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """The largest relative errors of one rank, over all steps; `missing` are parameters of which no rank of its group
    updates some element, or of which elements are updated twice."""

    loss: float
    gradient: float
    norm: float
    weight: float
    evaluation: float
    smallest_norm: float
    missing: tuple[str, ...] = ()

    @property
    def worst(self) -> float:
        errors = (self.loss, self.gradient, self.norm, self.weight, self.evaluation)
        return math.inf if self.missing or any(math.isnan(error) for error in errors) else max(errors)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plans:
    """How two shards divide the blocks of the model, and two ranks its experts; proven once for all cases."""

    tensor: TensorPlan | None = None
    experts: ExpertPlan | None = None


def plans_for(cases: Sequence[Case]) -> Plans:
    """What the cases need to be proven, in this process."""
    inputs = batch_of(2)
    divides = [case for case in cases if case.layout.tp > 1]
    shares = [case for case in cases if case.layout.ep > 1]
    return Plans(
        tensor=plan_tensor(_model(divides[0]), inputs, tp=divides[0].layout.tp) if divides else None,
        experts=plan_experts(_model(shares[0]), inputs, ep=shares[0].layout.ep) if shares else None,
    )


def run_case(rank: RankContext, case: Case, plans: Plans, *, change: Callable[[Program], None] | None = None) -> Result:
    """Train `STEPS` steps both ways. Collective. `change` may break the program, for tests of the test."""
    one, layout = _model(case), case.layout
    model = copy.deepcopy(one)
    parts = split(
        batch_of(case.num_samples),
        micro_batches=case.micro_batches,
        replicas=layout.num_replicas,
        weights=weigher(model),
    )
    inputs = parts[0][0].inputs
    program = assemble(
        model,
        inputs,
        layout=layout,
        rank=rank.rank,
        num_micro_batches=case.micro_batches,
        tensor=plans.tensor if layout.tp > 1 else None,
        experts=plans.experts if layout.ep > 1 else None,
        techniques=case.techniques,
    )
    options = TrainingOptions(
        steps=STEPS,
        global_batch=case.num_samples,
        optimizer="sgd" if case.clips else "adamw",  # AdamW would forgive a wrong factor
        learning_rate=_RATE,
        schedule="constant",
        betas=_BETAS,
        epsilon=_EPSILON,
        weight_decay=_DECAY,
        clip=CLIP if case.clips else 0.0,
    )
    if change is not None:
        change(program)
    try:
        return _compare(program, _OneDevice(one, parts, options), parts, options)
    finally:
        program.close()


def _model(case: Case) -> Decoder:
    torch.manual_seed(0)
    return Decoder(case.num_blocks, experts=case.has_experts)


def _compare(
    program: Program, device: _OneDevice, parts: Sequence[Sequence[MicroBatch]], options: TrainingOptions
) -> Result:
    mine = parts[program.place.replica]
    optimizer = optimizer_over(
        program.states,
        name=options.optimizer,
        betas=options.betas,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
    )
    loss = gradient = norm = weight = 0.0
    smallest = math.inf
    for step in range(STEPS):
        states = program.states
        before = {name: state.parameter.detach().clone() for name, state in states.items()}
        result = program.step(mine, step=step)
        wanted = device.step()
        own_norm = program.gradient_norm()
        norm, smallest = max(norm, relative(own_norm, wanted.norm)), min(smallest, wanted.norm)
        gradients = {name: _copied(state.parameter.grad) for name, state in states.items()}
        wanted_gradients = {name: _part(program, name, state, wanted.gradients[name]) for name, state in states.items()}
        update(program, optimizer, options, step=step, norm=own_norm)
        for state in states.values():
            state.parameter.grad = None
        updates = {name: state.parameter.detach() - before[name] for name, state in states.items()}
        wanted_updates = {name: _part(program, name, state, wanted.updates[name]) for name, state in states.items()}
        errors = errors_of(
            gradients,
            updates,
            wanted_gradients,
            {name: each for name, each in wanted_updates.items() if each is not None},
            by_sign=False,
            roundings={name: float(w.norm()) * torch.finfo(w.dtype).eps for name, w in before.items()},
        )
        loss = max(loss, relative(result.loss, wanted.loss))
        gradient = max(gradient, *(error.gradient for error in errors))
        weight = max(weight, *(error.update for error in errors), _held_error(program, device))
    return Result(
        loss=loss,
        gradient=gradient,
        norm=norm,
        weight=weight,
        evaluation=_evaluate(program, device, mine),
        smallest_norm=smallest,
        missing=_missing(program),
    )


def _evaluate(program: Program, device: _OneDevice, mine: Sequence[MicroBatch]) -> float:
    program.model.eval()
    error = relative(program.evaluate(mine).loss, device.evaluate())
    program.model.train()
    return error


def _held_error(program: Program, device: _OneDevice) -> float:
    """Of the parameters that this rank computes with, where they are whole between steps."""
    worst = 0.0
    for name, parameter in program.parameters.items():
        if parameter.untyped_storage().nbytes() < parameter.numel() * parameter.element_size():
            continue
        state = State(parameter=parameter, shape=tuple(parameter.shape))
        wanted = _part(program, name, state, device.parameters[name].detach())
        assert wanted is not None
        difference = float((parameter.detach() - wanted).norm())
        worst = max(worst, difference / max(float(wanted.norm()), 1e-12))
    return worst


def _missing(program: Program) -> tuple[str, ...]:
    """What is updated by none, or by two, of the ranks that divide one replica's state. Collective."""
    place = program.place
    lacking = {name: p.numel() for name, p in program.parameters.items() if p.requires_grad}
    runs = {name: (state.start, state.start + state.parameter.numel()) for name, state in program.states.items()}
    told: list[tuple[int, dict[str, int], dict[str, tuple[int, int]]] | None] = [None] * place.world_size
    dist.all_gather_object(told, (place.rank, lacking, runs))
    peers = [each for each in told if each is not None and each[0] in place.parts()]
    found: list[str] = []
    for name, size in lacking.items():
        held = sorted({of_rank[name] for _, _, of_rank in peers if name in of_rank})  # equal ones: replicated
        ends = [0, *(stop for _, stop in held)]
        if [start for start, _ in held] != ends[:-1] or ends[-1] != size:
            found.append(name)
    return tuple(found)


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().clone()


def _part(program: Program, name: str, state: State, whole: torch.Tensor | None) -> torch.Tensor | None:
    """What of a whole tensor is in a state of this rank."""
    if whole is None:
        return None
    for part, rank in ((program.part_of(name), program.place.shard), (program.experts_of(name), program.place.expert)):
        whole = whole if part is None else cut(whole, part, rank)
    held = whole.reshape(-1)[state.start : state.start + state.parameter.numel()]
    return held.view(state.parameter.shape)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """What one device did in a step; gradients and their norm are those before clipping."""

    loss: float
    norm: float
    gradients: Mapping[str, torch.Tensor | None]
    updates: Mapping[str, torch.Tensor]


class _OneDevice:
    """The model in plain torch."""

    def __init__(self, model: nn.Module, parts: Sequence[Sequence[MicroBatch]], options: TrainingOptions) -> None:
        self._model = model
        self._batch = {
            name: torch.cat([each.inputs[name] for own in parts for each in own]) for name in parts[0][0].inputs
        }
        self._clip = options.clip
        self.parameters = dict(model.named_parameters())
        matrices = [p for p in self.parameters.values() if p.dim() >= 2]
        vectors = [p for p in self.parameters.values() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer: torch.optim.Optimizer
        if options.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(groups, lr=_RATE)
        else:
            self._optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, eps=_EPSILON)

    def step(self) -> _Step:
        """A step with the whole batch in one forward and backward."""
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        gradients = {name: _copied(p.grad) for name, p in self.parameters.items()}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values() if g is not None))
        if self._clip and norm > self._clip:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._clip / norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        updates = {name: p.detach() - before[name] for name, p in self.parameters.items()}
        return _Step(loss=float(loss.detach()), norm=norm, gradients=gradients, updates=updates)

    def evaluate(self) -> float:
        """The mean loss of the same batch."""
        self._model.eval()
        with torch.no_grad():
            return float(self._loss())

    def _loss(self) -> torch.Tensor:
        loss: torch.Tensor = self._model(**self._batch)["loss"]
        return loss
