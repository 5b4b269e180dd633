"""The two sides of a verification as they run on ranks: the layout, and the reference on one device.

Both take the same job and answer plain values, or names of tensors in files. The reference accumulates the same
micro-batches, with the whole model or with a stage of it at a time; it also runs the whole batch in one plain forward
and backward, without any code of ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.execute.assemble import assemble
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.expert_ranks import ExpertStep
from shardwise.execute.norms import sum_of_squares
from shardwise.execute.program import Program
from shardwise.execute.split_proof import SplitProof
from shardwise.execute.streamed import run_streamed
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout, Techniques
from shardwise.trace.objective import objective
from shardwise.verify.copies import Copy, copies_of
from shardwise.verify.job import Job, batch_of, couples_samples, model_of, optimizer_over, unfilled_model_of
from shardwise.verify.optimizers import normalised_by, program_optimizer
from shardwise.verify.probe import Outputs, probing, streamed_probe
from shardwise.verify.stored import StoredTensors

__all__ = ["Job", "Side", "Whole", "run_side", "run_streamed_side", "run_whole"]


@dataclasses.dataclass(kw_only=True)
class Side:
    """What one rank answers: losses of all steps, and what it owns after the first and the last one."""

    losses: list[float]
    norm: float
    normalised: bool | frozenset[str] = False  # parameters that the optimizer normalises element by element
    gradients: Mapping[str, torch.Tensor | None]  # one that is missing is None
    updates: Mapping[str, torch.Tensor]
    roundings: dict[str, float]  # norm of one unit in the last place of every stored weight
    calls: list[tuple[str, int]]
    random: bool
    edges: list[tuple[int, int, int, str]] = dataclasses.field(default_factory=list)
    outputs: Outputs = dataclasses.field(default_factory=dict)  # if probed
    couples: str = ""  # why samples of the batch influence each other, where something is known to do that
    num_stages: int = 1  # in which a streamed model is run
    shard: int = 0
    copies: Mapping[str, Copy] = dataclasses.field(default_factory=dict)  # gradients that other ranks answer
    tensor: TensorPlan | None = None  # how units are divided among shards; tensors that are, come in parts
    expert: int = 0  # which of the ranks that divide experts
    experts: ExpertPlan | None = None  # how experts are divided; tensors that are, come in parts
    expert_step: ExpertStep | None = None  # what they did in the last step
    context: tuple[str, ...] = ()  # how units work on own tokens of sequences, in words
    split_proofs: tuple[SplitProof, ...] = ()  # of units, where the schedule splits backwards


@dataclasses.dataclass(kw_only=True)
class Whole:
    """The whole batch in one forward: its loss and its gradients."""

    loss: float
    gradients: dict[str, torch.Tensor | None]


def run_side(
    context: RankContext, job: Job, layout: Layout, micro_batches: int, probe: bool, folder: Path | None = None
) -> Side:
    """One rank of `layout`; the reference is the layout of one rank with as many micro-batches as all replicas have.

    With `folder` the tensors are written there, of one step, and nothing but weights and gradients is held.
    """
    torch.manual_seed(0)
    model, fill = model_of(job)
    parts = _parts(job, model, micro_batches, layout)
    program = assemble(
        model,
        parts[0][0].inputs,
        layout=layout,
        rank=context.rank,
        loss=job.loss,
        units=job.units,
        device=job.device,
        fill=fill,
        experts=job.experts if layout.ep > 1 else None,
        tensor=job.tensor if layout.tp > 1 else None,
        num_micro_batches=micro_batches,
        techniques=_techniques(job, layout),
    )
    mine = parts[program.place.replica]
    nothing: Outputs = {}
    with probing(program, mine) if probe else contextlib.nullcontext(nothing) as outputs:
        if folder is None:
            side = _steps(job, program, mine, on_host=layout.offloads_optimizer)
        else:
            side = _stored_step(job, program, mine, folder)
    side.outputs = outputs
    side.couples = couples_samples(model, job.batch)
    if program.divided is not None:
        side.shard, side.tensor = program.divided.shard, program.divided.plan
    if program.experts is not None:
        side.expert, side.experts = program.experts.rank, program.experts.plan
    side.split_proofs = program.split_proofs
    side.context = () if program.context is None else tuple(program.context.plan.lines())
    program.close()
    return side


def _techniques(job: Job, layout: Layout) -> Techniques | None:
    """Of the layout's side all that the job asks for; the reference computes in the same dtypes."""
    if job.techniques is None:
        return None
    if layout == job.layout:  # what compression loses is no error of the layout
        return dataclasses.replace(job.techniques, communication=job.techniques.communication.exact)
    return Techniques(precision=job.techniques.precision)


def _parts(job: Job, model: nn.Module, micro_batches: int, layout: Layout) -> Sequence[Sequence[MicroBatch]]:
    return split(
        batch_of(job),
        micro_batches=micro_batches,
        replicas=layout.num_replicas,
        weights=job.weight or weigher(model),
        batch_dims=job.batch_dims,
        together=job.together,
        shares=layout.shares,
    )


def _steps(job: Job, program: Program, mine: Sequence[MicroBatch], *, on_host: bool) -> Side:
    before = {name: value.clone() for name, value in program.values() if program.owns(name)}
    held = [state.parameter for state in program.states.values()]
    optimizer = program_optimizer(job, program, on_host=on_host)
    losses: list[float] = []
    experts: ExpertStep | None = None
    norm = 0.0
    gradients: dict[str, torch.Tensor | None] = {}
    copies: Mapping[str, Copy] = {}
    for step in range(job.steps):
        result = program.step(mine, step=step)
        losses.append(result.loss)
        experts = result.experts
        if step == 0:
            norm = program.gradient_norm()
            copies = copies_of(program)
            gradients = {
                name: None if gradient is None else gradient.detach().clone()
                for name, gradient in program.gradients()
                if name in before
            }
        scaled = program.numerics.loss_scale is not None
        accepted = not scaled or program.accepts(norm if step == 0 else program.gradient_norm())
        if optimizer is not None and accepted:
            optimizer.step()
        program.updated()
        for parameter in held:
            parameter.grad = None
    updates = {name: value - before[name] for name, value in program.values() if name in before}
    return Side(
        losses=losses,
        expert_step=experts,
        norm=norm,
        gradients=gradients,
        copies=copies,
        updates=updates,
        roundings={name: _rounding(w) * job.steps for name, w in before.items()},
        calls=_calls(program),
        random=program.random,
        edges=_edges(program),
        normalised=normalised_by(job, program),
    )


def _stored_step(job: Job, program: Program, mine: Sequence[MicroBatch], folder: Path) -> Side:
    """One step; gradients and updates go to files, one parameter after another."""
    result = program.step(mine, step=0)
    norm = program.gradient_norm()
    copies = copies_of(program)
    stored = _Stored(job, folder / f"rank{program.place.rank}")
    parameters = program.parameters
    for (name, value), (_, gradient) in zip(program.values(), program.gradients(), strict=True):
        if program.owns(name):
            stored.take(name, nn.Parameter(value, requires_grad=False), gradient)
        parameters[name].grad = None
    return Side(
        losses=[result.loss],
        expert_step=result.experts,
        norm=norm,
        copies=copies,
        gradients=stored.gradients,
        updates=stored.updates,
        normalised=job.optimizer == "adamw",
        roundings=stored.roundings,
        calls=_calls(program),
        random=program.random,
        edges=_edges(program),
    )


def run_streamed_side(context: RankContext, job: Job, micro_batches: int, stage_bytes: int, folder: Path) -> Side:
    """The reference on one device that holds about `stage_bytes` of parameters at once, and no more than an eighth of
    the model; tensors are written to `folder`."""
    torch.manual_seed(0)
    model, fill = unfilled_model_of(job)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    stored = _Stored(job, folder)
    outputs: Outputs = {}
    streamed = run_streamed(
        model,
        _parts(job, model, micro_batches, Layout())[0],
        fill=fill,
        take=stored.take,
        stage_bytes=min(stage_bytes, model_bytes // 8),
        loss=job.loss,
        units=job.units,
        seed=job.layout.seed,
        device=job.device,
        watch=streamed_probe(model, outputs),
    )
    return Side(
        losses=[streamed.loss],
        norm=math.sqrt(stored.squares),
        gradients=stored.gradients,
        updates=stored.updates,
        normalised=job.optimizer == "adamw",
        roundings=stored.roundings,
        calls=list(streamed.calls),
        random=streamed.random,
        outputs=outputs,
        num_stages=streamed.num_stages,
    )


class _Stored:
    """Takes a parameter with its gradient, writes the gradient and the update of one optimizer step."""

    def __init__(self, job: Job, folder: Path) -> None:
        self._job = job
        self.gradients = StoredTensors(_made(folder / "gradients"))
        self.updates = StoredTensors(_made(folder / "updates"))
        self.roundings: dict[str, float] = {}
        self.squares = 0.0  # of all gradients

    def take(self, name: str, parameter: nn.Parameter, gradient: torch.Tensor | None = None) -> None:
        """Write what `parameter` becomes by its gradient, or this one; both are of no use afterwards."""
        before = parameter.detach()
        self.roundings[name] = _rounding(before) * self._job.steps
        gradient, parameter.grad = parameter.grad if gradient is None else gradient, None
        if gradient is None:
            self.updates.put(name, torch.zeros_like(before))
            return
        self.gradients.put(name, gradient)
        self.squares += float(sum_of_squares([gradient]))
        after = nn.Parameter(before.clone())
        after.grad = gradient
        optimizer_over(self._job, [after]).step()
        self.updates.put(name, after.detach().sub_(before))


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def run_whole(context: RankContext, job: Job) -> Whole:
    """The whole batch in one plain forward and backward."""
    model, fill = model_of(job)
    if fill is not None:
        fill(model, [name for name, _ in model.named_parameters()])
    loss = objective(model, batch_of(job), job.loss)
    torch.autograd.backward([loss])
    gradients = {name: None if p.grad is None else p.grad.detach() for name, p in model.named_parameters()}
    return Whole(loss=float(loss.detach()), gradients=gradients)


def _rounding(weight: torch.Tensor) -> float:
    eps = torch.finfo(weight.dtype).eps if weight.dtype.is_floating_point else 0.0
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64)) * eps if eps else 0.0


def _calls(program: Program) -> list[tuple[str, int]]:
    return [(node.name, node.call) for node in program.tape.flow.calls]


def _edges(program: Program) -> list[tuple[int, int, int, str]]:
    flow = program.tape.flow
    found: list[tuple[int, int, int, str]] = []
    for source, target in program.cut.edges:
        values = [v for v, to in program.cut.stages[source].sends if to == target]
        what = ", ".join(f"{flow.nodes[flow.values[v].node].label} {list(flow.values[v].shape)}" for v in values)
        found.append((source, target, program.cut.edge_bytes[(source, target)], what))
    return found
