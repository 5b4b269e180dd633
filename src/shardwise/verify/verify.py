"""`verify`: run the reference and the layout, compare, and name the first difference. Starts the ranks itself."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
import torch.nn as nn

from shardwise.errors import ConfigError, LayoutError
from shardwise.execute.batches import batch_size
from shardwise.execute.split_proof import in_words
from shardwise.launch import LaunchedRanks, RankContext, RankPool, RankStarter
from shardwise.layout import Layout, Precision, Techniques
from shardwise.parallel.tensor.given_plan import GivenPlan
from shardwise.plan.sources import check_source
from shardwise.schedule import GENERATORS
from shardwise.trace.deferred import defer
from shardwise.trace.objective import LossFunction
from shardwise.train.auto_layout import AUTO
from shardwise.train.layout_search import best_layout
from shardwise.train.optimizers import MOMENTS
from shardwise.verify.comparison import Comparison, Rounding, errors_of, relative
from shardwise.verify.difference import first_difference
from shardwise.verify.job import expert_plan_of, open_source, tensor_plan_of, whole_bytes
from shardwise.verify.reference import Reference, choose
from shardwise.verify.rounding import DOUBT, EXACT, rounding_of, tensor_errors
from shardwise.verify.sides import Job, Side, Whole, run_side, run_streamed_side, run_whole

__all__ = ["verify"]

R = TypeVar("R")

# What float32 leaves of a sum taken in another order: unit roundoff 6e-8, a few thousand terms, some tens of layers.
_TOLERANCES = {
    torch.float64: (EXACT, "float64 sums taken in another order"),
    torch.float32: (1e-5, "float32 sums taken in another order, over some tens of layers"),
}
# Of products in 16 bits: a few units in the last place (2^-8, 2^-11, 2^-4). Beyond, float64 tells what is rounding.
_NARROW = MappingProxyType({"bfloat16": 2e-2, "float16": 4e-3, "float8": 2e-1})
_NARROW_DOUBT = 0.5


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
    checkpoint: str | Path | None = None,
    new_head: bool = False,
    reference: str = "auto",
    memory_bytes: int | None = None,
    tp_plan: GivenPlan | None = None,
    techniques: Techniques | None = None,
    starter: RankStarter | None = None,
    launched: LaunchedRanks | None = None,
    timeout_s: float = 600.0,
) -> Comparison:
    """Compare one device with `layout` on `batch`: loss, every gradient, their norm, weights after `steps` steps.

    model: a module (its weights are used, it is not changed), or a factory whose module is initialised by name and
    seed. batch: what `forward` takes, a mapping by name or a sequence by position. loss: `loss(outputs, batch)`; by
    default what the model returns as its loss. dtype: "float64" settles doubt (tolerance 1e-9); where float32 leaves
    some, both sides run in float64 too, and `Comparison.rounding` says what they tell. couples: why samples
    of this model influence each other (a contrastive loss), so that the whole batch in one forward means something
    else; BatchNorm and router losses are known. checkpoint: a folder of safetensors, or of a run's checkpoints, whose
    values are used instead of the model's own; each rank reads its own alone. new_head: where it has the base of a
    factory's transformers model but not its head, the head keeps its initial values.

    reference: "whole", the model on one device; "streamed", one device that holds the parameters of a few units at a
    time (one step only; gradients and updates of both sides lie in files of a temporary folder meanwhile, four times
    the weights together); "auto", streamed where weights, gradients and two copies exceed `memory_bytes`, by default
    what the machine has free. `Comparison.reference` says which, with the numbers.

    tp_plan: how layouts with tp > 1 divide units, in the words of transformers (`{"layers.*.mlp.up_proj": "colwise",
    …}`) or as a `TensorPlan`; by default a plan is found. It is proven before ranks are started, and refused with the
    module and the first tensor that differs where it is wrong; so is a `tp_plan` that was set on the model.

    layout: a `Layout`, its text, or "auto": the one that is searched for this model, batch and machine.

    optimizer: "sgd", "momentum" (Nesterov's), "adamw" or "muon".

    techniques: how the layout's side keeps and sends numbers. The reference computes in the same precision, and else
    does as the model says.

    starter: starts all ranks and is left open, so that several verifications pay the start once (seconds); else one
    is made and ended. Let it preload what models are made of, such as "transformers.models.llama.modeling_llama".

    launched: the layout's side runs on these ranks of another launcher, of which this is the first.

    Raises the errors of the ranks: `LayoutError`, `BatchError`, `ModelError`, `DataflowError`, `CheckpointError`,
    `LaunchError`; `ConfigError` for options that do not go together.
    """
    if layout == AUTO:
        laid_out = _searched(model, batch, loss=loss, optimizer=optimizer, techniques=techniques, tp_plan=tp_plan)
    else:
        laid_out = Layout.parse(layout) if isinstance(layout, str) else layout
    if optimizer not in MOMENTS:
        raise ConfigError(f"optimizer={optimizer!r} is not one of {', '.join(MOMENTS)}; use one of these")
    if checkpoint is not None:
        open_source(str(Path(checkpoint).expanduser()))  # what is wrong with it is said before ranks are started
    size = batch_size(batch, batch_dims)
    job = Job(
        model=model,
        batch=batch,
        loss=loss,
        layout=laid_out,
        micro_batches=laid_out.num_micro_batches(size),
        steps=steps,
        optimizer=optimizer,
        learning_rate=learning_rate,
        dtype=_dtype(dtype),
        batch_dims=dict(batch_dims or {}),
        units=tuple(units),
        weight=weight,
        new_head=new_head,
        techniques=techniques,
        checkpoint=None if checkpoint is None else str(Path(checkpoint).expanduser().resolve()),
    )
    check_source(laid_out, job.micro_batches)
    if launched is not None and launched.world_size != laid_out.world_size:
        raise LayoutError(
            f"a layout has as many ranks as were started, but {laid_out} has {laid_out.world_size} and there are "
            f"{launched.world_size}; start {laid_out.world_size}, or set layout"
        )
    job = dataclasses.replace(job, experts=expert_plan_of(job), tensor=tensor_plan_of(job, tp_plan))  # or: an error
    on_a_rank = reference == "auto" and not isinstance(model, nn.Module)  # a factory may make what it builds
    early = None if on_a_rank else _chosen(job, reference, memory_bytes, lambda: whole_bytes(job))
    with contextlib.ExitStack() as stack:
        ranks = _Ranks(
            starter or stack.enter_context(RankStarter(preload=_preload(model))),
            job.layout.world_size,
            timeout_s,
            launched,
        )
        chosen = early or _chosen(job, reference, memory_bytes, lambda: _bytes_by_rank(job, ranks))
        if chosen.streamed:
            return _compare_streamed(job, chosen, ranks)
        return _compare_whole(job, chosen, couples or "", ranks)


def _searched(
    model: nn.Module | Callable[[], nn.Module],
    batch: Any,
    *,
    loss: LossFunction | None,
    optimizer: str,
    techniques: Techniques | None,
    tp_plan: GivenPlan | None,
) -> Layout:
    """The best layout for steps of the batch on this machine."""
    whole = model if isinstance(model, nn.Module) else defer(model, seed=0).module
    precision = None if techniques is None else techniques.precision
    return best_layout(whole, batch, loss=loss, optimizer=optimizer, precision=precision, tp_plan=tp_plan)


def _chosen(job: Job, wanted: str, memory_bytes: int | None, needed: Callable[[], int]) -> Reference:
    chosen = choose(wanted, memory_bytes=memory_bytes, needed=needed)
    if chosen.streamed and job.steps > 1:
        raise ConfigError(
            f"a streamed reference takes one step, but steps={job.steps} ({chosen.why}); use steps=1, or "
            'reference="whole" on a machine with more memory'
        )
    if chosen.streamed and _narrows(job):
        raise ConfigError(
            f"a streamed reference computes in the model's own dtype, and the layout in 16 bits ({chosen.why}); use "
            'reference="whole"'
        )
    if chosen.streamed and job.optimizer == "muon":
        raise ConfigError(
            f"a streamed reference updates one parameter at a time, and Muon asks which of all are hidden matrices "
            f'({chosen.why}); use optimizer="adamw", or reference="whole" on a machine with more memory'
        )
    return chosen


class _Pool(Protocol):
    """What ranks are asked for."""

    def run(self, function: Callable[..., R], *args: object, timeout_s: float | None = None) -> list[R]: ...


class _Ranks:
    """Pools of ranks from one starter; those of the layout are `launched` where another launcher started them."""

    def __init__(
        self, starter: RankStarter, world_size: int, timeout_s: float, launched: LaunchedRanks | None = None
    ) -> None:
        self._starter = starter
        self._launched = launched
        # One number of threads on both sides: kernels that split a sum among threads round it differently.
        self._threads = max(1, len(os.sched_getaffinity(0)) // world_size)
        self.timeout_s = timeout_s

    def pool(self, world_size: int) -> contextlib.AbstractContextManager[_Pool]:
        if self._launched is not None and world_size > 1:
            return contextlib.nullcontext(self._launched)
        return RankPool(world_size, starter=self._starter, num_threads=self._threads)


def _bytes_by_rank(job: Job, ranks: _Ranks) -> int:
    with ranks.pool(1) as pool:
        return pool.run(_whole_bytes, job, timeout_s=ranks.timeout_s)[0]


def _whole_bytes(context: RankContext, job: Job) -> int:
    return whole_bytes(job)


def _compare_whole(job: Job, chosen: Reference, exempt: str, ranks: _Ranks) -> Comparison:
    alone = Layout(seed=job.layout.seed)
    all_parts = job.all_micro_batches
    timeout_s = ranks.timeout_s
    whole: Whole | None = None
    with ranks.pool(1) as one:
        reference: Side = one.run(run_side, job, alone, all_parts, False, timeout_s=timeout_s)[0]
        drawn = "the model draws random numbers, which are keyed by micro-batch or drawn by our code"
        narrow = "the layout computes in 16 bits, a plain forward in the model's own dtype"
        exempt = exempt or reference.couples or (drawn if reference.random else "") or (narrow if _narrows(job) else "")
        if not exempt:
            whole = one.run(run_whole, job, timeout_s=timeout_s)[0]
        with ranks.pool(job.layout.world_size) as many:
            sides: list[Side] = many.run(run_side, job, job.layout, job.micro_batches, False, timeout_s=timeout_s)
            comparison = _comparison(job, chosen, reference, whole, exempt, sides)
            in_doubt = comparison.tolerance == _TOLERANCES[torch.float32][0] < comparison.worst_error <= DOUBT
            if in_doubt or (_narrows(job) and not comparison.equal and comparison.worst_error <= _NARROW_DOUBT):
                comparison = dataclasses.replace(comparison, rounding=_settled(job, reference, sides, one, many, ranks))
            if comparison.equal:
                return comparison
            probed = one.run(run_side, job, alone, all_parts, True, timeout_s=timeout_s)[0]
            watched = many.run(run_side, job, job.layout, job.micro_batches, True, timeout_s=timeout_s)
    return dataclasses.replace(comparison, first_difference=first_difference(probed, watched, comparison))


def _settled(
    job: Job, reference: Side, sides: Sequence[Side], one: _Pool, many: _Pool, ranks: _Ranks
) -> Rounding | None:
    """Both sides once more, in float64; None where the model does not run in it."""
    wide = None if job.techniques is None else dataclasses.replace(job.techniques, precision=Precision())
    exact_job = dataclasses.replace(job, dtype=torch.float64, techniques=wide)
    alone = Layout(seed=job.layout.seed)
    parts = job.all_micro_batches
    call = (exact_job, job.layout, job.micro_batches, False)
    try:
        exact: Side = one.run(run_side, exact_job, alone, parts, False, timeout_s=ranks.timeout_s)[0]
        exact_sides: list[Side] = many.run(run_side, *call, timeout_s=ranks.timeout_s)
    except Exception:  # whatever a model raises of a type that it does not know: what float32 showed stands
        return None
    tolerance, by_sign = _tolerance(torch.float32, job.techniques)[0], reference.normalised
    rounding = rounding_of(sides, reference, exact_sides, exact, tolerance=tolerance, by_sign=by_sign)
    dtype = job.techniques.precision.compute if job.techniques is not None else "float32"
    return dataclasses.replace(rounding, dtype=dtype)


def _compare_streamed(job: Job, chosen: Reference, ranks: _Ranks) -> Comparison:
    """Both sides note what units return at once: to run a large model again is dear."""
    all_parts = job.all_micro_batches
    exempt = "the model is streamed, so that there is no whole batch in one forward"
    with tempfile.TemporaryDirectory(prefix="shardwise-verify-") as name:
        mine, theirs = Path(name) / "reference", Path(name) / "layout"
        with ranks.pool(1) as one:
            asked = (job, all_parts, chosen.stage_bytes, mine)
            reference: Side = one.run(run_streamed_side, *asked, timeout_s=ranks.timeout_s)[0]
        with ranks.pool(job.layout.world_size) as many:
            call = (job, job.layout, job.micro_batches, True, theirs)
            sides: list[Side] = many.run(run_side, *call, timeout_s=ranks.timeout_s)
        comparison = _comparison(job, chosen, reference, None, exempt, sides)
    if comparison.equal:
        return comparison
    return dataclasses.replace(comparison, first_difference=first_difference(reference, sides, comparison))


def _comparison(
    job: Job, chosen: Reference, reference: Side, whole: Whole | None, exempt: str, sides: Sequence[Side]
) -> Comparison:
    tensors = tensor_errors(sides, reference, by_sign=reference.normalised)
    dtype = job.dtype or next((u.dtype for u in reference.updates.values()), torch.float32)
    tolerance, reason = _tolerance(dtype, job.techniques)
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
        update_tolerance=math.sqrt(tolerance) if job.optimizer == "adamw" and _narrows(job) else None,
        reason=reason,
        first_difference=None,
        tensors=tensors,
        edges=tuple(sides[0].edges),
        steps=job.steps,
        reference=chosen.text(reference.num_stages),
        tensor=sides[0].tensor,
        experts=_experts(sides[0]),
        splits=in_words([proof for side in sides for proof in side.split_proofs]),
        notes=(*sides[0].context, *_notes(job.layout, job.techniques)),
    )


def _narrows(job: Job) -> bool:
    return job.techniques is not None and job.techniques.precision.compute != "float32"


def _tolerance(dtype: torch.dtype, techniques: Techniques | None) -> tuple[float, str]:
    """And its reason. Where 16 bits are computed with, both sides round every product, of sums in another order."""
    compute = "float32" if techniques is None else techniques.precision.compute
    if compute == "float32":
        return _TOLERANCES.get(dtype, (2e-2, f"{dtype} rounds every value"))
    return _NARROW[compute], f"{compute} rounds every product, of sums taken in another order"


def _notes(layout: Layout, techniques: Techniques | None) -> tuple[str, ...]:
    """What a comparison of this layout does not say."""
    label = "" if techniques is None else techniques.precision.label
    said: tuple[str, ...] = (f"both sides compute in {label}",) if label else ()
    if techniques is not None and techniques.communication != techniques.communication.exact:
        said += ("tensors travelled as they are: what compression leaves out of them is no error of the layout",)
    family = GENERATORS.get(layout.schedule)
    if family is None or family.flushes:
        return said
    return (
        *said,
        f"every step was run by itself; in training, steps of {layout.schedule} overlap and gradients are one step "
        "late (docs/asynchronous.md)",
    )


def _experts(side: Side) -> tuple[str, ...]:
    """How experts were divided and what they exchanged, in words."""
    if side.experts is None or side.expert_step is None:
        return ()
    step = side.expert_step
    rows, dropped = sum(sum(each) for each in step.loads.values()), sum(step.dropped.values())
    told = (
        f"all-to-all: {step.all_to_all_bytes:,} bytes a step between ranks, for {rows:,} rows of experts; the busiest "
        f"expert has {step.imbalance:.2f} × the mean, {f'{dropped:,} are' if dropped else 'none is'} dropped"
    )
    return (*side.experts.lines(), told)


def _whole_error(reference: Side, whole: Whole) -> float:
    """The reference against the whole batch in one forward: the larger of the loss's and the gradients' error."""
    zeros = {name: torch.zeros(update.shape, dtype=update.dtype) for name, update in reference.updates.items()}
    errors = errors_of(reference.gradients, zeros, whole.gradients, zeros, by_sign=False)
    worst = max((error.gradient for error in errors), default=0.0)
    return max(worst, relative(reference.losses[0], whole.loss))


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
