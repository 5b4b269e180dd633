"""What the styles of written plans mean: every word of transformers' tensor parallelism, mapped or refused by name.

    "layers.*.mlp.up_proj": "colwise"                      a module
    "layers.*.mlp.experts.down_proj": "rowwise"            a parameter

A word is taken at its meaning and not at what might have been meant: whether that is right the proof says. Knows
modules and words; refuses to know patterns of names and whole plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch.nn as nn

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.errors import LayoutError, ModelError
from shardwise.parallel.tensor.layers import Layer, layer_of
from shardwise.parallel.tensor.slices import spread

__all__ = ["STYLES", "with_style"]

_EXPERT = "experts dealt to ranks are another axis: take this line out of the tp plan and write ep=… in the layout"
_SEQUENCE = "activations divided by tokens are an option of the layout: take this line out"

# Words that mean something which a plan of units does not say -> the repair.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "grouped_gemm": _EXPERT,
        "ep_dispatch_experts": _EXPERT,
        "ep_router": _EXPERT,
        "gather": _EXPERT,
        "moe_identity_expert": "experts that only pass on would be counted once by each rank: leave the plan out, and "
        "one is found and proven",
        "sequence_parallel": _SEQUENCE,
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """A module of a unit, or one of its parameters (`leaf`), and the number of ranks."""

    unit: nn.Module
    name: str
    leaf: str
    tp: int
    about: str  # its full name, for errors

    @property
    def module(self) -> nn.Module:
        return self.unit.get_submodule(self.name)

    @property
    def layer(self) -> Layer | None:
        return layer_of(self.module)

    def tensor(self, leaf: str) -> str:
        return f"{self.name}.{leaf}" if self.name else leaf

    def shape(self, leaf: str) -> tuple[int, ...]:
        return tuple(self.module.get_parameter(leaf).shape)

    def has(self, leaf: str) -> bool:
        return self.module._parameters.get(leaf) is not None


_Style = Callable[[UnitPlan, _Named], UnitPlan]


def with_style(
    plan: UnitPlan, unit: nn.Module, name: str, style: str, *, tp: int, leaf: str = "", within: str = ""
) -> UnitPlan:
    """`plan` of `unit` with what `style` says of its module `name`, or of that module's own parameter `leaf`.

    `within` is the name of the unit. Raises `ModelError` for a style that is not known, is not one of modules (or
    parameters), or means what a plan of units cannot say; `LayoutError` for a layer that does not divide. Both name the
    module, the style and the repair.
    """
    about = ".".join(part for part in (within, name, leaf) if part) or "the model"
    if style in _REFUSED:
        raise ModelError(f"a plan divides inside of units, and {about} is {style!r}: {_REFUSED[style]}")
    known = _OF_PARAMETERS if leaf else STYLES
    if style not in known:
        where = "a parameter's" if leaf else "a module's"
        raise ModelError(
            f"a plan's styles are known: {where} is one of {', '.join(known)}, and {about} is {style!r}; write one of "
            "them, or leave the plan out, and one is found and proven"
        )
    try:
        return known[style](plan, _Named(unit=unit, name=name, leaf=leaf, tp=tp, about=about))
    except LayoutError as error:
        joined = (
            ", or write 'colwise_gather_output', which divides any number" if style == "colwise" and not leaf else ""
        )
        raise LayoutError(f"{about} is {style!r} on {tp} ranks: {error}; leave it out{joined}") from error


def _whole(plan: UnitPlan, named: _Named) -> UnitPlan:
    return plan


def _needs_layer(named: _Named, style: str) -> Layer:
    layer = named.layer
    if layer is None:
        raise ModelError(
            f"only matrix products are {style}; {named.about} is a {type(named.module).__name__}; leave it out"
        )
    return layer


def _columns(plan: UnitPlan, named: _Named, part: Slice, layer: Layer) -> UnitPlan:
    slices = {**plan.slices, named.tensor("weight"): dataclasses.replace(part, dim=layer.out_dim)}
    if named.has("bias"):
        slices[named.tensor("bias")] = dataclasses.replace(part, dim=0)
    return dataclasses.replace(plan, copies=(*plan.copies, named.name), slices=slices)


def _colwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    layer = _needs_layer(named, "colwise")
    return _columns(plan, named, Slice.even(0, layer.num_out(named.module), named.tp), layer)


def _packed_colwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    layer = _needs_layer(named, "packed_colwise")
    size = layer.num_out(named.module)
    return _columns(plan, named, Slice.even(0, size, named.tp, _halves(size)), layer)


def _halves(size: int) -> tuple[int, ...]:
    return (size // 2, size - size // 2)


def _colwise_joined(plan: UnitPlan, named: _Named) -> UnitPlan:
    """Any number of columns: sizes of the ranks differ by one at most (an odd vocabulary)."""
    layer = _needs_layer(named, "colwise_gather_output")
    part = spread(0, layer.num_out(named.module), named.tp)
    joined = {named.name: dataclasses.replace(part, dim=layer.features)}
    plan = _columns(plan, named, part, layer)
    if named.name:
        return dataclasses.replace(plan, alone={**plan.alone, **joined})
    return dataclasses.replace(plan, joins={**plan.joins, **joined})  # a head by itself


def _rowwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    if isinstance(named.module, nn.Embedding):
        return _embedding_rowwise(plan, named)
    layer = _needs_layer(named, "rowwise")
    return _rows(plan, named, Slice.even(layer.in_dim, layer.num_in(named.module), named.tp))


def _packed_rowwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    layer = _needs_layer(named, "packed_rowwise")
    size = layer.num_in(named.module)
    return _rows(plan, named, Slice.even(layer.in_dim, size, named.tp, _halves(size)))


def _rows(plan: UnitPlan, named: _Named, part: Slice) -> UnitPlan:
    slices = {**plan.slices, named.tensor("weight"): part}
    return dataclasses.replace(plan, reduces=(*plan.reduces, named.name), slices=slices)


def _rowwise_of_whole(plan: UnitPlan, named: _Named) -> UnitPlan:
    """The input is whole and cut in front of the layer."""
    layer = _needs_layer(named, "rowwise_split_input")
    part = Slice.even(layer.in_dim, layer.num_in(named.module), named.tp)
    cuts = {**plan.cuts, named.name: dataclasses.replace(part, dim=layer.features)}
    return dataclasses.replace(_rows(plan, named, part), cuts=cuts)


def _embedding_rowwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    module = named.module
    if not isinstance(module, nn.Embedding):
        raise ModelError(f"only tables are embedding_rowwise; {named.about} is a {type(module).__name__}; leave it out")
    part = spread(0, module.weight.shape[0], named.tp)
    attributes = dict(plan.attributes)
    if module.padding_idx is not None:
        starts = [ranges[0] for ranges in part.ranges]
        rows = tuple(module.padding_idx - a if a <= module.padding_idx < b else None for a, b in starts)
        attributes[named.name, "padding_idx"] = rows
    return dataclasses.replace(
        plan,
        lookups=(*plan.lookups, named.name),
        slices={**plan.slices, named.tensor("weight"): part},
        attributes=attributes,
    )


def _embedding_colwise(plan: UnitPlan, named: _Named) -> UnitPlan:
    module = named.module
    if not isinstance(module, nn.Embedding):
        raise ModelError(f"only tables are embedding_colwise; {named.about} is a {type(module).__name__}; leave it out")
    part = spread(1, module.weight.shape[1], named.tp)
    alone = {**plan.alone, named.name: dataclasses.replace(part, dim=-1)}
    return dataclasses.replace(plan, slices={**plan.slices, named.tensor("weight"): part}, alone=alone)


def _summed_gradients(plan: UnitPlan, named: _Named) -> UnitPlan:
    own = {named.tensor(leaf) for leaf, _ in named.module.named_parameters()}
    return dataclasses.replace(plan, partial=plan.partial | own)


def _experts(plan: UnitPlan, named: _Named) -> UnitPlan:
    """A module that holds columns and rows itself: inputs copied, the output summed."""
    return dataclasses.replace(plan, copies=(*plan.copies, named.name), reduces=(*plan.reduces, named.name))


def _all_reduce(plan: UnitPlan, named: _Named) -> UnitPlan:
    return dataclasses.replace(plan, reduces=(*plan.reduces, named.name))


def _forked_end(plan: UnitPlan, named: _Named) -> UnitPlan:
    """Of the output of a compressed key projection the rotary part goes to every rank's heads as it is."""
    sizes = [v for module in named.unit.modules() if isinstance(v := vars(module).get("qk_rope_head_dim"), int)]
    if not sizes:
        raise ModelError(
            f"mla_kv_a_proj is for attention with an attribute qk_rope_head_dim, and that of {named.about} has none; "
            "leave the plan out, and one is found and proven"
        )
    return dataclasses.replace(plan, ends={**plan.ends, named.name: sizes[0]})


STYLES: Mapping[str, _Style] = MappingProxyType(
    {
        "colwise": _colwise,
        "rowwise": _rowwise,
        "colwise_gather_output": _colwise_joined,
        "colwise_rep": _colwise_joined,
        "rowwise_split_input": _rowwise_of_whole,
        "rowwise_rep": _rowwise_of_whole,
        "packed_colwise": _packed_colwise,
        "packed_rowwise": _packed_rowwise,
        "embedding_rowwise": _embedding_rowwise,
        "embedding_colwise": _embedding_colwise,
        "replicate": _whole,
        "replicated": _whole,
        "replicated_with_grad_allreduce": _summed_gradients,
        "all_reduce": _all_reduce,
        "moe_tp_experts": _experts,
        "mla_kv_a_proj": _forked_end,
        "local_params": _whole,
    }
)


# -- parameters by themselves -------------------------------------------------------------------


def _parameter_columns(plan: UnitPlan, named: _Named) -> UnitPlan:
    return _parameter(plan, named, packed=False, rows=False)


def _parameter_packed_columns(plan: UnitPlan, named: _Named) -> UnitPlan:
    return _parameter(plan, named, packed=True, rows=False)


def _parameter_rows(plan: UnitPlan, named: _Named) -> UnitPlan:
    return plan if named.leaf == "bias" else _parameter(plan, named, packed=False, rows=True)


def _parameter_packed_rows(plan: UnitPlan, named: _Named) -> UnitPlan:
    return plan if len(named.shape(named.leaf)) == 1 else _parameter(plan, named, packed=True, rows=True)


def _parameter(plan: UnitPlan, named: _Named, *, packed: bool, rows: bool) -> UnitPlan:
    """Rows are cut along the last dim, columns along the one before (experts stand in front of both)."""
    shape = named.shape(named.leaf)
    dim = len(shape) - 1 if rows else max(len(shape) - 2, 0)
    parts = _halves(shape[dim]) if packed and len(shape) > 1 else ()
    part = Slice.even(dim, shape[dim], named.tp, parts)
    return dataclasses.replace(plan, slices={**plan.slices, named.tensor(named.leaf): part})


def _parameter_summed(plan: UnitPlan, named: _Named) -> UnitPlan:
    return dataclasses.replace(plan, partial=plan.partial | {named.tensor(named.leaf)})


_OF_PARAMETERS: Mapping[str, _Style] = MappingProxyType(
    {
        "colwise": _parameter_columns,
        "rowwise": _parameter_rows,
        "packed_colwise": _parameter_packed_columns,
        "packed_rowwise": _parameter_packed_rows,
        "replicate": _whole,
        "replicated": _whole,
        "replicated_with_grad_allreduce": _parameter_summed,
    }
)
