"""Divided units proven once more at start-up, by the ranks themselves: real parameters, real collectives, one sample.

    divided:   x ──► this rank's parts, sums between ranks ──► y, gradients of parts
    whole:     x ──► the unit as it was; every divided tensor gathered while its module computes, then dropped ──► y …

The second way shares nothing with the first but the parts: no layer is divided, no gradient is partial. Where a unit
does not fit whole, tensors are gathered module by module, in the backward once more, so that one module has to fit. For
blocks whose proof was one of narrow instances. Knows installed units and their calls, on one rank of a group.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import psutil
import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from shardwise.describe.tensor import Slice, TensorPlan
from shardwise.errors import ModelError
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.install import Sharding
from shardwise.parallel.tensor.instance import Call, tensors_of
from shardwise.parallel.tensor.sequence_shard import whole_tokens
from shardwise.parallel.tensor.slices import cut, paste, whole_shape
from shardwise.parallel.tensor.sums import sum_partial
from shardwise.trace.placing import named_tensors
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["StartUp", "calls_at_start_up", "prove_on_ranks"]

StartUp = Mapping[str, Call]  # unit -> a call of one sample

# Relative; what sums in another order leave of a block. A wrong division differs by 1e-3 and more.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_ROUGH = 5e-2
_OTHER = 1e30  # the error of what cannot be compared
_FITS = 6  # times the bytes of what is gathered at once: values, gradients, saved, and room


def calls_at_start_up(kinds: list[Kind], plan: TensorPlan) -> StartUp:
    """One call of one sample for the first unit of each kind that is to be proven at start-up."""
    found: dict[str, Call] = {}
    for kind in kinds:
        for unit in kind.units:
            known = plan.units.get(unit)
            if kind.calls and known is not None and known.proof is not None and known.proof.start_up:
                found[unit] = _one_sample(kind.calls[0])
    return found


def _one_sample(call: Call) -> Call:
    num = next((tensor.shape[0] for tensor in call.tensors if tensor.is_floating_point() and tensor.dim()), 0)

    def first(leaf: object) -> object:
        return leaf[:1].clone() if isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == num else leaf

    return dataclasses.replace(call, args=tree_map(first, call.args), kwargs=tree_map(first, dict(call.kwargs)))


def prove_on_ranks(shardings: Mapping[str, Sharding], calls: StartUp, group: TensorGroup) -> dict[str, float]:
    """The largest relative error of each kind of unit. Collective: the ranks of `group` hold the same units.

    Parameters, gradients and buffers are left as they are. Raises `ModelError` on all ranks, with the unit and the
    first tensor that differs. Units of which one module does not fit are left out.
    """
    errors: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    for unit, call in calls.items():
        sharding = shardings.get(unit)
        if sharding is None or (key := _kind(sharding)) in seen:
            continue
        seen.add(key)
        gathering = _gathering(sharding, group)
        if gathering is not None:
            errors[unit] = _prove(unit, sharding, call, group, gathering)
    return errors


def _kind(sharding: Sharding) -> tuple[str, str]:
    """Equal on all ranks for the same units: else some would wait for others."""
    key = "" if sharding.plan.proof is None else sharding.plan.proof.key
    return sharding.plan.digest, key or type(sharding.module).__qualname__


# -- both ways ----------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Ran:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]  # of arguments and of this rank's parameters


def _prove(unit: str, sharding: Sharding, call: Call, group: TensorGroup, gathering: _Gathering) -> float:
    with _buffers_kept(sharding.module):
        divided = _run(sharding, call, group, None)
        whole = _run(sharding, call, group, gathering)
    worst, first, dtype = 0.0, "", _dtype(sharding.module)
    tolerance = _TOLERANCES.get(dtype, _ROUGH)
    scale = _root_mean_square(whole.gradients)
    pairs = [(f"output {i}", a, b, 0.0) for i, (a, b) in enumerate(zip(divided.outputs, whole.outputs, strict=True))]
    pairs += [(f"gradient of {n}", divided.gradients[n], b, scale) for n, b in whole.gradients.items()]
    for name, a, b, floor in pairs:
        error = _error(a, b, floor)
        worst, first = max(worst, error), first or (name if not error <= tolerance else "")
    everywhere = float(group.all_reduce_max(torch.tensor([min(worst, _OTHER)], device=_device(sharding.module)))[0])
    if not everywhere <= tolerance:
        how = f"by up to {everywhere:.1e}" if everywhere < _OTHER else "in its shape, or in where it is a finite number"
        raise ModelError(
            f"the plan of {unit} was proven in narrow instances, and on these ranks it is not equal to the unit whole: "
            f"{first or 'a tensor of another rank'} differs, {how} ({tolerance:g} is allowed in {dtype}); use tp=1, "
            "and report the model"
        )
    return everywhere


def _run(sharding: Sharding, call: Call, group: TensorGroup, gathering: _Gathering | None) -> _Ran:
    module = sharding.module
    args, kwargs, given = _arguments(call, _dtype(module), _device(module))
    own = {name: p for name, p in named_tensors(module).items() if isinstance(p, nn.Parameter) and p.requires_grad}
    with gathering.on() if gathering is not None else contextlib.nullcontext(), RandomMode(_SCOPE), torch.enable_grad():
        out = [whole_tokens(tensor) for tensor in tensors_of(module(*args, **kwargs))]
        read = [out[place] for place in range(len(out)) if call.read is None or place in call.read]
        wanted = [tensor for tensor in read if tensor.requires_grad]
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in wanted]
        asked = {**given, **own}
        found = torch.autograd.grad(wanted, list(asked.values()), cotangents, allow_unused=True) if wanted else []
    gradients = {
        name: torch.zeros_like(tensor) if gradient is None else gradient.clone()
        for (name, tensor), gradient in zip(asked.items(), found, strict=True)
    }
    if gathering is None:
        sum_partial({name: gradient for name, gradient in gradients.items() if name in own}, sharding.plan, group)
    return _Ran(outputs=[tensor.detach() for tensor in read], gradients=gradients)


_SCOPE = Scope(seed=0, step=0, micro_batch=0, samples=(0,), place="unit")


def _arguments(
    call: Call, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, torch.Tensor]]:
    """Random arguments, the same on every rank; those that want a gradient by name."""
    leaves, spec = tree_flatten(call.fresh(seed=7))
    given: dict[str, torch.Tensor] = {}
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            moved = leaf.detach().to(device, dtype) if leaf.is_floating_point() else leaf.to(device)
            leaves[place] = moved.requires_grad_(leaf.requires_grad)
            if leaf.requires_grad:
                given[f"argument {place}"] = leaves[place]
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs, given


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    before = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


def _root_mean_square(gradients: Mapping[str, torch.Tensor]) -> float:
    count = sum(gradient.numel() for gradient in gradients.values())
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return math.sqrt(squares / count) if count else 0.0


def _error(a: torch.Tensor, b: torch.Tensor, scale: float) -> float:
    if a.shape != b.shape:
        return math.inf
    if not b.is_floating_point():
        return 0.0 if torch.equal(a, b) else math.inf
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()) or (b.numel() and not bool(finite.any())):
        return math.inf  # of tensors without a finite number nothing is compared
    a, b = torch.where(finite, a.double(), 0.0), torch.where(finite, b.double(), 0.0)
    return float((a - b).norm()) / max(float(b.norm()), 1e-2 * scale * math.sqrt(b.numel()), 1e-30)


# -- the unit whole -----------------------------------------------------------------------------


def _gathering(sharding: Sharding, group: TensorGroup) -> _Gathering | None:
    """All of the unit at once where that fits on every rank, else module by module; None where one does not fit."""
    local = {name: named_tensors(sharding.module)[name] for name in sharding.plan.slices}
    sizes = {
        name: math.prod(whole_shape(tensor.shape, sharding.plan.slices[name], group.rank)) * tensor.element_size()
        for name, tensor in local.items()
    }
    of_modules: dict[str, int] = {}
    for name, size in sizes.items():
        of_modules[name.rpartition(".")[0]] = of_modules.get(name.rpartition(".")[0], 0) + size
    short = [float(_FITS * needed > _free(local)) for needed in (sum(sizes.values()), max(of_modules.values()))]
    at_once, one = group.all_reduce_max(torch.tensor(short, device=_device(sharding.module))).tolist()
    return None if one else _Gathering(sharding, local, group, at_once=not at_once)


def _free(local: Mapping[str, torch.Tensor]) -> int:
    device = next(iter(local.values())).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) // 4  # ranks of one host share it


class _Gathering:
    """Runs an installed unit whole: its divided tensors are put together from all ranks while they are needed."""

    def __init__(
        self, sharding: Sharding, local: Mapping[str, torch.Tensor], group: TensorGroup, *, at_once: bool
    ) -> None:
        self._sharding = sharding
        self._local = local
        self._group = group
        self._at_once = at_once
        self._names: dict[int, str] = {}  # storage of what is gathered now -> name

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """The unit whole; forward and backward happen inside, on all ranks alike."""
        unit = self._sharding.module
        modules = dict(unit.named_modules(remove_duplicate=False))
        owners: dict[str, list[str]] = {}
        for name in self._local:
            owners.setdefault("" if self._at_once else name.rpartition(".")[0], []).append(name)
        handles = []
        with self._sharding.off(), contextlib.ExitStack() as stack:
            for owner, names in owners.items():
                places = [(_table(modules, name), name.rpartition(".")[2], name) for name in names]
                enter, leave = self._hooks(places)
                handles.append(modules[owner].register_forward_pre_hook(enter))
                handles.append(modules[owner].register_forward_hook(leave, always_call=True))
            if not self._at_once:
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _hooks(
        self, places: list[tuple[dict[str, Any], str, str]]
    ) -> tuple[Callable[[nn.Module, Any], None], Callable[[nn.Module, Any, Any], None]]:
        shown: dict[str, Any] = {}

        def enter(module: nn.Module, args: Any) -> None:
            for table, leaf, name in places:
                whole = _whole(self._local[name], self._sharding.plan.slices[name], self._group)
                self._names[whole.untyped_storage().data_ptr()] = name
                shown[name], table[leaf] = table[leaf], whole

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            for table, leaf, name in places:
                if name in shown:
                    self._names.pop(table[leaf].untyped_storage().data_ptr(), None)
                    table[leaf] = shown.pop(name)

        return enter, leave

    def _pack(self, tensor: torch.Tensor) -> Any:
        name = self._names.get(tensor.untyped_storage().data_ptr())
        return tensor if name is None else (name, tensor.shape, tensor.stride(), tensor.storage_offset())

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        name, shape, stride, offset = packed
        with torch.no_grad():
            whole = _whole(self._local[name], self._sharding.plan.slices[name], self._group)
        return whole.as_strided(shape, stride, offset)


def _table(modules: Mapping[str, nn.Module], name: str) -> dict[str, Any]:
    owner, _, leaf = name.rpartition(".")
    module = modules[owner]
    table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    return table


def _whole(local: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
    whole: torch.Tensor = _Joined.apply(local, part, group)  # type: ignore[no-untyped-call]
    return whole


class _Joined(torch.autograd.Function):
    """A divided tensor put together on every rank; its gradient is this rank's part of the whole one."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, part: Slice, group: TensorGroup) -> torch.Tensor:
        ctx.part, ctx.rank = part, group.rank
        return group.all_reduce(paste(local.detach(), part, group.rank, owned=True))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return cut(gradients[0].contiguous(), ctx.part, ctx.rank), None, None
