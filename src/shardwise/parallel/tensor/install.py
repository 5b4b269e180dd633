"""One unit divided among the ranks of a group: local tensors in place of whole ones, collectives around its layers.

The same code runs in training and in the proof. Knows a plan and one module; refuses to know how the plan was found.

    q, k, v read one tensor x:       x ──copy once──► q_t, k_t, v_t ──► heads of rank t ──► o_t ──all-reduce──► y (+ b)

To be installed behind what wraps the forwards of single layers (`WeightSums`) and before the switch of the units.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.describe.tensor import Slice, UnitPlan
from shardwise.errors import ModelError
from shardwise.parallel.forwards import Forward
from shardwise.parallel.switched import Switched
from shardwise.parallel.tensor.collectives import TensorGroup, copy_to, gather_from, scatter_to
from shardwise.parallel.tensor.divided_logits import DividedLogits, Reads
from shardwise.parallel.tensor.draws import DividedDraws
from shardwise.parallel.tensor.heads import DividedHeads, fuses
from shardwise.parallel.tensor.layers import bias_shape, layer_of, product, sized_fields
from shardwise.parallel.tensor.lookup import local_ids, own_rows
from shardwise.parallel.tensor.products import DividedProducts
from shardwise.parallel.tensor.reshapes import Reshaping
from shardwise.parallel.tensor.sequence_shard import Region, SequenceShard, whole_tokens
from shardwise.parallel.tensor.sequence_unit import UnitTokens
from shardwise.parallel.tensor.slices import cut, local_shape
from shardwise.parallel.tensor.ties import Tied, Ties
from shardwise.trace.absent import Absent, absent_parameter
from shardwise.trace.placing import as_before, named_tensors, replace

__all__ = ["Sharding", "shard_unit"]


def shard_unit(
    module: nn.Module,
    plan: UnitPlan,
    group: TensorGroup,
    ties: Ties | None = None,
    *,
    keep_logits: Reads | None = None,
    region: Region | None = None,
) -> Sharding:
    """Make `module` this rank's part of the unit, in place.

    Parameters and buffers in `plan.slices` are replaced by their part, with storage of its own; absent, fake and meta
    ones by one of the local shape without a value, for `trace.placing.place` to fill. Names stay. `ties` are tensors
    of this unit that other units hold too: they stay one. With `keep_logits` outputs in parts are `DividedLogits`,
    joined when somebody reads them, while that is allowed. `region` is shared by the units of a model that may deal
    out tokens: each needs it, also one whose plan does not. Raises `ModelError` for a plan that names what the module
    does not have.
    """
    return Sharding(module, plan, group, ties or {}, keep_logits, region)


class Sharding(Switched):
    """What `shard_unit` has changed. `off()` shows the unit whole, without values; `close()` takes the changes out."""

    def __init__(
        self,
        module: nn.Module,
        plan: UnitPlan,
        group: TensorGroup,
        ties: Ties,
        keep_logits: Reads | None,
        region: Region | None = None,
    ) -> None:
        super().__init__(module)
        self.keep_logits = keep_logits
        self.region = region or Region(group)
        self._tokens = UnitTokens(plan.sequence, self.region)
        self._may_deal = region is not None or plan.sequence is not None
        self._regathers = plan.sequence is not None and plan.sequence.regather
        self.module = module
        self.plan = plan
        self.group = group
        self._inside = False
        self._copied: tuple[torch.Tensor, int, torch.Tensor] | None = None  # the last whole input, and its copy
        self._modules = dict(module.named_modules(remove_duplicate=False))
        self._cut_tensors(ties)
        self._set_attributes()
        self._wrap_forwards()

    # -- tensors and attributes -----------------------------------------------------------------

    def _cut_tensors(self, ties: Ties) -> None:
        here = named_tensors(self.module)
        parts: dict[int, torch.Tensor] = {}
        cuts: dict[int, Tied] = {}
        for name, part in self.plan.slices.items():
            if name not in here:
                raise ModelError(f"a plan names tensors of its unit: {type(self.module).__name__} has no {name!r}")
            whole = here[name]
            if part.num_ranks != self.group.size or whole.shape[part.dim] % part.size:
                raise ModelError(
                    f"a plan fits its unit: {name} has {whole.shape[part.dim]} elements along dim {part.dim} on "
                    f"{self.group.size} ranks, and the plan divides {part.size} among {part.num_ranks}"
                )
            tied = ties.get(id(whole)) or cuts.setdefault(id(whole), Tied(whole))
            if tied.part is None or tied.shown is None:
                tied.part = as_before(whole, _part(whole, part, self.group.rank, name))
                tied.shown = _without_values(name, whole)
            parts[id(whole)], self._wholes[name] = tied.part, tied.shown
            self._set_fields(name, part)
        replace(self.module, parts)

    def _set_fields(self, name: str, part: Slice) -> None:
        owner, _, leaf = name.rpartition(".")
        module = self._modules[owner]
        field = sized_fields(module).get((leaf, part.dim))
        if field is not None:
            self._attributes.append((module, field, vars(module)[field], part.local_size(self.group.rank)))
            module.__dict__[field] = part.local_size(self.group.rank)

    def _set_attributes(self) -> None:
        copies: dict[tuple[str, str], Any] = {}
        for (name, attribute), values in self.plan.attributes.items():
            module, value = self._module(name), values[self.group.rank]
            own, _, inner = attribute.partition(".")
            if own not in vars(module):
                raise ModelError(f"a plan names attributes of modules: {name or 'the unit'} has no {attribute!r}")
            if not inner:
                self._attributes.append((module, own, vars(module)[own], value))
            elif (name, own) not in copies:
                copies[name, own] = copy.copy(vars(module)[own])
                self._attributes.append((module, own, vars(module)[own], copies[name, own]))
            if inner:
                setattr(copies[name, own], inner, value)
        for module, own, _, value in self._attributes:
            module.__dict__[own] = value

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise ModelError(f"a plan names modules of its unit: {type(self.module).__name__} has no {name!r}")
        module: nn.Module = self._modules[name]
        return module

    # -- forwards -------------------------------------------------------------------------------

    def _wrap_forwards(self) -> None:
        plan = self.plan
        wrapped = (*plan.copies, *plan.reduces, *plan.gathers, *plan.forks, *plan.joins, *plan.alone, *plan.lookups)
        wrapped = (*wrapped, *plan.cuts, *plan.ends)
        for name in dict.fromkeys(wrapped):
            module = self._module(name)
            body = module.forward
            if name in plan.reduces:
                body = self._reducing(module, body)
            if name in plan.cuts:
                body = self._cutting(body, plan.cuts[name])
            if name in plan.ends:
                body = self._forking_end(body, plan.ends[name])
            if name in plan.copies:
                body = self._copying(body)
            once = [leaf for owner, _, leaf in (of.rpartition(".") for of in sorted(plan.once)) if owner == name]
            if once and self.group.rank:
                body = _zeroed(module, once, body)
            if name in plan.gathers:
                body = self._gathering(body, plan.gathers[name])
            if name in plan.alone:
                body = self._joining(body, plan.alone[name], keep=None)
            if name in plan.forks:
                body = self._forking(body)
            if name in plan.joins:
                body = self._joining(body, plan.joins[name], keep=self.keep_logits)
            if name in plan.lookups:
                body = self._looking_up(body, plan.slices[f"{name}.weight" if name else "weight"])
            self._forwards.wrap(module, body)
        for name, dims in plan.reshapes.items():
            self._forwards.wrap(self._module(name), _reshaping(self._module(name).forward, dims))
        self._fused = bool(plan.heads) or fuses(self.module)
        inside = plan.inputs or plan.outputs or plan.draws or plan.products
        if len(plan.copies) > 1 or inside or self._fused or self._may_deal:
            self._forwards.wrap(self.module, self._entered(self.module.forward))

    def _copying(self, body: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            args = tuple(self._copy(arg) for arg in args)
            kwargs = {name: self._copy(arg) for name, arg in kwargs.items()}
            if not self._regathers:
                return body(*args, **kwargs)
            with self._tokens.saving((*args, *kwargs.values())):
                return body(*args, **kwargs)

        return forward

    def _copy(self, x: Any) -> Any:
        """One copy for all layers that read the same tensor, so that their input gradients are summed once."""
        shard = x if isinstance(x, SequenceShard) and x.region is self.region else None
        if shard is not None:
            x = shard.local
        if not isinstance(x, torch.Tensor) or not (x.requires_grad or shard is not None):
            return x
        known = self._copied
        if known is not None and known[0] is x and known[1] == x._version:
            return known[2]
        made = copy_to(x, self.group) if shard is None else self._tokens.copied(shard)
        if self._inside:
            self._copied = (x, x._version, made)
        return made

    def _reducing(self, module: nn.Module, body: Forward) -> Forward:
        layer = layer_of(module)
        if layer is None:
            return lambda *args, **kwargs: self._tokens.reduced(body(*args, **kwargs))
        partial = product(module, body, layer)

        def forward(*args: Any) -> torch.Tensor:
            total = self._tokens.reduced(partial(*args), features=layer.features)
            bias = module._parameters.get("bias")
            return total if bias is None else total + bias.view(bias_shape(layer))

        return forward

    def _gathering(self, body: Forward, part: Slice) -> Forward:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            def whole(value: Any) -> Any:  # a gate is divided as what it is beside
                divided = isinstance(value, torch.Tensor) and value.shape == x.shape
                return gather_from(value, part, self.group) if divided else value

            out = body(whole(x), *map(whole, args), **{name: whole(value) for name, value in kwargs.items()})
            return scatter_to(out, part, self.group)

        return forward

    def _joining(self, body: Forward, part: Slice, *, keep: Reads | None) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            local = body(*args, **kwargs)
            if keep is None:
                return gather_from(local, part, self.group)
            given = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, torch.Tensor)]
            if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in given)):
                keep.last = (self.group, local.device)  # otherwise the gradient of the input is summed
            return DividedLogits(local, part, self.group, keep)

        return forward

    def _looking_up(self, body: Forward, part: Slice) -> Forward:
        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            own, elsewhere = local_ids(ids, part, self.group.rank)
            return self._tokens.reduced(own_rows(body(own, *args, **kwargs), elsewhere))

        return forward

    def _forking(self, body: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forked(body(*args, **kwargs))

        return forward

    def _forked(self, out: torch.Tensor) -> torch.Tensor:
        if isinstance(out, SequenceShard) and out.region is self.region:
            return self._tokens.copied(out)
        return copy_to(out, self.group)

    def _cutting(self, body: Forward, part: Slice) -> Forward:
        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            own = isinstance(x, SequenceShard) and x.region is self.region
            return body(scatter_to(whole_tokens(x) if own else x, part, self.group), *args, **kwargs)

        return forward

    def _forking_end(self, body: Forward, num: int) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            out = body(*args, **kwargs)  # (…, features)
            before, end = out.split([out.shape[-1] - num, num], -1)
            return torch.cat([before, self._forked(end)], -1)

        return forward

    def _entered(self, body: Forward) -> Forward:
        """The unit's own forward: arguments cut, returned tensors joined, random draws divided."""
        places = list(inspect.signature(body).parameters)
        plan, group = self.plan, self.group

        def forward(*args: Any, **kwargs: Any) -> Any:
            if plan.inputs:
                args, kwargs = self._cut_arguments(places, args, kwargs)
            self._inside = True
            try:
                with contextlib.ExitStack() as modes:
                    if plan.draws:
                        modes.enter_context(DividedDraws(plan.draws, group.rank))
                    if plan.products:
                        modes.enter_context(DividedProducts(self._roles(), group, self._copy))
                    if self._fused:
                        modes.enter_context(DividedHeads(group, self._copy))
                    out = body(*args, **kwargs)
            finally:
                self._inside = False
                self._copied = None
            return self._join_outputs(out) if plan.outputs else out

        return self._dealing(places, forward) if self._may_deal else forward

    def _roles(self) -> dict[int, str]:
        """What is to be done with products by weights, by their ids of now."""
        roles: dict[int, str] = {}
        for name, role in self.plan.products.items():
            owner, _, leaf = name.rpartition(".")
            roles[id(self._modules[owner]._parameters[leaf])] = role
        return roles

    def _dealing(self, places: list[str], body: Forward) -> Forward:
        tokens = self._tokens

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs, wholes = tokens.given(places, args, kwargs)
            with tokens.entered():
                out = body(*args, **kwargs)
            return tokens.left(out, wholes)

        return forward

    def _cut_arguments(
        self, places: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: list[Any] = list(args)
        for name, part in self.plan.inputs.items():
            at = places.index(name)
            value = kwargs.get(name) if at >= len(given) else given[at]
            if not isinstance(value, torch.Tensor):
                continue
            value = scatter_to(value, part, self.group)
            if at < len(given):
                given[at] = value
            else:
                kwargs = {**kwargs, name: value}
        return tuple(given), kwargs

    def _join_outputs(self, out: Any) -> Any:
        leaves, spec = tree_flatten(out)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for number, part in self.plan.outputs.items():
            leaves[tensors[number]] = gather_from(leaves[tensors[number]], part, self.group)
        return tree_unflatten(leaves, spec)


def _reshaping(body: Forward, dims: tuple[int, ...]) -> Forward:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with Reshaping(dims):
            return body(*args, **kwargs)

    return forward


def _zeroed(module: nn.Module, names: list[str], body: Forward) -> Forward:
    """`body` with these parameters as zeros, whose gradients are zeros: another rank computes with them."""
    table = module._parameters

    def forward(*args: Any, **kwargs: Any) -> Any:
        kept = {name: parameter for name in names if (parameter := table[name]) is not None}
        table.update({name: parameter * 0.0 for name, parameter in kept.items()})  # type: ignore[misc]
        try:
            return body(*args, **kwargs)
        finally:
            table.update(kept)

    return forward


def _part(whole: torch.Tensor, part: Slice, rank: int, name: str) -> torch.Tensor:
    shape = local_shape(whole.shape, part, rank)
    if isinstance(whole, Absent):
        return absent_parameter(
            name=name, shape=shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
        )
    if isinstance(whole, FakeTensor):
        with whole.fake_mode:
            return torch.empty(shape, dtype=whole.dtype, device=whole.device)
    if whole.device.type == "meta":
        return torch.empty(shape, dtype=whole.dtype, device="meta")
    return cut(whole.detach(), part, rank)


def _without_values(name: str, whole: torch.Tensor) -> torch.Tensor:
    """What a trace sees: parameters without values, buffers as they are (they are computed with)."""
    if not isinstance(whole, nn.Parameter):
        return whole
    return absent_parameter(
        name=name, shape=whole.shape, dtype=whole.dtype, device=whole.device, requires_grad=whole.requires_grad
    )
