"""`verify`: run the reference and the layout, compare, and name the first difference. Starts the ranks itself."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import ConfigError
from shardwise.execute.batches import batch_size
from shardwise.launch import RankPool, RankStarter
from shardwise.layout import Layout
from shardwise.trace.objective import LossFunction
from shardwise.verify.comparison import Comparison, TensorError, errors_of, relative
from shardwise.verify.sides import Job, Side, Whole, run_side, run_whole

__all__ = ["couples_samples", "verify"]

# What float32 leaves of a sum taken in another order: unit roundoff 6e-8, a few thousand terms, some tens of layers.
_TOLERANCES = {
    torch.float64: (1e-9, "float64 sums taken in another order"),
    torch.float32: (1e-5, "float32 sums taken in another order, over some tens of layers"),
}


def verify(
    model: nn.Module | Callable[[], nn.Module],
    batch: Any,
    *,
    layout: Layout | str,
    loss: LossFunction | None = None,
    steps: int = 1,
    optimizer: str = "sgd",
    learning_rate: float = 0.05,
    dtype: str | torch.dtype | None = None,
    batch_dims: Mapping[str, int] | None = None,
    units: Sequence[str] = (),
    weight: Callable[[Any], float] | None = None,
    couples: str | None = None,
    timeout_s: float = 600.0,
) -> Comparison:
    """Compare one device with `layout` on `batch`: loss, every gradient, their norm, weights after `steps` steps.

    model: a module (its weights are used, it is not changed), or a factory whose module is initialised by name and
    seed. batch: what `forward` takes, a mapping by name or a sequence by position. loss: `loss(outputs, batch)`; by
    default what the model returns as its loss. dtype: "float64" settles doubt (tolerance 1e-9). couples: why samples
    of this model influence each other (a contrastive loss), so that the whole batch in one forward means something
    else; BatchNorm and router losses are known.

    Raises the errors of the ranks: `LayoutError`, `BatchError`, `ModelError`, `DataflowError`, `LaunchError`.
    """
    chosen = Layout.parse(layout) if isinstance(layout, str) else layout
    if optimizer not in ("sgd", "adamw"):
        raise ConfigError(f"optimizer={optimizer!r} is not one of sgd, adamw")
    size = batch_size(batch, batch_dims)
    job = Job(
        model=model,
        batch=batch,
        loss=loss,
        layout=chosen,
        micro_batches=chosen.num_micro_batches(size),
        steps=steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        dtype=_dtype(dtype),
        batch_dims=dict(batch_dims or {}),
        units=tuple(units),
        weight=weight,
    )
    exempt = couples or couples_samples(model, batch)
    with RankStarter(preload=_preload(model)) as starter:
        return _compare(job, exempt, starter, timeout_s)


def _compare(job: Job, exempt: str, starter: RankStarter, timeout_s: float) -> Comparison:
    alone = Layout(seed=job.layout.seed)
    whole: Whole | None = None
    # One number of threads on both sides: kernels that split a sum among threads round it differently.
    threads = max(1, len(os.sched_getaffinity(0)) // job.layout.world_size)
    with RankPool(1, starter=starter, num_threads=threads) as pool:
        all_parts = job.micro_batches * job.layout.dp
        reference: Side = pool.run(run_side, job, alone, all_parts, False, timeout_s=timeout_s)[0]
        if reference.random:
            exempt = exempt or "the model draws random numbers, which are keyed by micro-batch or drawn by our code"
        if not exempt:
            whole = pool.run(run_whole, job, timeout_s=timeout_s)[0]
        with RankPool(job.layout.world_size, starter=starter, num_threads=threads) as ranks:
            sides: list[Side] = ranks.run(run_side, job, job.layout, job.micro_batches, False, timeout_s=timeout_s)
            comparison = _comparison(job, reference, whole, exempt, sides, None)
            if comparison.equal:
                return comparison
            probed = pool.run(run_side, job, alone, all_parts, True, timeout_s=timeout_s)[0]
            watched = ranks.run(run_side, job, job.layout, job.micro_batches, True, timeout_s=timeout_s)
    return _comparison(job, reference, whole, exempt, sides, _first_difference(probed, watched, comparison))


def _comparison(
    job: Job, reference: Side, whole: Whole | None, exempt: str, sides: Sequence[Side], first: str | None
) -> Comparison:
    gradients: dict[str, torch.Tensor | None] = {}
    updates: dict[str, torch.Tensor] = {}
    for side in sides:
        gradients.update(side.gradients)
        updates.update(side.updates)
    tensors = errors_of(
        gradients,
        updates,
        reference.gradients,
        reference.updates,
        by_sign=job.optimizer == "adamw",
        roundings=reference.roundings,
    )
    dtype = job.dtype or next((u.dtype for u in reference.updates.values()), torch.float32)
    tolerance, reason = _TOLERANCES.get(dtype, (2e-2, f"{dtype} rounds every value"))
    return Comparison(
        layout=f"{job.layout}, {job.micro_batches} micro-batches",
        loss=sides[0].losses[0],
        reference_loss=reference.losses[0],
        loss_error=max(relative(a, b) for a, b in zip(sides[0].losses, reference.losses, strict=True)),
        gradient_error=max((tensor.gradient for tensor in tensors), default=0.0),
        norm_error=relative(sides[0].norm, reference.norm) if reference.norm else abs(sides[0].norm),
        weight_error=max((tensor.update for tensor in tensors), default=0.0),
        micro_batch_error=None if whole is None else _whole_error(reference, whole),
        exempt=exempt,
        tolerance=tolerance,
        reason=reason,
        first_difference=first,
        tensors=tensors,
        edges=tuple(sides[0].edges),
        steps=job.steps,
    )


def _whole_error(reference: Side, whole: Whole) -> float:
    """The reference against the whole batch in one forward: the larger of the loss's and the gradients' error."""
    zeros = {name: torch.zeros(update.shape, dtype=update.dtype) for name, update in reference.updates.items()}
    errors = errors_of(reference.gradients, zeros, whole.gradients, zeros, by_sign=False)
    worst = max((error.gradient for error in errors), default=0.0)
    return max(worst, relative(reference.losses[0], whole.loss))


def _first_difference(reference: Side, sides: Sequence[Side], comparison: Comparison) -> str:
    """The first unit, in the order of the forward, whose output diverges; else the last whose gradients do."""
    outputs: dict[tuple[int, str, int], tuple[float, float]] = {}
    for side in sides:
        outputs.update(side.outputs)
    for unit, call in reference.calls:
        for (micro_batch, name, number), (summed, norm) in sorted(reference.outputs.items()):
            if (name, number) != (unit, call) or (micro_batch, name, number) not in outputs:
                continue
            other_sum, other_norm = outputs[(micro_batch, name, number)]
            scale = max(norm, 1e-12)
            off = max(abs(other_norm - norm), abs(other_sum - summed) / 10) / scale
            if not math.isfinite(off) or off > comparison.tolerance:
                where = f"unit {unit} (call {call}, micro-batch {micro_batch})"
                return f"the output of {where} diverges first, by {off:.1e}"
    bad = [tensor for tensor in comparison.tensors if _worst(tensor) > comparison.tolerance]
    for unit, _ in reversed(reference.calls):
        inside = [tensor for tensor in bad if tensor.name.startswith(unit + ".")]
        if inside:
            return f"outputs are equal; backward, unit {unit} diverges first, at the gradient of {inside[0].name}"
    if bad:
        return f"outputs are equal; the gradient of {bad[0].name} diverges, which glue code reads"
    if comparison.micro_batch_error is not None and comparison.micro_batch_error > comparison.tolerance:
        return (
            "the layout equals the accumulated micro-batches, but these are not the whole batch in one forward: the "
            "loss weighs samples in a way that its weights do not say (give weight=), or samples influence each other "
            "(give couples=)"
        )
    return "the loss or the norm of the gradients diverges, no single tensor does"


def _worst(tensor: TensorError) -> float:
    return max(tensor.gradient, tensor.update)


def couples_samples(model: nn.Module | Callable[[], nn.Module], batch: Any) -> str:
    """Why the samples of a batch influence each other in this model; empty where nothing is known to."""
    if isinstance(batch, Mapping) and batch.get("return_loss"):
        return "its contrastive loss compares the samples of a batch"
    if not isinstance(model, nn.Module):
        return ""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in model.modules()):
        return "BatchNorm takes its statistics over the micro-batch"
    config = getattr(model, "config", None)
    if getattr(config, "output_router_logits", False):
        return "its load-balancing loss is no mean over samples"
    return ""


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype={dtype!r} is no torch dtype; use float32 or float64")
    return found


def _preload(model: nn.Module | Callable[[], nn.Module]) -> tuple[str, ...]:
    """Modules that every rank needs and that are slow to import."""
    own = type(model).__module__
    return (run_side.__module__, *([own] if own.startswith("transformers.") else []))
