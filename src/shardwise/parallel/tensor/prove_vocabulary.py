"""Tables and heads of one unit in its plan, and the proof of that plan.

A lone table or head is proven with all of its vocabulary and few of its columns, so that one of 250 000 words fits in
memory. Knows one unit; refuses to know what it is tied to.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Sequence

import torch
import torch.nn as nn
from torch.utils._pytree import tree_map

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.parallel.tensor.calls import Kind
from shardwise.parallel.tensor.instance import Call, random_copy
from shardwise.parallel.tensor.lookup import range_of
from shardwise.parallel.tensor.prove import Difference, prove
from shardwise.parallel.tensor.slices import spread

__all__ = [
    "NARROWLY",
    "divide_layers",
    "is_head",
    "is_large_layer",
    "is_table",
    "local_names",
    "narrow_layer",
    "prove_layers",
]

_WIDTH = 8  # of a lone table or head in its proof: what is proven of so many columns holds for all
NARROWLY = f"all rows, {_WIDTH} columns at most"
_MOST_WHOLE = 2**25  # elements of a lone table or head that is proven with all of its columns
_LARGEST_BYTES = 4 * 2**30  # that the proof of a unit with a table or a head inside may take


def is_table(module: nn.Module) -> bool:
    """Whether it is a plain table with more rows than columns."""
    if not isinstance(module, nn.Embedding) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return False
    plain = not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)
    return plain and module.weight.shape[0] > module.weight.shape[1]


def is_head(module: nn.Module) -> bool:
    """Whether it is a linear layer with more outputs than inputs."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and weight.shape[0] > weight.shape[1]


def local_names(unit: nn.Module, layer: str) -> list[str]:
    """All names, in its unit, of the layer's weight, and of a head's bias."""
    module = unit.get_submodule(layer)
    own = {id(p) for p in module._parameters.values() if p is not None}
    return [name for name, p in unit.named_parameters(remove_duplicate=False) if id(p) in own]


def prove_layers(kind: Kind, names: Collection[str], base: UnitPlan, tp: int) -> UnitPlan:
    """`base` with these layers divided, proven. Raises `Difference`, or whatever the divided unit raises."""
    plan = dataclasses.replace(divide_layers(kind.module, names, base, tp), proof=None)
    lone = "" in names
    unit = random_copy(_narrow(kind.module) if lone else kind.module)
    calls = [call for each in kind.calls for call in (_lone_calls(kind.module, each, plan) if lone else [each])]
    if not calls and lone:
        calls = _lone_calls(kind.module, None, plan)
    if not calls:
        raise Difference("it is not called with this batch")
    _refuse_large(kind, calls, tp, lone)
    for training in (True, False):
        for seed, call in enumerate(calls):
            plan, _ = prove(unit, call, plan, tp=tp, training=training, seed=seed)
    if lone and plan.proof is not None:
        proof = dataclasses.replace(plan.proof, on=NARROWLY)
        plan = dataclasses.replace(plan, proof=proof)
    return plan


def divide_layers(unit: nn.Module, names: Collection[str], base: UnitPlan, tp: int) -> UnitPlan:
    slices, joins, attributes = dict(base.slices), dict(base.joins), dict(base.attributes)
    tables, heads = [], []
    for name in sorted(names):
        module = unit.get_submodule(name)
        part = spread(0, module.get_parameter("weight").shape[0], tp)
        slices.update(dict.fromkeys(local_names(unit, name), part))
        if isinstance(module, nn.Embedding):
            tables.append(name)
            if module.padding_idx is not None:
                attributes[name, "padding_idx"] = tuple(_row(module.padding_idx, part, rank) for rank in range(tp))
        else:
            heads.append(name)
            joins[name] = dataclasses.replace(part, dim=-1)
    return dataclasses.replace(
        base,
        copies=(*base.copies, *heads),
        joins=joins,
        lookups=(*base.lookups, *tables),
        slices=slices,
        attributes=attributes,
    )


def _row(index: int, part: Slice, rank: int) -> int | None:
    """Where a row of the whole stands in the rank's part; None where another rank has it."""
    start, stop = range_of(part, rank)
    return index - start if start <= index < stop else None


def is_large_layer(kind: Kind) -> bool:
    """A table or a head by itself that is better not proven with all of its columns."""
    alone = is_table(kind.module) or is_head(kind.module)
    return alone and kind.module.get_parameter("weight").numel() > _MOST_WHOLE


def narrow_layer(kind: Kind) -> Kind:
    """A lone table or head, and its calls, with few of its columns; tokens and vocabulary are all there."""
    columns = kind.module.get_parameter("weight").shape[1]

    def narrow(leaf: object) -> object:
        wide = isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.shape[-1:] == (columns,)
        return leaf[..., :_WIDTH].clone() if isinstance(leaf, torch.Tensor) and wide else leaf

    calls = [
        dataclasses.replace(call, args=tree_map(narrow, call.args), kwargs=tree_map(narrow, dict(call.kwargs)))
        for call in kind.calls
    ]
    return dataclasses.replace(kind, module=_narrow(kind.module), calls=calls)


def _narrow(layer: nn.Module) -> nn.Module:
    """A lone table or head with all of its vocabulary and few of its columns, without values."""
    narrow = copy.copy(layer)
    narrow._parameters = dict(layer._parameters)
    weight = layer.get_parameter("weight")
    width = min(_WIDTH, weight.shape[1])
    narrow._parameters["weight"] = nn.Parameter(
        torch.empty(weight.shape[0], width, dtype=weight.dtype, device="meta"), requires_grad=weight.requires_grad
    )
    narrow.__dict__["embedding_dim" if isinstance(layer, nn.Embedding) else "in_features"] = width
    return narrow


def _lone_calls(layer: nn.Module, call: Call | None, plan: UnitPlan) -> list[Call]:
    """Small calls of a narrow layer, of the ranks of tensors that it was called with; for tables also the edges of all
    parts, the padding and random ids."""
    weight = layer.get_parameter("weight")
    if isinstance(layer, nn.Embedding):
        edges = {i for ranges in plan.slices["weight"].ranges for start, stop in ranges for i in (start, stop - 1)}
        edges |= {layer.padding_idx} if layer.padding_idx is not None else set()
        some = torch.randint(0, weight.shape[0], (32,), generator=torch.Generator().manual_seed(0))
        ids = torch.cat([torch.tensor(sorted(edges)), some]).unsqueeze(0)  # (1, ids)
        every = Call(args=(ids,), kwargs={}, requires_grad=frozenset())
        return [every] if call is None else [every, call]
    if call is None:
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0))
        call = Call(args=(x,), kwargs={}, requires_grad=frozenset({0}))

    def small(leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor) or leaf.shape[-1:] != weight.shape[1:]:
            return leaf
        for dim in range(leaf.dim() - 1):
            leaf = leaf.narrow(dim, 0, min(leaf.shape[dim], 3))
        return leaf[..., :_WIDTH].clone()

    return [dataclasses.replace(call, args=tree_map(small, call.args), kwargs=tree_map(small, dict(call.kwargs)))]


def _refuse_large(kind: Kind, calls: Sequence[Call], tp: int, lone: bool) -> None:
    if lone:
        return
    parameters = sum(parameter.numel() for parameter in kind.module.parameters())
    given = [tensor for call in calls for tensor in call.tensors if tensor.dim() and tensor.is_floating_point()]
    rows = max((tensor.numel() // max(tensor.shape[-1], 1) for tensor in given), default=0)
    widest = max(m.get_parameter("weight").shape[0] for m in kind.module.modules() if is_head(m) or is_table(m))
    num_bytes = 8 * (tp + 2) * (parameters + 3 * rows * widest)
    if num_bytes > _LARGEST_BYTES:
        size = f"{num_bytes / 2**30:.0f} GiB"
        raise Difference(f"its proof would take {size}; name its layers as units, or plan with a smaller batch")
