"""The proof: ranks as threads, each with its own tokens and some of the experts, against the whole unit for each.

    rank r gives rows x_r    divided: out_r, dL/dx_r, gradients      whole, for every x_r by itself: the same
                             of experts on rank r, of the rest       out_r, dL/dx_r, and the sum of the gradients

In float64, on random numbers, in training and in evaluation. A router of random numbers may leave experts out: with a
`deal` the choices are dealt out instead, in turn, so that all of them are reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan, Listed, Stacked
from shardwise.parallel.expert.groups import ExpertGroup, on_expert_threads
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.prove import TOLERANCE, Difference
from shardwise.parallel.tensor.slices import paste
from shardwise.trace.checkpointing import Contexts, noticed
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["Deal", "Proven", "prove", "takes_choices_beyond"]

_VANISHES = 1e-9  # of the root mean square of all gradients

Gradients = Mapping[str, torch.Tensor | None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Deal:
    """Choices in turn: deal `number` goes on where the one before ended. With `beyond` one is of no expert."""

    number: int
    beyond: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Proven:
    """What one comparison found: the largest relative error, and of which experts it showed anything."""

    error: float
    shown: Mapping[
        str, frozenset[int]
    ]  # module -> its experts (of a list none) whose gradients are there and do not vanish


@dataclasses.dataclass(kw_only=True, slots=True)
class _Run:
    outputs: list[torch.Tensor]
    arguments: list[torch.Tensor | None]  # gradients
    parameters: Gradients
    buffers: Mapping[str, torch.Tensor]


def prove(
    unit: nn.Module, call: Call, plan: ExpertPlan, *, training: bool, seed: int, deal: Deal | None = None
) -> Proven:
    """Compare `unit` divided as `plan` says, whose one unit is "", with the whole. Raises `Difference`, or whatever the
    divided unit raises. `unit` is real, in float64, and left as it is."""
    seeds = [seed * plan.ep + rank for rank in range(plan.ep)]

    def divided(group: ExpertGroup) -> tuple[_Run, Mapping[str, torch.Tensor]]:
        copied = _own(unit, training)
        experts = DividedExperts(copied, plan, group)
        _deal_out(copied, plan, deal, group.rank)
        return _run(copied, call, seeds[group.rank]), experts.loads.take()

    wholes: list[_Run] = []
    theirs: dict[str, torch.Tensor | None] = {}
    with noticed(_Whole()):  # what is run again runs the same way
        for rank, each in enumerate(seeds):
            copied = _own(unit, training)
            _deal_out(copied, plan, deal, rank)
            wholes.append(_run(copied, call, each))
            _add(theirs, wholes[-1].parameters)  # a block is large: its gradients are kept once
            wholes[-1].parameters = {}
        parts = on_expert_threads(plan.ep, divided)
    ours = _joined(plan, [run.parameters for run, _ in parts])
    scale = _scale(theirs.values())
    worst = 0.0
    for rank, ((part, _), whole) in enumerate(zip(parts, wholes, strict=True)):
        worst = max(worst, _worst(rank, part, whole, scale))
    for name in theirs:
        worst = max(worst, _error(f"gradient of {name}", ours[name], theirs[name], scale))
    return Proven(error=worst, shown=_shown(plan, theirs, [loads for _, loads in parts], scale))


def takes_choices_beyond(unit: nn.Module, call: Call, plan: ExpertPlan) -> bool:
    """Whether the whole unit runs where a choice is of no expert: a number too large, as models with a capacity mark
    what they drop."""
    copied = _own(unit, training=False)
    _deal_out(copied, plan, Deal(number=0, beyond=True), 0)
    try:
        _run(copied, call, 0)
    except Exception:  # whatever indices out of their range end in
        return False
    return True


def _deal_out(unit: nn.Module, plan: ExpertPlan, deal: Deal | None, rank: int) -> None:
    """Stacked experts are given other choices than their router's: the same here, whole or divided."""
    for each in plan.units[""]:
        if deal is not None and isinstance(each, Stacked):
            _give(unit.get_submodule(each.module), each, deal, deal.number * plan.ep + rank)


def _give(module: nn.Module, experts: Stacked, deal: Deal, turn: int) -> None:
    body = module.forward
    signature = inspect.signature(body)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        index = bound.arguments[experts.index]
        dealt = (torch.arange(index.numel()) + turn * index.numel()) % experts.num_experts
        if deal.beyond:
            dealt[-1] = experts.num_experts
        bound.arguments[experts.index] = dealt.view(index.shape).to(index)
        return body(*bound.args, **bound.kwargs)

    module.__dict__["forward"] = forward


class _Whole:
    """Switches a model's own activation checkpointing off."""

    @contextlib.contextmanager
    def checkpoint(self) -> Iterator[Contexts | None]:
        yield None


def _own(unit: nn.Module, training: bool) -> nn.Module:
    copied = twin(unit)
    copied.train(training)
    return copied


def _run(unit: nn.Module, call: Call, seed: int) -> _Run:
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
        parameters={name: parameter.grad for name, parameter in unit.named_parameters()},
        buffers={name: buffer.detach() for name, buffer in unit.named_buffers()},
    )


def _add(total: dict[str, torch.Tensor | None], gradients: Gradients) -> None:
    for name, gradient in gradients.items():
        before = total.get(name)
        total[name] = gradient if before is None else before if gradient is None else before.add_(gradient)


def _joined(plan: ExpertPlan, of_ranks: Sequence[Gradients]) -> Gradients:
    """The sums over the ranks, of experts as whole parameters."""
    slices = plan.slices()
    total: dict[str, torch.Tensor | None] = {}
    for rank, gradients in enumerate(of_ranks):
        for name, gradient in gradients.items():
            part = slices.get(name)
            _add(total, {name: gradient if gradient is None or part is None else paste(gradient, part, rank)})
    return total


def _shown(
    plan: ExpertPlan, gradients: Gradients, loads: Sequence[Mapping[str, torch.Tensor]], scale: float
) -> dict[str, frozenset[int]]:
    """Experts in one module that were given rows, and all of whose matrices have a gradient that does not vanish."""
    shown: dict[str, frozenset[int]] = {}
    for each in plan.units[""]:
        if isinstance(each, Listed):
            continue
        rows = torch.stack([load[each.module] for load in loads]).sum(0)[: each.num_experts]
        seen = rows > 0
        for leaf in each.parameters:
            gradient = gradients.get(f"{each.module}.{leaf}" if each.module else leaf)
            if gradient is not None and gradient.dim() > 2:
                flat = gradient.flatten(1)
                seen &= flat.norm(dim=1) > _VANISHES * scale * math.sqrt(flat.shape[1])
        shown[each.module] = frozenset(seen.nonzero().flatten().tolist())
    return shown


def _worst(rank: int, part: _Run, whole: _Run, scale: float) -> float:
    """The largest error of what one rank made for itself."""
    worst = 0.0
    for place, (a, b) in enumerate(zip(part.outputs, whole.outputs, strict=True)):
        worst = max(worst, _error(f"output {place} on rank {rank}", a, b, 0.0))
    for place, (c, d) in enumerate(zip(part.arguments, whole.arguments, strict=True)):
        worst = max(worst, _error(f"gradient of argument {place} on rank {rank}", c, d, scale))
    for name, buffer in whole.buffers.items():
        worst = max(worst, _error(f"buffer {name} on rank {rank}", part.buffers[name], buffer, 0.0))
    return worst


def _scale(gradients: Iterable[torch.Tensor | None]) -> float:
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
