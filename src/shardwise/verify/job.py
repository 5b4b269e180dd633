"""What both sides of a verification run, and what it takes to run it: the model on a rank, its batch, its optimizer.

Knows where a model's values come from (a live module, a factory's recipes, files); refuses to know layouts and how a
side is run.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from shardwise.checkpoint.source import Source, open_checkpoint, open_safetensors
from shardwise.checkpoint.storage import MANIFEST, complete_steps
from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import TensorPlan
from shardwise.execute.assemble import Fill, fill_from
from shardwise.execute.batches import split
from shardwise.execute.weights import weigher
from shardwise.layout import SYNCHRONISED, Layout, Techniques
from shardwise.parallel.expert.plan_experts import plan_experts
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.written_plan import words_by_hand
from shardwise.trace.deferred import Blueprint, defer
from shardwise.trace.objective import LossFunction
from shardwise.trace.placing import place
from shardwise.train.model import Values, names_in, values_of

__all__ = [
    "Job",
    "batch_of",
    "couples_samples",
    "expert_plan_of",
    "model_of",
    "open_source",
    "optimizer_over",
    "tensor_plan_of",
    "unfilled_model_of",
    "whole_bytes",
]

COPIES = 2  # of the weights that a comparison on one device holds besides them: as they were, and their updates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What both sides run. `model` is a module, or a factory of one; `checkpoint` holds values instead of its own."""

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
    checkpoint: str | None = None
    experts: ExpertPlan | None = None  # of layouts that divide experts
    techniques: Techniques | None = None  # of the layout's side
    tensor: TensorPlan | None = None  # as somebody wrote it, proven; None: rank 0 finds one
    new_head: bool = False  # whether the checkpoint may be without the model's head

    @property
    def together(self) -> bool:
        """Whether replicas share the statistics of a micro-batch, so that one device has it whole."""
        return self.techniques is not None and self.techniques.batch_norm == SYNCHRONISED

    @property
    def all_micro_batches(self) -> int:
        """Of one device that does what all replicas do."""
        return self.micro_batches * (1 if self.together else self.layout.num_replicas)


def model_of(job: Job) -> tuple[nn.Module, Fill | None]:
    """The model on this rank, and how to fill it; None where it has its values (mapped, copied when written)."""
    if not isinstance(job.model, nn.Module) or job.checkpoint is not None:
        return unfilled_model_of(job)
    model = _as_constructed(job.model)
    if job.dtype is not None:
        model = model.to(job.dtype)
    for parameter in model.parameters():
        parameter.grad = None
    return model, None


def unfilled_model_of(job: Job) -> tuple[nn.Module, Fill]:
    """The model without values of its parameters, its buffers real, and how to fill it, one parameter at a time."""
    source = None if job.checkpoint is None else open_source(job.checkpoint)
    initial: Values | None = None
    if isinstance(job.model, nn.Module):
        model = _as_constructed(job.model)
        own = dict(model.named_parameters())
        place(model, {name: _hollow(parameter, job.dtype) for name, parameter in own.items()})
        place(model, {name: _cast(buffer, job.dtype) for name, buffer in model.named_buffers()})
        if source is None:
            return model, fill_from(lambda names: {name: own[name].detach() for name in names}, job.device)
    else:
        blueprint = _blueprint(job)
        model = blueprint.module
        place(model, blueprint.materialize([name for name, _ in model.named_buffers(remove_duplicate=False)]))
        if source is None:
            return model, fill_from(blueprint.materialize, job.device)
        initial = blueprint.materialize if job.new_head else None
    values, saved = values_of(source, model, initial), names_in(source, model)
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer.copy_(values([name])[name])
    return model, fill_from(values, job.device, read=values.read)


def open_source(folder: str) -> Source:
    """A checkpoint of a run (a step's folder, or the folder of steps: the latest), or a plain safetensors model."""
    path = Path(folder)
    ours = path.is_dir() and ((path / MANIFEST).is_file() or bool(complete_steps(path)))
    return open_checkpoint(path) if ours else open_safetensors(path)


def whole_bytes(job: Job) -> int:
    """Bytes that the whole model takes on one device: weights, gradients, and two copies to compare.

    A factory is run for it, without making values.
    """
    model = job.model if isinstance(job.model, nn.Module) else _blueprint(job).module
    total = 0
    for parameter in model.parameters():
        dtype = job.dtype if job.dtype is not None and parameter.is_floating_point() else parameter.dtype
        total += parameter.numel() * dtype.itemsize * (1 + COPIES + parameter.requires_grad)
    return total


def tensor_plan_of(job: Job, tp_plan: GivenPlan | None) -> TensorPlan | None:
    """A plan of shards that was given, or set on a live model, proven in this process; None where there is none.

    Raises `ModelError` or `LayoutError` where it is wrong. (What a factory sets on its model, rank 0 sees.)
    """
    by_hand = isinstance(job.model, nn.Module) and words_by_hand(job.model) is not None
    if job.layout.tp == 1 or (tp_plan is None and not by_hand):
        return None
    model = job.model if isinstance(job.model, nn.Module) else unfilled_model_of(job)[0]
    return plan_tensor(
        model,
        _first_inputs(job, model),
        tp=job.layout.tp,
        loss=job.loss,
        units=job.units,
        sequence=job.layout.sequence_parallel,
        tp_plan=tp_plan,
    )


def _first_inputs(job: Job, model: nn.Module) -> Any:
    parts = split(
        batch_of(job),
        micro_batches=job.micro_batches,
        replicas=job.layout.num_replicas,
        weights=job.weight or weigher(model),
        batch_dims=job.batch_dims,
    )
    return parts[0][0].inputs


def expert_plan_of(job: Job) -> ExpertPlan | None:
    """How the layout divides experts, found and proven in this process; None where it does not.

    Raises `LayoutError` where the model has no experts that can be divided.
    """
    if job.layout.ep == 1:
        return None
    model = job.model if isinstance(job.model, nn.Module) else unfilled_model_of(job)[0]
    return plan_experts(model, _first_inputs(job, model), ep=job.layout.ep, loss=job.loss, units=job.units)


def batch_of(job: Job) -> Any:
    """The batch on this rank's device, in the job's dtype."""

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        leaf = leaf.detach().to(job.device, copy=True)
        return leaf.to(job.dtype) if job.dtype is not None and leaf.is_floating_point() else leaf

    return tree_map(own, job.batch)


def couples_samples(model: nn.Module, batch: Any) -> str:
    """Why the samples of a batch influence each other in this model; empty where nothing is known to."""
    if isinstance(batch, Mapping) and batch.get("return_loss"):
        return "its contrastive loss compares the samples of a batch"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
        return "BatchNorm takes its statistics over the micro-batch"
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return "its load-balancing loss is no mean over samples"
    return ""


def optimizer_over(job: Job, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The job's optimizer over some parameters, at its first step; not Muon, see `optimizers`."""
    if job.optimizer == "momentum":
        return torch.optim.SGD(parameters, lr=job.learning_rate, momentum=0.9, nesterov=True)
    if job.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=job.learning_rate)
    return torch.optim.SGD(parameters, lr=job.learning_rate)


def _blueprint(job: Job) -> Blueprint:
    factory, dtype = job.model, job.dtype
    return defer(factory if dtype is None else lambda: factory().to(dtype), seed=job.layout.seed, device=job.device)


def _hollow(parameter: nn.Parameter, dtype: torch.dtype | None) -> torch.Tensor:
    """Shape, strides and dtype of a parameter, on the meta device."""
    chosen = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
    return torch.empty_strided(parameter.shape, parameter.stride(), dtype=chosen, device="meta")


def _cast(buffer: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return buffer.to(dtype) if dtype is not None and buffer.is_floating_point() else buffer


def _as_constructed(model: nn.Module) -> nn.Module:
    """Unpickling constructs nothing, and transformers notes only of constructed classes which outputs they record."""
    recording = sys.modules.get("transformers.utils.output_capturing")
    registry = vars(recording).get("_CAN_RECORD_REGISTRY") if recording is not None else None
    if registry is None:
        return model
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None)
        if isinstance(recorded, dict):
            registry[module] = recorded
    return model
