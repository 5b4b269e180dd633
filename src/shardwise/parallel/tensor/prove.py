"""The proof: a unit whole and the same unit divided among threads, on random numbers in float64, compared.

Outputs, gradients of arguments, gradients of all parameters and written buffers must agree. What the comparison itself
shows (a replicated parameter's partial gradient, a returned tensor that is a part, a divided dropout mask) is put into
the plan, which is then proven again. Knows plans; refuses to guess.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.describe.proof import Proof
from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.extra_outputs import picked_up
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.sequence_shard import whole_tokens
from shardwise.parallel.tensor.slices import join, whole_shape
from shardwise.parallel.tensor.sums import sum_partial
from shardwise.parallel.tensor.threads import on_threads
from shardwise.trace.multi_head import multi_head_attention
from shardwise.trace.random_calls import is_random
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["TOLERANCE", "Difference", "Draws", "Wholes", "prove"]

TOLERANCE = 1e-9  # relative; float64 sums in another order differ by 1e-15, a wrong division by 1e-3 and more
_SAME = 1e-6  # relative; of what several ranks hold, as of partial gradients
_ROUNDS = 5
_FILLS = (1.0, 0.0)  # what masks are that hide nothing: factors, terms
_VANISHES = 1e-9  # of the root mean square of all gradients
_MOST_KEPT = 2**25  # parameters of a unit whose whole runs are kept


class Difference(Exception):  # noqa: N818  it is a finding, not a fault
    """The first tensor in which the divided unit differs from the whole one."""


@dataclasses.dataclass(kw_only=True, slots=True)
class _Run:
    """What one forward and backward left."""

    outputs: dict[int, torch.Tensor]  # those that are read outside, by place
    extras: dict[str, torch.Tensor]  # what it has left elsewhere for who reads it
    arguments: dict[str, torch.Tensor | None]  # gradients
    parameters: dict[str, torch.Tensor | None]  # gradients
    summed: dict[str, torch.Tensor | None]  # the same, after partial ones were summed
    buffers: dict[str, torch.Tensor]
    draws: list[tuple[int, ...]]  # shapes of what was drawn
    num_samples: int


def prove(
    unit: nn.Module,
    call: Call,
    plan: UnitPlan,
    *,
    tp: int,
    training: bool,
    seed: int = 0,
    complete: bool = False,
    sums: bool = True,
    wholes: Wholes | None = None,
) -> tuple[UnitPlan, float]:
    """The plan that is proven, this comparison added to its proof, and the largest relative error.

    `unit` is real, in float64; it is left as it is. With `complete` the plan is completed by what the comparison shows
    (without `sums` by partial outputs and draws, not by partial gradients), without it is taken as it is. Raises
    `Difference` where it is not equal to the whole, or whatever the divided unit raises. `wholes` keeps the runs of the
    whole `unit` for its next proofs.
    """
    known = Wholes() if wholes is None else wholes
    plan, error, vanish = _proven(unit, call, plan, tp, training, seed, None, complete, sums, known)
    for fill in _FILLS:
        if vanish and call.constants:  # a random mask may hide all but one token: then no weight of it matters
            plan, other, still = _proven(unit, call, plan, tp, training, seed, fill, complete, sums, known)
            error, vanish = max(error, other), vanish & still
    if vanish:
        raise Difference(f"gradient of {min(vanish)} vanishes whatever the data: nothing is proven of it")
    proof = (plan.proof or Proof(tp=tp)).and_run(
        training=training,
        dropout=training and bool(known.of(unit, call, training, seed).draws),
        error=error,
        new_signature=training,
    )
    return dataclasses.replace(plan, proof=proof), error


def _proven(
    unit: nn.Module,
    call: Call,
    plan: UnitPlan,
    tp: int,
    training: bool,
    seed: int,
    fill: float | None,
    complete: bool,
    sums: bool,
    wholes: Wholes,
) -> tuple[UnitPlan, float, frozenset[str]]:
    """The plan, its error on one set of numbers, and the divided matrices of whose gradient they showed nothing."""
    whole = wholes.of(unit, call, training, seed, fill)
    for _ in range(_ROUNDS):
        given = plan
        parts = on_threads(tp, lambda group: _divided(unit, call, given, group, training, seed, whole, fill))  # noqa: B023
        completed = _completed(plan, whole, parts, tp, sums=sums) if complete else None
        if completed is None:
            return plan, _compare(plan, whole, parts), _vanishing(plan, whole)
        plan = completed
    raise Difference("the plan was still growing after several rounds")


def _vanishing(plan: UnitPlan, whole: _Run) -> frozenset[str]:
    scale = _scale(whole.parameters)
    gradients = {name: whole.parameters.get(name) for name in plan.slices}
    return frozenset(
        name
        for name, gradient in gradients.items()
        if gradient is not None
        and gradient.dim() > 1
        and not float(gradient.norm()) > _VANISHES * scale * math.sqrt(gradient.numel())
    )


class Wholes:
    """The runs of one whole unit: many plans of it are compared with the same. Those of large units are not kept."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool, int, float | None], _Run] = {}
        self.reached: set[str] = set()  # parameters that some run has a gradient of, and those that ask for none

    def of(self, unit: nn.Module, call: Call, training: bool, seed: int, fill: float | None = None) -> _Run:
        """The run of `call`, made if it is not known; always with the same `unit`, and calls that stay alive."""
        key = (id(call), training, seed, fill)
        if key in self._known:
            return self._known[key]
        made = _run(_own(unit, training), call, None, None, seed, fill=fill)
        frozen = {name for name, parameter in unit.named_parameters() if not parameter.requires_grad}
        self.reached |= frozen | {name for name, gradient in made.parameters.items() if gradient is not None}
        if sum(parameter.numel() for parameter in unit.parameters()) <= _MOST_KEPT:
            self._known[key] = made
        return made


def _divided(
    unit: nn.Module,
    call: Call,
    plan: UnitPlan,
    group: TensorGroup,
    training: bool,
    seed: int,
    whole: _Run,
    fill: float | None,
) -> _Run:
    copied = _own(unit, training)
    shard_unit(copied, plan, group)
    return _run(copied, call, plan, group, seed, whole, fill=fill)


def _own(unit: nn.Module, training: bool) -> nn.Module:
    copied = twin(unit)
    copied.train(training)  # some models' own `train` returns nothing
    return copied


def _run(
    unit: nn.Module,
    call: Call,
    plan: UnitPlan | None,
    group: TensorGroup | None,
    seed: int,
    whole: _Run | None = None,
    *,
    fill: float | None = None,
) -> _Run:
    """One forward and backward; no backward where outputs are already other than those of `whole`."""
    args, kwargs = call.fresh(seed=seed, fill=fill)
    given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    draws = Draws()
    with picked_up(unit, call.extras) as left, Doubled(), RandomMode(_scope(given)), draws, torch.enable_grad():
        out = unit(*args, **kwargs)
    extras = {what: whole_tokens(tensor) for what, tensor in left((args, kwargs)).items()}
    made = [whole_tokens(tensor) for tensor in tensors_of(out)]
    outputs = {place: tensor for place, tensor in enumerate(made) if call.read is None or place in call.read}
    if whole is not None:
        _refuse_early(outputs, draws.shapes, whole)
    _backward([*outputs.values(), *extras.values()], seed)
    raw = {name: parameter.grad for name, parameter in unit.named_parameters()}
    summed = {name: None if grad is None else grad.clone() for name, grad in raw.items()}
    if plan is not None and group is not None:
        sum_partial({name: grad for name, grad in summed.items() if grad is not None}, plan, group)
    return _Run(
        outputs={place: tensor.detach() for place, tensor in outputs.items()},
        extras={what: tensor.detach() for what, tensor in extras.items()},
        arguments={f"argument {place}": tensor.grad for place, tensor in enumerate(given)},
        parameters=raw,
        summed=summed,
        buffers={name: buffer.detach() for name, buffer in unit.named_buffers()},
        draws=draws.shapes,
        num_samples=_num_samples(given),
    )


def _refuse_early(outputs: Mapping[int, torch.Tensor], draws: Sequence[tuple[int, ...]], whole: _Run) -> None:
    """Raises `Difference` for an output that differs, unless what is drawn or returned in parts is still unknown."""
    if list(draws) != whole.draws or outputs.keys() != whole.outputs.keys():
        return
    if all(outputs[place].shape == tensor.shape for place, tensor in whole.outputs.items()):
        for place, tensor in whole.outputs.items():
            _error(f"output {place}", outputs[place].detach(), tensor, 0.0)


def _scope(given: Sequence[torch.Tensor]) -> Scope:
    return Scope(seed=0, step=0, micro_batch=0, samples=tuple(range(_num_samples(given))), place="unit")


def _num_samples(given: Sequence[torch.Tensor]) -> int:
    return given[0].shape[0] if given and given[0].dim() else 1


def _backward(outputs: Sequence[torch.Tensor], seed: int) -> None:
    """Every output that has a gradient gets a random one; a part (of a per-head tensor) a constant, for its shape."""
    generator = torch.Generator().manual_seed(seed + 1)
    wanted = [tensor for tensor in outputs if tensor.requires_grad]
    gradients = [torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) for tensor in wanted]
    if wanted:
        torch.autograd.backward(wanted, gradients)


class Draws(TorchFunctionMode):
    """Notes the shapes of what is drawn, whole or divided."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward and is_random(func, args, kwargs):
            with self:  # its draw is a call inside
                return multi_head_attention(*args, **kwargs)
        if is_random(func, args, kwargs):
            self.shapes.append(_drawn_shape(func, args, kwargs))
        return func(*args, **kwargs)


def _drawn_shape(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(first, torch.Tensor):
        return ()
    if func is F.scaled_dot_product_attention:
        key = args[1] if len(args) > 1 else kwargs["key"]
        return (*first.shape[:-1], key.shape[-2])
    return tuple(first.shape)


# -- what the comparison shows ------------------------------------------------------------------


def _completed(plan: UnitPlan, whole: _Run, parts: Sequence[_Run], tp: int, *, sums: bool) -> UnitPlan | None:
    """The plan with what is missing in it; None where nothing is."""
    draws = dict(plan.draws)
    for number, (shape, local) in enumerate(zip(whole.draws, parts[0].draws, strict=False)):
        if number not in draws and shape != local:
            draws[number] = _even(shape, local, tp, samples=whole.num_samples, what=f"draw {number}")
    outputs = dict(plan.outputs)
    for place, part in parts[0].outputs.items():
        tensor = whole.outputs[place]
        if place not in outputs and tensor.shape != part.shape:
            outputs[place] = _even(tensor.shape, part.shape, tp, samples=whole.num_samples, what=f"output {place}")
    if len(draws) > len(plan.draws) or len(outputs) > len(plan.outputs):
        return dataclasses.replace(plan, draws=draws, outputs=outputs)
    if not sums:
        return None
    partial = {name for name, gradient in whole.parameters.items() if _is_partial(name, gradient, plan, parts)}
    if partial - plan.partial:
        return dataclasses.replace(plan, partial=plan.partial | partial)
    return None


def _is_partial(name: str, whole: torch.Tensor | None, plan: UnitPlan, parts: Sequence[_Run]) -> bool:
    """Whether the ranks' gradients of a parameter held whole are not the whole's, but add up to it."""
    if whole is None or name in plan.slices or name in plan.partial:
        return False
    gradients = [part.parameters[name] for part in parts]
    given = [gradient for gradient in gradients if gradient is not None]
    if not given or any(gradient.shape != whole.shape for gradient in given):
        return False
    scale = max(float(whole.norm()), 1e-12)
    if len(given) == len(gradients) and all(float((g - whole).norm()) < 1e-6 * scale for g in given):
        return False
    return float((torch.stack(given).sum(0) - whole).norm()) < 1e-6 * scale


def _even(shape: Sequence[int], local: Sequence[int], tp: int, *, samples: int, what: str) -> Slice:
    differ = [dim for dim, (n, m) in enumerate(zip(shape, local, strict=False)) if n != m]
    if len(shape) != len(local) or len(differ) != 1 or local[differ[0]] * tp != shape[differ[0]]:
        raise Difference(f"{what} has shape {tuple(local)} where {tuple(shape)} is divided")
    dim = differ[0]
    size = shape[dim] // samples if dim == 0 and shape[0] % samples == 0 else shape[dim]
    return Slice.even(dim, size, tp)


# -- the comparison -----------------------------------------------------------------------------


def _compare(plan: UnitPlan, whole: _Run, parts: Sequence[_Run]) -> float:
    worst = 0.0
    scale = _scale(whole.parameters)
    for rank, part in enumerate(parts):
        if part.outputs.keys() != whole.outputs.keys():
            raise Difference(f"rank {rank} returns {len(part.outputs)} tensors, the whole unit {len(whole.outputs)}")
        for place, tensor in whole.outputs.items():
            worst = max(worst, _error(f"output {place}", part.outputs[place], tensor, 0.0))
        for what in (*whole.extras, *part.extras):
            worst = max(worst, _error(what, part.extras.get(what), whole.extras.get(what), 0.0))
        for name, gradient in whole.arguments.items():
            worst = max(worst, _error(f"gradient of {name}", part.arguments[name], gradient, scale))
        for name, gradient in whole.summed.items():
            if name not in plan.slices:
                worst = max(worst, _error(f"gradient of {name}", part.summed[name], gradient, scale))
        for name, buffer in whole.buffers.items():
            if name not in plan.slices:
                worst = max(worst, _error(f"buffer {name}", part.buffers[name], buffer, 0.0))
    for name, cut in plan.slices.items():
        if name in whole.summed:
            locals_ = [part.summed[name] for part in parts]
            worst = max(worst, _error(f"gradient of {name}", _joined(locals_, cut), whole.summed[name], scale))
        elif name in whole.buffers:
            joined = _joined([part.buffers[name] for part in parts], cut)
            worst = max(worst, _error(f"buffer {name}", joined, whole.buffers[name], 0.0))
    return worst


def _joined(locals_: Sequence[torch.Tensor | None], cut: Slice) -> torch.Tensor | None:
    """The whole of which ranks hold parts. What several hold must be equal on all: else not a number."""
    given = [local for local in locals_ if local is not None]
    if len(given) < len(locals_):
        return None
    whole = join(given, cut, within=_SAME)
    return (
        torch.full(whole_shape(given[0].shape, cut, 0), float("nan"), dtype=given[0].dtype) if whole is None else whole
    )


def _scale(gradients: Mapping[str, torch.Tensor | None]) -> float:
    """The root mean square of all gradients: a gradient that is zero by symmetry is zero compared with this."""
    given = [gradient for gradient in gradients.values() if gradient is not None]
    count = sum(gradient.numel() for gradient in given)
    return math.sqrt(float(torch.stack([g.square().sum() for g in given]).sum()) / count) if count else 0.0


def _error(what: str, a: torch.Tensor | None, b: torch.Tensor | None, scale: float) -> float:
    if a is None or b is None:
        if a is b or float((a if b is None else b).abs().max()) == 0.0:  # type: ignore[union-attr]
            return 0.0
        raise Difference(f"{what} is missing on {'a rank' if a is None else 'one device'}")
    if a.shape != b.shape:
        raise Difference(f"{what} has shape {tuple(a.shape)} and not {tuple(b.shape)}")
    if a.numel() == 0 or not b.is_floating_point():
        if not torch.equal(a, b):
            raise Difference(f"{what} is another")
        return 0.0
    apart = float((a - b).norm())
    if not math.isfinite(apart):
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()):
            raise Difference(f"{what} is not finite on both sides")
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        apart = float((a - b).norm())
    against = max(float(b.norm()), 1e-3 * scale * math.sqrt(b.numel()), 1e-30)
    error = apart / against
    if not error <= TOLERANCE:
        raise Difference(f"{what} differs by {error:.1e}")
    return error
