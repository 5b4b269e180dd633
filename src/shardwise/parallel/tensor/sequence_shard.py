"""Activations of which every rank has its tokens, to the model's own code a whole tensor.

    row ──reduce-scatter──► SequenceShard ──+ bias, dropout, + residual, norm──► SequenceShard ──all-gather──► columns
                                 └──view over tokens, x[:, 0], sort, whatever else──► joined once, then as always

What is in the tables of `sequence_ops` works on each token by itself and runs on the rank's tokens alone; anything else
joins them, so the answer is always that of the whole tensor. Every rank runs the same code, and so joins at the same
places. After Korthikanti et al. 2022 (arXiv:2205.05198, section 4.2). Knows tensors; no models, no plans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from shardwise.errors import DataflowError
from shardwise.parallel.tensor.collectives import Carrier, TensorGroup, copy_to
from shardwise.parallel.tensor.divided_logits import DividedLogits
from shardwise.parallel.tensor.sequence import Tokens, gather, scatter
from shardwise.parallel.tensor.sequence_ops import (
    ASKS,
    ELEMENTWISE,
    IN_PLACE,
    MAKERS,
    OWN_MEMORY,
    RULES,
    SAME_MEMORY,
    VIEWS,
    Operands,
    Rule,
    Whole,
)
from shardwise.trace.randomness import Attends

__all__ = ["Region", "SequenceShard", "shard_of", "whole_tokens"]


@dataclasses.dataclass(slots=True)
class Region:
    """What all shards of one rank share: its group, and where the model's forward is.

    Inside a unit the gradients of parameters that work on tokens are partial, and whoever holds the plan sums them
    once a step; outside they are summed where they are read.
    """

    group: TensorGroup
    inside: int = 0  # units that are open
    joined_at: set[str] = dataclasses.field(default_factory=set)  # functions that asked for the whole
    left: set[int] = dataclasses.field(default_factory=set)  # places of shards among what units have returned
    runs: dict[int, int] = dataclasses.field(default_factory=dict)  # samples × tokens, as seen -> tokens

    @property
    def rules(self) -> Mapping[Any, Rule]:
        """What works on tokens by themselves here, besides what works on every element."""
        return RULES

    def mixes(self, func: Any) -> bool:
        """Whether the rule of a function is given shards that are dealt out in different ways."""
        return False

    def attend(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Attention with dropout, of queries that are dealt out; NotImplemented where it is written out instead."""
        return NotImplemented

    def scatter(self, whole: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """This rank's tokens of what is the same on every rank."""
        return scatter(whole, tokens, self.group)

    def meeting(self, whole: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """This rank's tokens of an operand, which is only read."""
        return self.scatter(whole, tokens)

    def gather(self, local: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """All tokens, for work that every rank repeats."""
        return gather(local, tokens, self.group)

    def weight(self, leaf: torch.Tensor, *, matrix: bool) -> torch.Tensor:
        """A tensor with a gradient that meets every token."""
        if self.inside and (matrix or leaf.dim() <= 1 or isinstance(leaf, torch.nn.Parameter)):
            return leaf  # its gradient is partial, and summed once a step
        return copy_to(leaf, self.group)

    def tokens_of(self, shape: Sequence[int]) -> Tokens | None:
        """How a tensor (..., tokens, features) is dealt out; None where it has no such dims."""
        if len(shape) < 2:
            return None
        size = self.runs.get(shape[-2], shape[-2]) if len(shape) == 2 else shape[-2]
        return Tokens(-2, size, shape[-2] // size) if size else None


@dataclasses.dataclass(slots=True)
class _Memory:
    """What shards that see the same elements share. The same on every rank, as who joins again follows from it."""

    writes: int = 0
    several: bool = False  # shards see it
    views: list[tuple[torch.Tensor, int]] = dataclasses.field(default_factory=list)
    # joined tensors of which somebody holds a view, which would not see a write, and their versions


class SequenceShard(Carrier, Attends):
    """A tensor without storage, of which `local` (this rank's tokens) is here, with its graph."""

    tokens: Tokens
    region: Region
    memory: _Memory
    joined: tuple[int, torch.Tensor] | None  # writes before somebody has read it whole, and the whole

    @staticmethod
    def __new__(cls, local: torch.Tensor, tokens: Tokens, region: Region) -> SequenceShard:
        shape = list(local.shape)
        shape[tokens.dim] = tokens.extent
        made: SequenceShard = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=local.dtype, device=local.device, requires_grad=local.requires_grad
        )
        made.local, made.tokens, made.region = local, tokens, region
        made.memory, made.joined = _Memory(), None
        if not region.inside:
            made.watch()
        return made

    @property
    def among(self) -> TensorGroup:
        return self.region.group

    @property
    def parted(self) -> int:
        return self.tokens.dim

    def attend(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.region.attend(args, kwargs)

    def carry(self, local: torch.Tensor) -> SequenceShard:
        """The same tokens of another tensor."""
        return SequenceShard(local, self.tokens, self.region)

    def watch(self) -> None:
        """Refuse a gradient of the shard itself: what computes with it has its graph at `local`.

        For those that model code between units sees. (Inside of units the proof has compared gradients.)
        """
        with torch._C.DisableTorchFunctionSubclass():
            if self.requires_grad:
                self.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            group = self.region.group
            return f"SequenceShard(shape={tuple(self.shape)}, shard {group.rank} of {group.size})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            if func in ASKS:
                return func(*args, **named)
            shards = _shards_in(args, named)
            nested = any(isinstance(shard.local, DividedLogits) for shard in shards)
            known = NotImplemented if nested else _by_tokens(func, args, named, shards)
        if nested:  # what is here is divided among shards besides, and has rules of its own
            known = _by_tokens(func, args, named, shards)
        if known is not NotImplemented:
            return known
        return _joined(func, args, named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise DataflowError(f"{func}: {_PASSED_BY}")


def shard_of(whole: torch.Tensor, region: Region) -> torch.Tensor:
    """This rank's tokens of a tensor (..., tokens, features) that every rank has; others come back as they are."""
    tokens = region.tokens_of(whole.shape)
    return whole if tokens is None else SequenceShard(region.scatter(whole, tokens), tokens, region)


def whole_tokens(leaf: Any) -> Any:
    """The whole tensor of a shard (collective, once), anything else as it is."""
    if not isinstance(leaf, SequenceShard):
        return leaf
    with torch._C.DisableTorchFunctionSubclass():
        _refuse_unknown(leaf)
    if leaf.joined is not None and leaf.joined[0] == leaf.memory.writes:
        return leaf.joined[1]
    whole = leaf.region.gather(leaf.local, leaf.tokens)
    if torch.is_grad_enabled() or not leaf.local.requires_grad:  # else it has no graph, and the next reader wants one
        leaf.joined = leaf.memory.writes, whole
    return whole


# -- tokens by themselves -----------------------------------------------------------------------


def _by_tokens(func: Any, args: Sequence[Any], kwargs: dict[str, Any], shards: Sequence[SequenceShard]) -> Any:
    """The answer of a function that needs no other rank's tokens; NotImplemented where it does. `shards` are those
    among the arguments."""
    first = shards[0]
    for shard in shards:
        _refuse_unknown(shard)
    if func in MAKERS:
        like = first.local.new_empty(()).expand(first.shape)
        return func(*[like if arg is first else arg for arg in args], **kwargs) if len(shards) == 1 else NotImplemented
    if func in OWN_MEMORY:
        return func(first.local, *args[1:], **kwargs)
    rules = first.region.rules
    differ = any(shard.tokens is not first.tokens and shard.tokens != first.tokens for shard in shards)
    if differ and not first.region.mixes(func):
        return NotImplemented
    operands = _Operands(first)
    if func in ELEMENTWISE:
        local = _elementwise(func, args, kwargs, operands)
        if local is NotImplemented:
            return NotImplemented
        if func in IN_PLACE:
            return _written(first, local)
        same = func in SAME_MEMORY and (local.dtype, local.device) == (first.local.dtype, first.local.device)
        return _again(first, local, first.tokens, may_share=same)
    if func not in rules:
        return NotImplemented
    answer = rules[func](func, args, kwargs, operands)
    if answer is NotImplemented or not operands.fit:
        return NotImplemented
    if isinstance(answer, Whole):
        return answer.value
    if isinstance(answer, list):
        return tuple(_again(first, local, tokens, may_share=func in VIEWS) for local, tokens in answer)
    made, tokens = answer
    return _again(first, made, tokens, may_share=func in VIEWS)


def _shards_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[SequenceShard]:
    """Without pytree, which would cost more than the function."""
    found: list[SequenceShard] = []
    _collect(args, found)
    if kwargs:
        _collect(kwargs.values(), found)
    return found


def _collect(leaves: Iterable[Any], found: list[SequenceShard]) -> None:
    for leaf in leaves:
        if isinstance(leaf, SequenceShard):
            found.append(leaf)
        elif isinstance(leaf, (tuple, list)):
            _collect(leaf, found)
        elif isinstance(leaf, dict):
            _collect(leaf.values(), found)


class _Operands(Operands):
    """What a function is given, as this rank's tokens are to meet it."""

    __slots__ = ("first", "fit", "region", "shape", "tokens")

    def __init__(self, first: SequenceShard) -> None:
        self.first = first
        self.region = first.region
        self.tokens = first.tokens
        self.shape = tuple(first.shape)
        self.fit = True

    def is_shard(self, leaf: Any) -> bool:
        return isinstance(leaf, SequenceShard)

    def local(self, leaf: Any) -> Any:
        """A shard's tokens, own tokens of a whole tensor, a tensor without tokens as it is."""
        if isinstance(leaf, SequenceShard):
            return leaf.local
        if not isinstance(leaf, torch.Tensor):
            return leaf
        tokens = self.tokens
        if leaf.dim() < -tokens.dim:
            return self.weight(leaf)
        at = leaf.shape[tokens.dim]
        if at == 1:  # it meets every token, also the only one
            return self.weight(leaf)
        if at == tokens.extent:
            return self.first.region.meeting(leaf, tokens)
        self.fit = False
        return leaf

    def weight(self, leaf: Any, *, matrix: bool = False) -> Any:
        """A tensor that meets every token."""
        region = self.first.region
        if not isinstance(leaf, torch.Tensor) or not (leaf.requires_grad and torch.is_grad_enabled()):
            return leaf
        if isinstance(leaf, SequenceShard):
            self.fit = False
            return leaf
        return region.weight(leaf, matrix=matrix)

    def saw_runs(self, tokens: Tokens) -> None:
        if tokens.others > 1:
            self.first.region.runs[tokens.extent] = tokens.size


def _elementwise(func: Any, args: Sequence[Any], kwargs: dict[str, Any], operands: _Operands) -> Any:
    if "out" in kwargs or (func in IN_PLACE and not isinstance(args[0], SequenceShard)):
        return NotImplemented
    if func in IN_PLACE:
        _refuse_unseen(args[0], func)
    if func is torch.Tensor.contiguous and not (args[1:] or kwargs):
        return _dense(args[0].local, operands.tokens.dim)
    if any(type(leaf) in (tuple, list, dict) for leaf in (*args, *kwargs.values())):
        own_args, own_kwargs = tree_map(operands.local, (tuple(args), kwargs))
    else:
        own_args = tuple(operands.local(arg) for arg in args)
        own_kwargs = {name: operands.local(value) for name, value in kwargs.items()}
    return func(*own_args, **own_kwargs) if operands.fit else NotImplemented


def _dense(local: torch.Tensor, dim: int) -> torch.Tensor:
    """`local`, or a contiguous copy: a copy on every rank or on none, also where some have one token or no token."""
    if isinstance(local, DividedLogits):
        return local
    expected = 1
    for at in range(-1, -local.dim() - 1, -1):
        size = local.shape[at]
        if (size != 1 or at == dim) and local.stride(at) != expected:
            return local.clone(memory_format=torch.contiguous_format)
        expected *= max(size, 1)
    return local


def _again(source: SequenceShard, made: torch.Tensor, tokens: Tokens, *, may_share: bool) -> SequenceShard:
    """A shard of what was made of `source`. Whether they share memory is told from the function, not from addresses:
    a rank without tokens has none."""
    if made is source.local and tokens == source.tokens:
        return source
    shard = SequenceShard(made, tokens, source.region)
    if may_share:
        shard.memory = source.memory
        shard.memory.several = True
    return shard


_PASSED_BY = (
    "activations that are dealt out by tokens are read where torch asks no one (a custom autograd function between "
    "units): their gradients would be lost; lay the model out with sequence_parallel=off"
)


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise DataflowError(_PASSED_BY)


def _refuse_unknown(shard: SequenceShard) -> None:
    """A shard is a leaf: an autograd function that returns one has computed it without a graph. And its tokens are what
    the model's code sees."""
    if not shard.is_leaf:
        raise DataflowError(_PASSED_BY)
    if any(whole._version != version for whole, version in shard.memory.views):
        raise DataflowError(
            "a view of all tokens was written into, and the activations that it is a view of are dealt out by tokens: "
            "they would not see that; write into a copy, or lay the model out with sequence_parallel=off"
        )


def _refuse_unseen(target: SequenceShard, func: Any) -> None:
    if target.memory.views:
        raise DataflowError(
            f"{getattr(func, '__name__', func)} writes into activations that are dealt out by tokens and of which "
            "there is a view of all tokens: it would not see that; write into a copy, or lay the model out with "
            "sequence_parallel=off"
        )


def _written(target: SequenceShard, local: torch.Tensor) -> SequenceShard:
    target.memory.writes += 1
    target.local = local
    if local.requires_grad != target.requires_grad:
        target.requires_grad_(local.requires_grad)
        if not target.region.inside:
            target.watch()
    return target


# -- all tokens ---------------------------------------------------------------------------------


def _joined(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The function on whole tensors. What it wrote into is dealt out again."""
    shards = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, SequenceShard)]
    region = shards[0].region
    region.joined_at.add(getattr(func, "__name__", str(func)))
    whole_of = {id(shard): whole_tokens(shard) for shard in shards}
    wholes = [(shard, whole_of[id(shard)], whole_of[id(shard)]._version) for shard in shards]
    whole_args, whole_kwargs = tree_map(lambda leaf: whole_of.get(id(leaf), leaf), (tuple(args), dict(kwargs)))
    out = func(*whole_args, **whole_kwargs)
    made = {leaf.untyped_storage()._cdata for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)}
    for shard, whole, version in wholes:
        if whole._version != version:
            _refuse_unseen(shard, func)
            with torch._C.DisableTorchFunctionSubclass():
                dealt = region.scatter(whole, shard.tokens)
                _written(shard, shard.local.copy_(dealt) if shard.memory.several else dealt)
        if whole.untyped_storage()._cdata in made:
            shard.memory.views.append((whole, whole._version))
    return out
