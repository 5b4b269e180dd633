"""Experts found by what they look like and how they are called, not by their class. What is found is then proven.

stacked   a module with parameters of three dims, all of whose own parameters have the same dim 0, called with rows
          (tokens, width), whole numbers below that dim (tokens, choices) and weights of the same shape
ordered   such a module that is called with rows (rows, width) alone, which stand in the order of their experts, and a
          list of how many each has; without that list each has as many
listed    modules in a list or dict that are alike, each called once at most, in order, with one tensor of rows, none
          of which depends on what another of them returned
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.expert import Experts, Listed, Ordered, Stacked
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.trace.randomness import RandomMode, Scope

__all__ = ["Found", "find_experts", "looks_like_experts"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What may be divided, with the variants to try in their order; or why something that looks like it is not."""

    variants: tuple[tuple[Experts, ...], ...]  # one for each container: the first that is proven is taken
    reasons: tuple[str, ...]


def looks_like_experts(unit: nn.Module) -> bool:
    """Whether `unit` has a module that may hold experts; nothing is run."""
    return bool(_stacks(unit) or _lists(unit))


def find_experts(unit: nn.Module, call: Call) -> Found:
    """The experts of a real unit, from one call of it."""
    stacks, lists = _stacks(unit), _lists(unit)
    seen = _observed(unit, call, stacks, lists, silent=False)
    mute = _observed(unit, call, stacks, lists, silent=True) if lists else seen
    found: list[tuple[Experts, ...]] = []
    reasons: list[str] = []
    for name, size in stacks.items():
        stacked = _stacked(unit.get_submodule(name), name, size, seen.calls.get(name, []))
        if isinstance(stacked, str):
            reasons.append(f"{name}: {stacked}")
        else:
            found.append(stacked)
    for name, members in lists.items():
        listed = _listed(name, members, seen, mute)
        if isinstance(listed, Listed):
            found.append((listed,))
        elif listed:
            reasons.append(f"{name}: {listed}")
    return Found(variants=tuple(found), reasons=tuple(reasons))


# -- by structure -------------------------------------------------------------------------------


def _stacks(unit: nn.Module) -> dict[str, int]:
    """Modules whose own parameters all have the same dim 0, of two or more, one of them with three dims -> that dim."""
    found: dict[str, int] = {}
    for name, module in unit.named_modules():
        own = [parameter for parameter in module._parameters.values() if parameter is not None]
        if any(parameter.dim() == 3 for parameter in own) and not isinstance(module, _NO_EXPERTS):
            sizes = {parameter.shape[0] if parameter.dim() else 0 for parameter in own}
            if len(sizes) == 1 and min(sizes) > 1:
                found[name] = sizes.pop()
    return found


_NO_EXPERTS = (nn.modules.conv._ConvNd, nn.Bilinear)


def _lists(unit: nn.Module) -> dict[str, tuple[str, ...]]:
    """Lists and dicts of modules that are alike, with parameters -> their names."""
    found: dict[str, tuple[str, ...]] = {}
    for name, module in unit.named_modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            kinds = {_shapes(member) for member in module.children()}
            if len(module) > 1 and len(kinds) == 1 and any(kinds):
                found[name] = tuple(f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_children())
    inner = {member for members in found.values() for member in members}
    return {name: members for name, members in found.items() if not any(name.startswith(f"{m}.") for m in inner)}


def _shapes(module: nn.Module) -> tuple[object, ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())


# -- by calls -----------------------------------------------------------------------------------


@dataclasses.dataclass(slots=True)
class _Observed:
    calls: dict[str, list[dict[str, Any]]]  # stacked module -> bound arguments of each call
    members: list[tuple[str, str, Sequence[Any], Mapping[str, Any]]]  # expert, who called it, arguments
    others: set[str]  # those that return no tensor


def _observed(
    unit: nn.Module, call: Call, stacks: Mapping[str, int], lists: Mapping[str, Sequence[str]], *, silent: bool
) -> _Observed:
    """One forward of a copy of `unit`. With `silent` members of lists answer zeros."""
    copied = twin(unit)
    seen = _Observed({}, [], set())
    stack: list[str] = []
    members = {member for each in lists.values() for member in each}

    def wrap(name: str, module: nn.Module) -> None:
        body = module.forward
        signature = inspect.signature(body)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if name in stacks:
                with contextlib.suppress(TypeError):
                    seen.calls.setdefault(name, []).append(dict(signature.bind(*args, **kwargs).arguments))
            if name in members:
                kept = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
                seen.members.append((name, stack[-1] if stack else "", kept, kwargs))
            stack.append(name)
            try:
                out = body(*args, **kwargs)
            finally:
                stack.pop()
            if name in members and not isinstance(out, torch.Tensor):
                seen.others.add(name)
            return out * 0.0 if silent and name in members and isinstance(out, torch.Tensor) else out

        module.__dict__["forward"] = forward

    for name, module in copied.named_modules():
        wrap(name, module)
    args, kwargs = call.fresh(seed=1)
    given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.requires_grad]
    samples = tuple(range(given[0].shape[0] if given and given[0].dim() else 1))
    scope = Scope(seed=0, step=0, micro_batch=0, samples=samples, place="unit")
    with Doubled(), RandomMode(scope), torch.no_grad():
        copied(*args, **kwargs)
    return seen


def _stacked(module: nn.Module, name: str, size: int, calls: Sequence[Mapping[str, Any]]) -> tuple[Experts, ...] | str:
    """What to try, or why not."""
    if len(calls) != 1:
        return f"its {size} experts are called {len(calls)} times in a forward"
    made = _with_choices(module, name, size, calls[0])
    if isinstance(made, str):
        ordered = _ordered(module, name, size, calls[0])
        return made if ordered is None else _variants(module, ordered)
    return _variants(module, made)


def _ordered(module: nn.Module, name: str, size: int, call: Mapping[str, Any]) -> Ordered | None:
    tensors = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    lists = {key: value for key, value in call.items() if isinstance(value, (list, tuple))}
    if len(tensors) != 1 or len(lists) > 1 or len(tensors) + len(lists) < len(call):
        return None
    ((rows, given),) = tensors.items()
    if given.dim() != 2 or not given.is_floating_point():
        return None
    for counts in lists.values():
        if len(counts) != size or any(type(count) is not int for count in counts) or sum(counts) != given.shape[0]:
            return None
    if not lists and given.shape[0] % size:
        return None
    leaves = tuple(leaf for leaf, parameter in module._parameters.items() if parameter is not None)
    return Ordered(module=name, num_experts=size, parameters=leaves, rows=rows, counts=next(iter(lists), ""))


def _variants(module: nn.Module, made: Stacked | Ordered) -> tuple[Experts, ...]:
    """With every choice of the attributes that may say how many experts there are, the fewest first: others may be as
    large by chance."""
    counts = [key for key, value in vars(module).items() if type(value) is int and value == made.num_experts]
    subsets: Iterator[tuple[str, ...]] = itertools.chain.from_iterable(
        itertools.combinations(counts, length) for length in range(len(counts) + 1)
    )
    return tuple(dataclasses.replace(made, attributes=subset) for subset in itertools.islice(subsets, 16))


def _with_choices(module: nn.Module, name: str, size: int, call: Mapping[str, Any]) -> Stacked | str:
    tensors = {key: value for key, value in call.items() if isinstance(value, torch.Tensor)}
    others = [key for key, value in call.items() if not isinstance(value, torch.Tensor) and tensors_of(value)]
    floating = {key: value for key, value in tensors.items() if value.is_floating_point() and value.dim() == 2}
    index = [key for key, value in tensors.items() if not value.is_floating_point() and value.dim() == 2]
    if len(tensors) != 3 or len(index) != 1 or len(floating) != 2 or others:
        told = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
        return (
            f"its {size} experts are called with {told or 'no tensors'}, and not with rows (tokens, width), whole "
            "numbers (tokens, choices) and weights (tokens, choices)"
        )
    shape = tensors[index[0]].shape
    weights = [key for key, value in floating.items() if value.shape == shape]
    if len(weights) != 1 or any(value.shape[0] != shape[0] for value in floating.values()):
        return f"none, or both, of {', '.join(floating)} have the shape {tuple(shape)} of {index[0]}"
    rows = next(key for key in floating if key != weights[0])
    return Stacked(
        module=name,
        num_experts=size,
        parameters=tuple(leaf for leaf, parameter in module._parameters.items() if parameter is not None),
        rows=rows,
        index=index[0],
        weights=weights[0],
    )


def _listed(name: str, members: Sequence[str], seen: _Observed, mute: _Observed) -> Listed | str:
    """Experts, or why not; nothing to say about lists of something else."""
    own = [each for each in seen.members if each[0] in members]
    called = [each[0] for each in own]
    if not called or seen.others.intersection(called) or any(not _is_rows(each[2], each[3]) for each in own):
        return ""
    silent = [each for each in mute.members if each[0] in members]
    same = len(silent) == len(own) and all(_equal(a[2], b[2]) for a, b in zip(own, silent, strict=True))
    callers = {each[1] for each in own}
    if not same:
        return ""  # one after another: layers, no experts
    if len(callers) > 1 or called != [member for member in members if member in called]:
        return f"its {len(members)} modules are called several times, or out of their order"
    return Listed(module=name, members=tuple(members), caller=callers.pop())


def _is_rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    return len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) and args[0].dim() >= 2


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
