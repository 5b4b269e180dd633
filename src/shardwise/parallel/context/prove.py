"""The proof: a unit with all tokens and the same unit on own tokens among threads, in float64, compared.

Outputs, what is left elsewhere, gradients of arguments and of parameters (summed over the ranks) and written buffers
must agree. Knows plans of units; refuses to guess.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.context import ByToken, ContextPlan, UnitContext
from shardwise.parallel.context.attend import Attention
from shardwise.parallel.context.install import DealtContext
from shardwise.parallel.context.observe import Observer
from shardwise.parallel.context.region import ContextRegion
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.extra_outputs import picked_up
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.prove import Difference
from shardwise.parallel.tensor.sequence_shard import SequenceShard, whole_tokens
from shardwise.parallel.tensor.threads import on_threads
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["TOLERANCE", "Seen", "Way", "observed", "proven"]

TOLERANCE = 1e-9  # relative; float64 sums in another order differ by 1e-15


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """How ranks divide sequences and attend."""

    cp: int
    zigzag: bool
    attention: Attention

    def region(self, group: TensorGroup) -> ContextRegion:
        """Of one rank."""
        return ContextRegion(group, zigzag=self.zigzag, attention=self.attention)


@dataclasses.dataclass(kw_only=True, slots=True)
class Seen:
    """What a run on own tokens shows: dims of what leaves by tokens, modules by token, who asked for all tokens."""

    outputs: dict[int, int]
    by_token: dict[str, ByToken]
    joined: tuple[str, ...]
    draws: bool


def observed(unit: nn.Module, call: Call, own: UnitContext, way: Way, *, training: bool) -> Seen:
    """A run of `unit` on threads with the arguments `own.inputs` dealt out. Raises whatever the unit raises."""

    def run(group: TensorGroup) -> Seen:
        copied = _own(unit, training)
        region = way.region(group)
        holder = _Holder(copied)
        plan = ContextPlan(cp=way.cp, units={"unit": own})
        args, kwargs = call.fresh(seed=0)
        mode = RandomMode(_scope((args, kwargs)))
        observer = Observer(copied, region, mode, leaves_only=bool(call.extras))
        entered = _Entered(holder, plan, region)
        with Doubled(), mode, torch.enable_grad():
            made = entered.run(args, kwargs)
        outputs = {
            place: tensor.tokens.dim
            for place, tensor in enumerate(tensors_of(made))
            if isinstance(tensor, SequenceShard) and tensor.tokens.others == 1
        }
        joined = tuple(sorted(region.joined_at))
        return Seen(outputs=outputs, by_token=observer.found, joined=joined, draws=mode.index > 0)

    return on_threads(way.cp, run)[0]


def proven(unit: nn.Module, call: Call, own: UnitContext, way: Way, *, training: bool, seed: int = 0) -> float:
    """The largest relative error of `unit` as `own` says. Raises `Difference`, or whatever the unit raises."""
    whole = _run(_own(unit, training), call, seed)

    def run(group: TensorGroup) -> _Run:
        copied = _Holder(_own(unit, training))
        dealt = DealtContext(copied, ContextPlan(cp=way.cp, units={"unit": own}), way.region(group), ["unit"])
        made = _run(copied.unit, call, seed, share=1.0 / way.cp)
        dealt.close()
        return made

    return _compared(whole, on_threads(way.cp, run))


class _Holder(nn.Module):
    """A unit by the name that plans here have for it."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit


class _Entered(DealtContext):
    """A unit's body as it is entered, its outputs as they come."""

    def __init__(self, holder: _Holder, plan: ContextPlan, region: ContextRegion) -> None:
        super().__init__(holder, plan, region, ())
        self._holder, self._of_unit = holder, plan.units["unit"]

    def run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return self._unit(self._holder.unit.forward, self._of_unit)(*args, **kwargs)

    def _left(self, out: Any, own: UnitContext) -> Any:
        return out


@dataclasses.dataclass(kw_only=True, slots=True)
class _Run:
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]


def _own(unit: nn.Module, training: bool) -> nn.Module:
    copied = twin(unit)
    copied.train(training)
    return copied


def _scope(given: Any) -> Scope:
    wanted = [tensor for tensor in tensors_of(given) if tensor.requires_grad] or tensors_of(given)
    samples = wanted[0].shape[0] if wanted and wanted[0].dim() else 1
    return Scope(seed=0, step=0, micro_batch=0, samples=tuple(range(samples)), place="unit")


def _run(unit: nn.Module, call: Call, seed: int, *, share: float = 1.0) -> _Run:
    """One forward and backward; every output that has a gradient gets a random one, times `share`."""
    args, kwargs = call.fresh(seed=seed)
    given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    with picked_up(unit, call.extras) as left, Doubled(), RandomMode(_scope((args, kwargs))), torch.enable_grad():
        out = unit(*args, **kwargs)
    extras = {what: whole_tokens(tensor) for what, tensor in left((args, kwargs)).items()}
    made = [whole_tokens(tensor) for tensor in tensors_of(out)]
    read = {f"output {n}": tensor for n, tensor in enumerate(made) if call.read is None or n in call.read}
    outputs = {**read, **extras}
    generator = torch.Generator().manual_seed(seed + 1)
    wanted = [tensor for tensor in outputs.values() if tensor.requires_grad]
    cotangents = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * share for tensor in wanted]
    if wanted:
        torch.autograd.backward(wanted, cotangents)
    gradients = {f"argument {n}": tensor.grad for n, tensor in enumerate(given)}
    return _Run(
        outputs={what: tensor.detach() for what, tensor in outputs.items()},
        gradients={**gradients, **{name: parameter.grad for name, parameter in unit.named_parameters()}},
        buffers={name: buffer.detach() for name, buffer in unit.named_buffers()},
    )


def _compared(whole: _Run, parts: Sequence[_Run]) -> float:
    worst = 0.0
    for part in parts:
        if part.outputs.keys() != whole.outputs.keys():
            raise Difference(f"it returns {len(part.outputs)} tensors on own tokens, {len(whole.outputs)} on all")
        for what, tensor in (*whole.outputs.items(), *whole.buffers.items()):
            other = part.outputs.get(what, part.buffers.get(what))
            worst = max(worst, _error(what, other, tensor, 0.0))
    scale = max((float(g.square().mean().sqrt()) for g in whole.gradients.values() if g is not None), default=0.0)
    for name, gradient in whole.gradients.items():
        summed = _sum([part.gradients.get(name) for part in parts])
        worst = max(worst, _error(f"gradient of {name}", summed, gradient, scale))
    return worst


def _sum(gradients: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    given = [gradient for gradient in gradients if gradient is not None]
    return torch.stack(given).sum(0) if given else None


def _error(what: str, a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    """Raises `Difference` beyond the tolerance."""
    if a is None or b is None:
        missing = a if b is None else b
        if missing is None or not bool(missing.any()):
            return 0.0
        raise Difference(f"{what} is missing on {'own' if a is None else 'all'} tokens")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise Difference(f"{what} is {a.dtype} {tuple(a.shape)} on own tokens, {b.dtype} {tuple(b.shape)} on all")
    if not b.is_floating_point():
        if not torch.equal(a, b):
            raise Difference(f"{what} differs")
        return 0.0
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        raise Difference(f"{what} differs in where it is a finite number")
    a, b = torch.where(finite, a.double(), 0.0), torch.where(finite, b.double(), 0.0)
    error = float((a - b).norm()) / max(float(b.norm()), 1e-2 * scale * math.sqrt(b.numel()), 1e-30)
    if not error <= TOLERANCE:
        raise Difference(f"{what} differs by {error:.1e}")
    return error
