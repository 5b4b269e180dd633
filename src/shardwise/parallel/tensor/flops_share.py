"""How much of a forward's flops a plan divides: counted, without numbers, of whole units and of one shard of them.

    whole F, one of tp shards f:    f = F (1 - d) + F d / tp    gives the share    d = (1 - f / F) / (1 - 1 / tp)

Knows kinds of units and their plans. A unit that does not run without numbers (it looks at values) counts by its
parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shardwise.describe.tensor import UnitPlan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import Call
from shardwise.parallel.tensor.silent import SilentGroup
from shardwise.trace.count import flops_of
from shardwise.trace.placing import held_tensors, named_tensors

__all__ = ["flops_share", "on_meta", "without_values"]


def flops_share(kinds: Sequence[Kind], plans: Mapping[str, UnitPlan], *, tp: int) -> float | None:
    """Of the flops of one forward of every called unit, the share that is divided; None where nothing was counted."""
    divided = total = 0.0
    for kind in kinds:
        if not kind.calls:
            continue
        whole = _flops(kind, None, tp)
        if not whole:
            continue
        part = _flops(kind, plans[kind.unit], tp) if kind.unit in plans else whole
        total += whole * len(kind.units)
        divided += len(kind.units) * whole * _share(kind, plans.get(kind.unit), whole, part, tp)
    return divided / total if total else None


def _share(kind: Kind, plan: UnitPlan | None, whole: int, part: int | None, tp: int) -> float:
    if plan is None or tp == 1:
        return 0.0
    if part is not None:
        return max(0.0, min(1.0, (1 - part / whole) / (1 - 1 / tp)))
    sizes = {name: parameter.numel() for name, parameter in kind.module.named_parameters() if parameter.dim() > 1}
    return sum(sizes.get(name, 0) for name in plan.slices) / max(1, sum(sizes.values()))


def _flops(kind: Kind, plan: UnitPlan | None, tp: int) -> int | None:
    unit = without_values(kind.module)
    try:
        if plan is not None:
            shard_unit(unit, plan, SilentGroup(tp))
        return sum(_run(unit, call) for call in kind.calls)
    except Exception:  # whatever a model does that needs numbers
        return None


def _run(unit: nn.Module, call: Call) -> int:
    counting = _Counting()
    args, kwargs = tree_map(on_meta, (call.args, dict(call.kwargs)))
    with torch.no_grad(), counting:
        unit(*args, **kwargs)
    return counting.flops


def on_meta(leaf: object) -> object:
    """A tensor without its numbers; a copy of anything else."""
    return leaf.to("meta") if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)


def without_values(unit: nn.Module) -> nn.Module:
    """A copy of `unit` in evaluation, its tensors without numbers."""
    memo: dict[int, Any] = {}
    for tensor in named_tensors(unit).values():
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    for module in unit.modules():
        for _, leaves, _ in held_tensors(module):  # states that an earlier forward has left, with its graph
            held = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and id(leaf) not in memo]
            memo.update({id(leaf): torch.empty_like(leaf.detach(), device="meta") for leaf in held})
    return copy.deepcopy(unit, memo).eval()


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the flops of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        return out
