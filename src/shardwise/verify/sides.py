"""The two sides of a verification as they run on ranks: the layout, and the reference on one device.

Both take the same job and answer plain values. The reference accumulates the same micro-batches; it also runs the
whole batch in one plain forward and backward, without any code of ours.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.execute.assemble import assemble, fill_from
from shardwise.execute.batches import MicroBatch, split
from shardwise.execute.program import Program
from shardwise.execute.weights import weigher
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.trace.absent import Absent
from shardwise.trace.deferred import defer
from shardwise.trace.objective import LossFunction, objective
from shardwise.trace.placing import place as place_values

__all__ = ["Job", "Side", "Whole", "run_side", "run_whole"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides run. `model` is a module, or a factory of one."""

    model: nn.Module | Callable[[], nn.Module]
    batch: Any
    loss: LossFunction | None
    layout: Layout
    micro_batches: int  # of one replica
    steps: int
    optimizer: str
    learning_rate: float
    dtype: torch.dtype | None
    batch_dims: Mapping[str, int]
    units: tuple[str, ...]
    weight: Callable[[Any], float] | None
    device: str = "cpu"


@dataclasses.dataclass(kw_only=True)
class Side:
    """What one rank answers: losses of all steps, and what it owns after the first and the last one."""

    losses: list[float]
    norm: float
    gradients: dict[str, torch.Tensor | None]
    updates: dict[str, torch.Tensor]
    roundings: dict[str, float]  # norm of one unit in the last place of every stored weight
    calls: list[tuple[str, int]]
    edges: list[tuple[int, int, int, str]]
    random: bool
    outputs: dict[tuple[int, str, int], tuple[float, float]]  # (micro-batch, unit, call) -> (sum, norm), if probed


@dataclasses.dataclass(kw_only=True)
class Whole:
    """The whole batch in one forward: its loss and its gradients."""

    loss: float
    gradients: dict[str, torch.Tensor | None]


def run_side(context: RankContext, job: Job, layout: Layout, micro_batches: int, probe: bool) -> Side:
    """One rank of `layout`; the reference is the layout of one rank with as many micro-batches as all replicas have."""
    torch.manual_seed(0)
    model, fill = _model(job)
    batch = _batch(job)
    parts = split(
        batch,
        micro_batches=micro_batches,
        replicas=layout.dp,
        weights=job.weight or weigher(model),
        batch_dims=job.batch_dims,
    )
    program = assemble(
        model,
        parts[0][0].inputs,
        layout=layout,
        rank=context.rank,
        loss=job.loss,
        units=job.units,
        device=job.device,
        fill=fill,
    )
    mine = parts[program.place.replica]
    with _probing(program, mine, probe) as outputs:
        side = _steps(job, program, mine)
    side.outputs = outputs
    program.close()
    return side


def _steps(job: Job, program: Program, mine: Sequence[MicroBatch]) -> Side:
    owned = {name: p for name, p in program.parameters.items() if program.owns(name)}
    before = {name: p.detach().clone() for name, p in owned.items()}
    held = [p for p in program.parameters.values() if p.requires_grad]
    optimizer = _optimizer(job, held)
    losses: list[float] = []
    norm = 0.0
    gradients: dict[str, torch.Tensor | None] = {}
    for step in range(job.steps):
        losses.append(program.step(mine, step=step).loss)
        if step == 0:
            norm = program.gradient_norm()
            gradients = {name: None if p.grad is None else p.grad.detach().clone() for name, p in owned.items()}
        if optimizer is not None:
            optimizer.step()
        for parameter in held:
            parameter.grad = None
    return Side(
        losses=losses,
        norm=norm,
        gradients=gradients,
        updates={name: p.detach() - before[name] for name, p in owned.items()},
        roundings={name: float(w.double().norm()) * _unit(w.dtype) * job.steps for name, w in before.items()},
        calls=[(node.name, node.call) for node in program.tape.flow.calls],
        edges=_edges(program),
        random=program.random,
        outputs={},
    )


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def run_whole(context: RankContext, job: Job) -> Whole:
    """The whole batch in one plain forward and backward."""
    model, fill = _model(job)
    if fill is not None:
        fill(model, [name for name, _ in model.named_parameters()])
    batch = _batch(job)
    loss = objective(model, batch, job.loss)
    torch.autograd.backward([loss])
    gradients = {name: None if p.grad is None else p.grad.detach() for name, p in model.named_parameters()}
    return Whole(loss=float(loss.detach()), gradients=gradients)


def _model(job: Job) -> tuple[nn.Module, Any]:
    """The model on this rank and how to fill it: shared tensors are copied where they are kept."""
    if isinstance(job.model, nn.Module):
        model = job.model
        if job.dtype is not None:
            model = model.to(job.dtype)
        for parameter in model.parameters():
            parameter.grad = None
        _as_constructed(model)
        return _own_values(model), None
    factory = job.model
    dtype = job.dtype
    blueprint = defer(
        factory if dtype is None else lambda: factory().to(dtype), seed=job.layout.seed, device=job.device
    )
    model = blueprint.module
    place_values(model, blueprint.materialize([name for name, _ in model.named_buffers(remove_duplicate=False)]))
    return model, fill_from(blueprint.materialize, job.device)


def _as_constructed(model: nn.Module) -> None:
    """Unpickling constructs nothing, and transformers notes only of constructed classes which outputs they record."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    registry = vars(recording).get("_CAN_RECORD_REGISTRY") if recording is not None else None
    if registry is None:
        return
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None)
        if isinstance(recorded, dict):
            registry[module] = recorded


def _own_values(model: nn.Module) -> nn.Module:
    """Parameters that are read-only or shared with other ranks are copied before they are trained."""
    return copy.deepcopy(model)


def _batch(job: Job) -> Any:
    def own(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().to(job.device, copy=True)
        return leaf.to(job.dtype) if job.dtype is not None and leaf.is_floating_point() else leaf

    return tree_map(own, job.batch)


def _optimizer(job: Job, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer | None:
    if not parameters:
        return None
    if job.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=job.learning_rate)
    return torch.optim.SGD(parameters, lr=job.learning_rate)


def _edges(program: Program) -> list[tuple[int, int, int, str]]:
    flow = program.tape.flow
    found: list[tuple[int, int, int, str]] = []
    for source, target in program.cut.edges:
        values = [v for v, to in program.cut.stages[source].sends if to == target]
        what = ", ".join(f"{flow.nodes[flow.values[v].node].label} {list(flow.values[v].shape)}" for v in values)
        found.append((source, target, program.cut.edge_bytes[(source, target)], what))
    return found


@contextlib.contextmanager
def _probing(
    program: Program, mine: Sequence[MicroBatch], probe: bool
) -> Iterator[dict[tuple[int, str, int], tuple[float, float]]]:
    """Note sum and norm of what every present unit returns in the first step."""
    outputs: dict[tuple[int, str, int], tuple[float, float]] = {}
    here: dict[str, list[int]] = {}
    for node in program.cut.stages[program.place.stage].calls:
        flow_node = program.tape.flow.nodes[node]
        here.setdefault(flow_node.name, []).append(flow_node.call)
    counts = dict.fromkeys(here, 0)

    def watch(unit: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor)]
            if any(isinstance(tensor, (Absent, FakeTensor)) for tensor in tensors):
                return
            number, place = divmod(counts[unit], len(here[unit]))
            counts[unit] += 1
            if number < len(mine):
                with torch._C.DisableTorchFunction(), torch.no_grad():
                    floats = [tensor.double() for tensor in tensors if tensor.is_floating_point()]
                    summed = sum(float(tensor.sum()) for tensor in floats)
                    norm = sum(float(tensor.square().sum()) for tensor in floats) ** 0.5
                outputs[(mine[number].index, unit, here[unit][place])] = (summed, norm)

        return hook

    handles = [program.model.get_submodule(u).register_forward_hook(watch(u)) for u in here] if probe else []
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
