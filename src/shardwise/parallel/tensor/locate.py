"""Where a divided unit first goes another way than the whole one: the module in which it fails, or whose sum differs.

    x ──► q_proj ──► … ──► o_proj (summed: must be whole here) ──► … ──► down_proj (the same)

Modules of the region between are in parts on purpose; those that a plan closes (sums, joins, tables) and the unit
itself must return what they return on one device. Runs the unit twice more; for words in an error, not for a decision.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.tensor import UnitPlan
from shardwise.parallel.tensor.collectives import TensorGroup
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.threads import on_threads

__all__ = ["first_module"]

_CLOSE = 1e-6  # relative; in float64 sums in another order differ by 1e-15


@dataclasses.dataclass(slots=True)
class _Seen:
    """Modules in the order in which they returned, with what they returned; where it ended if it failed."""

    returned: list[tuple[str, list[torch.Tensor]]] = dataclasses.field(default_factory=list)
    inside: list[str] = dataclasses.field(default_factory=list)  # modules that have not returned, the innermost last


def first_module(unit: nn.Module, call: Call, plan: UnitPlan, *, tp: int, seed: int = 0) -> str:
    """The name of the first module that fails or differs in a forward in evaluation; "" where none does.

    `unit` is real, in float64; it is left as it is.
    """
    whole = _Seen()
    _run(twin(unit), call, whole, seed)
    ranks = [_Seen() for _ in range(tp)]

    def divided(group: TensorGroup) -> None:
        copied = twin(unit)
        shard_unit(copied, plan, group)
        _run(copied, call, ranks[group.rank], seed)

    try:
        on_threads(tp, divided)
    except Exception:  # it is wrong: any error of the model, in one of the modules below
        longest = max(ranks, key=lambda seen: (len(seen.inside), len(seen.returned)))
        return longest.inside[-1] if longest.inside else ""
    closed = {*plan.reduces, *plan.joins, *plan.alone, *plan.lookups, ""}
    answers = {name: tensors for name, tensors in ranks[0].returned if name in closed}
    for name, tensors in whole.returned:
        if name in answers and not _same(tensors, answers[name]):
            return name
    return ""


def _run(unit: nn.Module, call: Call, seen: _Seen, seed: int) -> None:
    unit.train(False)
    args, kwargs = call.fresh(seed=seed)
    with _watched(unit, seen), Doubled(), torch.no_grad():
        unit(*args, **kwargs)


@contextlib.contextmanager
def _watched(unit: nn.Module, seen: _Seen) -> Iterator[None]:
    handles = []
    for name, module in unit.named_modules():

        def enter(module: nn.Module, args: Any, *, name: str = name) -> None:
            seen.inside.append(name)

        def leave(module: nn.Module, args: Any, out: Any, *, name: str = name) -> None:
            seen.inside.pop()
            seen.returned.append((name, [tensor.detach().clone() for tensor in tensors_of(out)]))

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    if len(a) != len(b):
        return False
    return all(
        x.shape == y.shape and (not x.is_floating_point() or bool(torch.allclose(x, y, rtol=_CLOSE, atol=_CLOSE)))
        for x, y in zip(a, b, strict=True)
    )
