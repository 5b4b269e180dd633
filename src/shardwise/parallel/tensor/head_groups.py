"""Groups of attention that is one call of torch: `F.multi_head_attention_forward`, which `nn.MultiheadAttention` calls.

Its tensors stand in modules whose forwards are never called, so columns and rows are told from the call: which
parameters its arguments are made of, by their gradients. What it proposes is not yet proven.

    in_proj_bias of rank 0's heads ◄── cat(q_bias[: e/2], k_bias[: e/2], v_bias[: e/2])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.describe.tensor import Slice
from shardwise.errors import ModelError
from shardwise.parallel.tensor.groups import Group, Refused, slice_of_sets
from shardwise.parallel.tensor.instance import Call, Doubled, twin
from shardwise.trace.multi_head import MultiHead

__all__ = ["head_groups"]


def head_groups(unit: nn.Module, call: Call, *, tp: int) -> tuple[list[Group], dict[str, str]]:
    """A group for every such attention that `call` runs through, and for other output projections why they are none."""
    copied = twin(unit)
    copied.train(False)
    watch = _Watch(dict(copied.named_parameters()), tp)
    args, kwargs = call.fresh(seed=0)
    with Doubled(), watch, torch.enable_grad():
        copied(*args, **kwargs)
    return watch.groups, watch.reasons


class _Watch(TorchFunctionMode):
    """Reads the groups off the calls."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], tp: int) -> None:
        super().__init__()
        self._parameters = {name: p.requires_grad_(True) for name, p in parameters.items() if p.is_floating_point()}
        self._tp = tp
        self.groups: list[Group] = []
        self.reasons: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            self._look(args, kwargs)
        return func(*args, **kwargs)

    def _look(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        output = "attention"
        try:
            call = MultiHead.of(args, kwargs)
            output = self._name_of(call.out_proj_weight)
            group = self._group(call, output)
        except (Refused, ModelError) as refused:
            self.reasons[output.removesuffix(".weight")] = str(refused)
            return
        if group not in self.groups:
            self.groups.append(group)

    def _name_of(self, tensor: torch.Tensor) -> str:
        name = next((name for name, parameter in self._parameters.items() if parameter is tensor), None)
        if name is None:
            raise Refused("the projection of attention's output is computed from parameters")
        return name

    def _group(self, call: MultiHead, output: str) -> Group:
        if call.num_heads % self._tp:
            raise Refused(f"{call.num_heads} heads cannot be divided by {self._tp}")
        tensors = {output: Slice.even(1, call.embed_dim_to_check, self._tp)}
        for tensor, dim, parts in _inner(call):
            tensors.update(self._made_of(tensor, dim, parts))
        return Group(columns={}, rows=(), heads=(output,), tensors=tensors)

    def _made_of(self, tensor: torch.Tensor, dim: int, parts: int) -> Iterator[tuple[str, Slice]]:
        """The parameters that an argument, divided in each of its `parts` along `dim`, is made of."""
        cut = Slice.even(dim, tensor.shape[dim], self._tp, (tensor.shape[dim] // parts,) * parts)
        masks: dict[str, list[list[torch.Tensor]]] = {}
        for rank, ranges in enumerate(cut.ranges):
            cotangent = torch.zeros_like(tensor)
            for start, stop in ranges:
                cotangent.narrow(dim, start, stop - start).fill_(1.0)
            given = torch.autograd.grad(
                tensor, list(self._parameters.values()), cotangent, retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(self._parameters, given, strict=True):
                if gradient is not None:
                    masks.setdefault(name, [[] for _ in range(self._tp)])[rank].append(gradient != 0)
        for name, of_ranks in masks.items():
            if all(of_ranks) and any(bool(mask.any()) for of_rank in of_ranks for mask in of_rank):
                part = slice_of_sets(tuple(self._parameters[name].shape), of_ranks)
                if part is None:
                    raise Refused(f"no share of {name} makes a share of the heads")
                yield name, part


def _inner(call: MultiHead) -> Iterator[tuple[torch.Tensor, int, int]]:
    """The tensors of a call that are divided by heads: with the dim, and how many of them are packed there."""
    packed = (call.in_proj_weight, 0, 3), (call.in_proj_bias, 0, 3)
    apart = (call.q_proj_weight, 0, 1), (call.k_proj_weight, 0, 1), (call.v_proj_weight, 0, 1)
    for tensor, dim, parts in (*packed, *apart, (call.bias_k, 2, 1), (call.bias_v, 2, 1)):
        if tensor is not None and tensor.requires_grad:
            yield tensor, dim, parts
