"""The proof: ranks as threads, each with its own tokens and some of the experts, against the whole unit for each.

    rank r gives rows x_r    divided: out_r, dL/dx_r, gradients      whole, for every x_r by itself: the same
                             of experts on rank r, of the rest       out_r, dL/dx_r, and the sum of the gradients

In float64, on random numbers, in training and in evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan
from shardwise.parallel.expert.groups import ExpertGroup, on_expert_threads
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.prove import TOLERANCE, Difference
from shardwise.parallel.tensor.slices import paste
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["prove"]


@dataclasses.dataclass(kw_only=True, slots=True)
class _Run:
    outputs: list[torch.Tensor]
    arguments: list[torch.Tensor | None]  # gradients
    parameters: dict[str, torch.Tensor | None]  # gradients, as parts of whole parameters
    buffers: dict[str, torch.Tensor]


def prove(unit: nn.Module, call: Call, plan: ExpertPlan, *, training: bool, seed: int) -> float:
    """The largest relative error of `unit` divided as `plan` says, whose one unit is "". Raises `Difference`, or
    whatever the divided unit raises. `unit` is real, in float64, and left as it is."""
    seeds = [seed * plan.ep + rank for rank in range(plan.ep)]

    def divided(group: ExpertGroup) -> _Run:
        copied = _own(unit, training)
        return _run(copied, call, seeds[group.rank], DividedExperts(copied, plan, group))

    with noticed(_Whole()):  # what is run again runs the same way
        wholes = [_run(_own(unit, training), call, each, None) for each in seeds]
        parts = on_expert_threads(plan.ep, divided)
    worst = 0.0
    scale = _scale([gradient for whole in wholes for gradient in whole.parameters.values()])
    for rank, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
        for place, (a, b) in enumerate(zip(part.outputs, whole.outputs, strict=True)):
            worst = max(worst, _error(f"output {place} on rank {rank}", a, b, 0.0))
        for place, (c, d) in enumerate(zip(part.arguments, whole.arguments, strict=True)):
            worst = max(worst, _error(f"gradient of argument {place} on rank {rank}", c, d, scale))
        for name, buffer in whole.buffers.items():
            worst = max(worst, _error(f"buffer {name} on rank {rank}", part.buffers[name], buffer, 0.0))
    for name in wholes[0].parameters:
        ours, theirs = _sum([p.parameters.get(name) for p in parts]), _sum([w.parameters[name] for w in wholes])
        worst = max(worst, _error(f"gradient of {name}", ours, theirs, scale))
    return worst


class _Whole:
    """Switches a model's own activation checkpointing off."""

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        yield None


def _own(unit: nn.Module, training: bool) -> nn.Module:
    copied = twin(unit)
    copied.train(training)
    return copied


def _run(unit: nn.Module, call: Call, seed: int, divided: DividedExperts | None) -> _Run:
    args, kwargs = call.fresh(seed=seed)
    given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    samples = tuple(range(given[0].shape[0] if given and given[0].dim() else 1))
    with (
        Doubled(),
        RandomMode(Scope(seed=0, step=0, micro_batch=0, samples=samples, place="unit")),
        torch.enable_grad(),
    ):
        out = unit(*args, **kwargs)
    outputs = [t for place, t in enumerate(tensors_of(out)) if call.read is None or place in call.read]
    generator = torch.Generator().manual_seed(seed)
    wanted = [tensor for tensor in outputs if tensor.requires_grad]
    torch.autograd.backward(wanted, [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in wanted])
    return _Run(
        outputs=[tensor.detach() for tensor in outputs],
        arguments=[tensor.grad for tensor in given],
        parameters={name: _whole(name, p.grad, divided) for name, p in unit.named_parameters()},
        buffers={name: buffer.detach() for name, buffer in unit.named_buffers()},
    )


def _whole(name: str, gradient: torch.Tensor | None, divided: DividedExperts | None) -> torch.Tensor | None:
    part = None if divided is None else divided.slice_of(name)
    if gradient is None or part is None or divided is None:
        return gradient
    return paste(gradient, part, divided.rank)


def _sum(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(given).sum(0) if given else None


def _scale(gradients: Sequence[torch.Tensor | None]) -> float:
    """The root mean square of all gradients: one that is zero by symmetry is zero compared with this."""
    given = [gradient for gradient in gradients if gradient is not None]
    count = sum(gradient.numel() for gradient in given)
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in given) / count) if count else 0.0


def _error(what: str, a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    if a is None or b is None:
        if a is b:
            return 0.0
        raise Difference(f"{what} is missing {'where experts are divided' if a is None else 'on one device'}")
    if a.shape != b.shape:
        raise Difference(f"{what} has shape {tuple(a.shape)} and not {tuple(b.shape)}")
    if not b.is_floating_point():
        if not torch.equal(a, b):
            raise Difference(f"{what} is another")
        return 0.0
    against = max(float(b.norm()), 1e-3 * scale * math.sqrt(b.numel()), 1e-30)
    error = float((a - b).norm()) / against if b.numel() else 0.0
    if not error <= TOLERANCE:
        raise Difference(f"{what} differs by {error:.1e}")
    return error
