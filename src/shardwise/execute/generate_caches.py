"""What a model remembers of the tokens it has seen, on a rank that runs a part of its units.

    layer             0          1     │     2          3
    stage 0      keys, values  …       │   meta       meta        lengths advance on both: glue asks for them
    stage 1        meta       meta     │  keys, values  …

A unit that runs writes its layers itself. For one that does not, the calls of the cache that it made when its forward
was recorded are made again with tensors of those shapes on the meta device: whatever a kind of cache counts (tokens, a
window, whether there is a state) it counts by its own code, and no memory is held. Knows caches of transformers; runs
no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["Effect", "Effects", "copied", "describe", "empty_cache", "held_bytes", "recording", "replay", "stand_in"]

_ALONG_TOKENS = ("keys", "values")  # (batch, heads, tokens, head_dim); written by joining, never in place
_SCALARS = (str, int, float, bool, torch.dtype, torch.device, type)

Swap = Callable[[str, torch.Tensor], torch.Tensor]  # (attribute that holds it, tensor)


class _Marks(dict[Any, Any]):
    """What a cache has ticked off (layers whose encoder has been read, say); whoever ticks is noted."""

    def __init__(self, marks: Mapping[Any, Any], note: Callable[..., Any]) -> None:
        super().__init__(marks)
        self._note = note

    def __setitem__(self, key: Any, value: Any) -> None:
        self._note(self, key, value)


@runtime_checkable
class _Layered(Protocol):
    """A cache that keeps its contents in layers."""

    layers: list[Any]

    def get_seq_length(self, layer_idx: int = 0) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class _Shaped:
    """A tensor of which nothing but its description counts."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True, slots=True)
class Effect:
    """A call that a unit made of the cache: `path` are attribute names and places in lists, from the cache down."""

    path: tuple[str | int, ...]
    method: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


Effects = Mapping[int, Sequence[Effect]]  # by the node of the unit call, in order


def empty_cache(model: nn.Module) -> Any:
    """A cache for the model as its config describes the layers: windows, states; for both halves of an
    encoder-decoder."""
    from transformers import DynamicCache, EncoderDecoderCache

    described: Any = model
    config = described.config.get_text_config(decoder=True)
    if described.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)


def copied(cache: Any, swap: Swap = lambda name, tensor: tensor) -> Any:
    """A cache of its own with other tensors; without `swap` the same ones, and no operation of torch."""
    return _copied(cache, "", swap, {})


def stand_in(cache: Any, device: torch.device) -> Any:
    """A cache as a recording may write into it: lengths as they are, contents without values. What grows by tokens
    takes no memory."""

    def swap(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 and tensor.device.type != "meta":
            return tensor.clone()
        if name in _ALONG_TOKENS and tensor.dim() > 2:
            one = torch.zeros((*tensor.shape[:-2], 1, tensor.shape[-1]), dtype=tensor.dtype, device=device)
            return one.expand(tensor.shape)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return copied(cache, swap)


def recording(cache: Any, running: Callable[[], int | None]) -> dict[int, list[Effect]]:
    """Note what `cache`, a copy that is thrown away, is asked to take in; `running` tells the node of the unit that
    asks. Calls that others make of themselves are theirs."""
    noted: dict[int, list[Effect]] = {}
    depth = [0]

    def noting(path: tuple[str | int, ...], method: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            node = running()
            if depth[0] == 0 and node is not None:
                own = args[1:] if isinstance(args[0], _Marks) else args
                shaped = tree_map(_shaped, (own, kwargs))
                noted.setdefault(node, []).append(Effect(path, method, shaped[0], shaped[1]))
            depth[0] += 1
            try:
                return body(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    for path, part in _parts(cache):
        for name, value in vars(part).items():
            if isinstance(value, dict) and path[-2:-1] != ("layers",):
                vars(part)[name] = _Marks(value, noting((*path, name), "__setitem__", dict.__setitem__))
        for method in dir(type(part)):
            if method.startswith("update") and callable(getattr(type(part), method)):
                vars(part)[method] = noting(path, method, getattr(part, method))
    return noted


def replay(effects: Sequence[Effect], cache: Any) -> None:
    """Let the layers of an absent unit take in what they took when it was recorded, without values."""
    if not effects:
        return
    with _JoiningShapes():
        for effect in effects:
            part = cache
            for step in effect.path:
                part = part[step] if isinstance(step, int) else getattr(part, step)
            args, kwargs = tree_map(_unvalued, (effect.args, effect.kwargs))
            getattr(part, effect.method)(*args, **kwargs)


class _JoiningShapes(TorchFunctionMode):
    """Tensors without values are joined by their shapes alone: torch does it in Python, which costs a layer 0.1 ms."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        joined = _joined(*args, **(kwargs or {})) if func is torch.cat else None
        return func(*args, **(kwargs or {})) if joined is None else joined


def _joined(tensors: Sequence[torch.Tensor], dim: int = 0, **more: Any) -> torch.Tensor | None:
    """None where one has values, or where they do not fit by shape and dtype: torch says so."""
    first = tensors[0]
    shape = list(first.shape)
    if more or not shape:
        return None
    for other in tensors[1:]:
        rest = list(other.shape)
        if len(rest) != len(shape) or other.dtype != first.dtype:
            return None
        shape[dim] += rest[dim]
        rest[dim] = shape[dim]
        if rest != shape:
            return None
    if any(tensor.device.type != "meta" for tensor in tensors):
        return None
    return torch.empty(shape, dtype=first.dtype, device="meta")


def describe(cache: Any) -> Hashable:
    """What may turn the model's code another way: kinds of layers, which have begun, which windows are full."""
    return tuple(dict.fromkeys(_described(part) for path, part in _parts(cache) if path and path[-2:-1] == ("layers",)))


def held_bytes(caches: Sequence[Any]) -> int:
    """Of the contents that are here, memory that several share once."""
    seen: dict[int, int] = {}

    def count(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta" and tensor.dim() > 1:
            seen[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    for cache in caches:
        copied(cache, count)
    return sum(seen.values())


def _parts(cache: Any, path: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], Any]]:
    """A cache, the caches inside it, and their layers, with the ways there."""
    found: list[tuple[tuple[str | int, ...], Any]] = [(path, cache)]
    for name, value in vars(cache).items():
        if name == "layers" and isinstance(value, list):
            found += [((*path, name, place), layer) for place, layer in enumerate(value)]
        elif isinstance(value, _Layered):
            found += _parts(value, (*path, name))
    return found


def _described(part: Any) -> Hashable:
    told: list[Hashable] = [type(part).__name__]
    for name, value in vars(part).items():
        if isinstance(value, bool):
            told.append((name, value))
        elif isinstance(value, dict) and all(isinstance(each, bool) for each in value.values()):
            told.append((name, all(value.values()), any(value.values())))
    window, length = getattr(part, "sliding_window", None), getattr(part, "cumulative_length", None)
    if isinstance(window, int) and isinstance(length, int):
        told.append((length + 1 > window, length + 1 >= window, length >= window))
    return tuple(told)


def _copied(value: Any, name: str, swap: Swap, known: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return swap(name, value)
    if value is None or isinstance(value, _SCALARS) or callable(value):
        return value
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, dict):
        made: Any = known.setdefault(id(value), type(value)())
        made.update({key: _copied(each, name, swap, known) for key, each in value.items()})
    elif isinstance(value, (list, tuple)):
        made = known[id(value)] = type(value)(_copied(each, name, swap, known) for each in value)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, nn.Module):
        made = known[id(value)] = object.__new__(type(value))
        for attribute, each in vars(value).items():
            vars(made)[attribute] = _copied(each, attribute, swap, known)
    else:
        made = value
    return made


def _shaped(leaf: Any) -> Any:
    return _Shaped(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _unvalued(leaf: Any) -> Any:
    return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta") if isinstance(leaf, _Shaped) else leaf
