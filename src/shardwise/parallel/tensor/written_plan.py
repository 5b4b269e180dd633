"""Plans in the words of transformers (`{"layers.*.self_attn.q_proj": "colwise", …}`) as plans of units.

Words are taken at their meaning, and proven afterwards like any plan (`check_plan`). Knows patterns and layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import torch.nn as nn

from shardwise.describe.tensor import Slice, TensorPlan, UnitPlan
from shardwise.errors import ModelError
from shardwise.parallel.tensor.layers import layer_of

__all__ = ["written_plan"]

_COLUMNS, _ROWS, _PARTIAL = "colwise", "rowwise", "replicated_with_grad_allreduce"
_KNOWN = (_COLUMNS, _ROWS, _PARTIAL)


def written_plan(model: nn.Module, words: Mapping[str, str], units: Iterable[str], *, tp: int) -> TensorPlan:
    """The plan that `words` (pattern of module names, with `*` for numbers -> style) say for `units`.

    Modules outside of units are left whole. Raises `ModelError` for a style that is not known, a pattern that names no
    module, and a layer that does not divide.
    """
    matched: set[str] = set()
    plans: dict[str, UnitPlan] = {}
    for unit in units:
        plan = UnitPlan()
        for name, module in model.get_submodule(unit).named_modules():
            for pattern, style in words.items():
                if _fits(pattern, f"{unit}.{name}" if name else unit):
                    matched.add(pattern)
                    plan = _with(plan, name, module, style, tp)
        if plan != UnitPlan():
            plans[unit] = plan
    names = [name for name, _ in model.named_modules()]
    for pattern in words.keys() - matched:
        if not any(_fits(pattern, name) for name in names):
            raise ModelError(f"a plan names modules of the model: no module is called {pattern!r}")
    return TensorPlan(tp=tp, units=plans, reasons={}, sharded_share=0.0)


def _fits(pattern: str, name: str) -> bool:
    """Whether the last parts of `name` are those of `pattern`: a base model's plan holds inside its wrappers too."""
    expression = re.escape(pattern).replace(r"\*", r"\d+")
    return re.fullmatch(rf"(.*\.)?{expression}", name) is not None


def _with(plan: UnitPlan, name: str, module: nn.Module, style: str, tp: int) -> UnitPlan:
    if style not in _KNOWN:
        raise ModelError(f"a plan's styles are {', '.join(_KNOWN)}, and {name} is {style!r}; leave the plan out")
    if style == _PARTIAL:
        own = {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
        return dataclasses.replace(plan, partial=plan.partial | own)
    layer = layer_of(module)
    if layer is None:
        raise ModelError(f"only matrix products are {style}; {name} is a {type(module).__name__}")
    slices = dict(plan.slices)
    if style == _ROWS:
        slices[f"{name}.weight"] = Slice.even(layer.in_dim, layer.num_in(module), tp)
        return dataclasses.replace(plan, reduces=(*plan.reduces, name), slices=slices)
    slices[f"{name}.weight"] = Slice.even(layer.out_dim, layer.num_out(module), tp)
    if module._parameters.get("bias") is not None:
        slices[f"{name}.bias"] = Slice.even(0, layer.num_out(module), tp)
    return dataclasses.replace(plan, copies=(*plan.copies, name), slices=slices)
