"""What the input of each layer depends on, read off from gradients: the ground on which proposals stand.

The graph of one forward is cut behind every layer: a layer's output is a leaf. The gradient of one rank's share of a
layer's input then shows which of the other layers' output features, which rows of parameters, buffers and arguments
that share needs. Any packing shows itself: [q|k|v], interleaved heads, [gate|up], tables of heads.

    share of rank 0   o_in[: h/2] ◄── q[: h/2], k[: h/2], v[: h/2]           a zero gradient elsewhere
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn

from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.layers import layer_of

__all__ = ["Leaf", "Sink", "Supports", "supports"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Leaf:
    """Where the graph is cut. kind: "layer" (its output), "parameter", "buffer" or "argument" (by place)."""

    kind: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sink:
    """What reads leaves: the input of a layer, or a returned tensor (by place)."""

    kind: str  # "layer" or "output"
    name: str


Sets = tuple[frozenset[int], ...]  # of each rank


@dataclasses.dataclass(kw_only=True, slots=True)
class Supports:
    """Readers and needs of one unit, for one number of ranks.

    `needs[layer][leaf][dim]`: for each rank, the indices along `dim` of the leaf that the rank's share of the layer's
    input depends on. For layers' outputs the only dim is that of their features.
    """

    shapes: dict[Leaf, tuple[int, ...]]
    reads: dict[Sink, set[Leaf]]
    needs: dict[str, dict[Leaf, dict[int, Sets]]]
    order: list[str]  # layers in the order of their first call
    features: dict[str, int]  # of each layer's output

    def readers(self, leaf: Leaf) -> list[Sink]:
        return [sink for sink, leaves in self.reads.items() if leaf in leaves]


@dataclasses.dataclass(slots=True)
class _Seen:
    """One forward: (layer, input, output leaf) of every call of a layer, and what came out."""

    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=list)
    out: Any = None


def supports(
    unit: nn.Module,
    call: Call,
    *,
    tp: int,
    cut_at: frozenset[str] = frozenset(),
) -> Supports:
    """Run `call` once and read off the dependencies for `tp` ranks. `unit` is real, in float64; it is left as it is.

    `cut_at` are further modules behind which the graph is cut, as if they were layers.
    """
    copied = twin(unit)
    copied.train(False)
    leaves = _named_leaves(copied)
    args, kwargs = call.fresh(seed=0, all_gradients=True)
    for place, tensor in enumerate(tensors_of((args, kwargs))):
        if tensor.requires_grad:
            leaves[Leaf(kind="argument", name=str(place))] = tensor
    seen = _Seen()
    with _cut(copied, seen, cut_at), Doubled(), torch.enable_grad():
        seen.out = copied(*args, **kwargs)
    return _read_off(copied, leaves, seen, tp, call.read)


def _named_leaves(unit: nn.Module) -> dict[Leaf, torch.Tensor]:
    """Parameters and floating buffers; all ask for gradients. (A layer's own are behind the cut: they get none.)"""
    leaves: dict[Leaf, torch.Tensor] = {}
    for prefix, module in unit.named_modules():
        start = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                leaves[Leaf(kind="parameter", name=start + name)] = parameter.requires_grad_(True)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue  # written in place; they follow the module's weight
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                leaf = buffer.detach().clone().requires_grad_(True)
                leaves[Leaf(kind="buffer", name=start + name)] = leaf
                module._buffers[name] = leaf * 1
    return leaves


@contextlib.contextmanager
def _cut(unit: nn.Module, seen: _Seen, cut_at: frozenset[str]) -> Iterator[None]:
    patched: list[nn.Module] = []
    for name, module in unit.named_modules():
        if layer_of(module) is not None or name in cut_at:
            module.__dict__["forward"] = _cutting(name, module.forward, seen)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _cutting(name: str, body: Callable[..., Any], seen: _Seen) -> Callable[..., Any]:
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            out = body(x, *args, **kwargs)
        if not isinstance(out, torch.Tensor):
            return body(x, *args, **kwargs)  # no plain layer (a router that is a subclass of one)
        leaf = out.detach().requires_grad_(True)
        seen.calls.append((name, x, leaf))
        return leaf * 1  # what is behind may write into it

    return forward


def _read_off(
    unit: nn.Module, leaves: dict[Leaf, torch.Tensor], seen: _Seen, tp: int, read: frozenset[int] | None
) -> Supports:
    outputs: dict[Leaf, list[torch.Tensor]] = {}
    features: dict[str, int] = {}
    modules = dict(unit.named_modules())
    for name, _, out in seen.calls:
        layer = layer_of(modules[name])
        features[name] = -1 if layer is None else layer.features
        outputs.setdefault(Leaf(kind="layer", name=name), []).append(out)
    everything = {**{leaf: [tensor] for leaf, tensor in leaves.items()}, **outputs}
    result = Supports(
        shapes={leaf: tuple(tensors[0].shape) for leaf, tensors in everything.items()},
        reads={},
        needs={},
        order=list(features),
        features=features,
    )
    flat = [(leaf, tensor) for leaf, tensors in everything.items() for tensor in tensors]
    for name, x, _ in seen.calls:
        sink = Sink(kind="layer", name=name)
        found = _needs(x, features[name], tp, flat)
        result.reads.setdefault(sink, set()).update(leaf for leaf in found)
        _merge(result.needs.setdefault(name, {}), found, features)
    for place, tensor in enumerate(tensors_of(seen.out)):
        if tensor.requires_grad and (read is None or place in read):
            grads = _gradients(tensor, torch.randn_like(tensor), flat)
            result.reads[Sink(kind="output", name=str(place))] = {
                leaf for (leaf, _), grad in zip(flat, grads, strict=True) if grad is not None
            }
    return result


def _gradients(
    tensor: torch.Tensor, cotangent: torch.Tensor, flat: list[tuple[Leaf, torch.Tensor]]
) -> tuple[torch.Tensor | None, ...]:
    found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
        tensor, [leaf for _, leaf in flat], cotangent, retain_graph=True, allow_unused=True
    )
    return found


def _needs(
    x: torch.Tensor, dim: int, tp: int, flat: list[tuple[Leaf, torch.Tensor]]
) -> dict[Leaf, list[list[torch.Tensor]]]:
    """Leaf -> for each rank, the masks of what its share of `x` needs, one of each tensor of the leaf.

    One entry for all ranks where the width does not divide.
    """
    if not x.requires_grad:
        return {}
    width = x.shape[dim]
    shares = tp if width % tp == 0 else 1
    found: dict[Leaf, list[list[torch.Tensor]]] = {}
    for rank in range(shares):
        cotangent = torch.zeros_like(x)
        share = cotangent.narrow(dim % x.dim(), rank * width // shares, width // shares)
        share.copy_(torch.randn(share.shape, dtype=x.dtype))
        for (leaf, _), grad in zip(flat, _gradients(x, cotangent, flat), strict=True):
            if grad is not None:
                of_ranks = found.setdefault(leaf, [[] for _ in range(shares)])
                of_ranks[rank].append(grad != 0)
    return found


def _merge(
    into: dict[Leaf, dict[int, Sets]], found: dict[Leaf, list[list[torch.Tensor]]], features: dict[str, int]
) -> None:
    for leaf, of_ranks in found.items():
        if len(of_ranks) < 2 or not of_ranks[0]:
            continue
        num_dims = of_ranks[0][0].dim()
        dims = [features[leaf.name] % num_dims] if leaf.kind == "layer" else list(range(num_dims))
        for dim in dims:
            sets = tuple(frozenset().union(*(_indices(mask, dim) for mask in masks)) for masks in of_ranks)
            before = into.setdefault(leaf, {}).get(dim)
            into[leaf][dim] = sets if before is None else tuple(a | b for a, b in zip(before, sets, strict=True))


def _indices(mask: torch.Tensor, dim: int) -> frozenset[int]:
    others = [other for other in range(mask.dim()) if other != dim]
    along = mask.any(dim=others) if others else mask
    return frozenset(along.nonzero().flatten().tolist())
