"""What the input of each layer depends on, read off from gradients: the ground on which proposals stand.

The graph of one forward is cut behind every layer: a layer's output is a leaf. The gradient of one rank's share of a
layer's input then shows which of the other layers' output features, which rows of parameters, buffers and arguments
that share needs. Any packing shows itself: [q|k|v], interleaved heads, [gate|up], tables of heads.

    share of rank 0   o_in[: h/2] ◄── q[: h/2], k[: h/2], v[: h/2]           a zero gradient elsewhere
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin
from shardwise.parallel.tensor.layers import layer_of
from shardwise.parallel.tensor.products import Product, product_of

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
    products: dict[str, Product] = dataclasses.field(default_factory=dict)  # of layers that are functions

    def readers(self, leaf: Leaf) -> list[Sink]:
        return [sink for sink, leaves in self.reads.items() if leaf in leaves]


@dataclasses.dataclass(slots=True)
class _Seen:
    """One forward: (layer, inputs, output leaf) of every call of a layer, and what came out."""

    calls: list[tuple[str, tuple[torch.Tensor, ...], torch.Tensor]] = dataclasses.field(default_factory=list)
    products: dict[str, Product] = dataclasses.field(default_factory=dict)
    inside: bool = False  # of a layer, whose own product is no further one
    out: Any = None


def supports(
    unit: nn.Module,
    call: Call,
    *,
    tp: int,
    cut_at: frozenset[str] = frozenset(),
    seed: int = 0,
    products: frozenset[str] = frozenset(),
) -> Supports:
    """Run `call` once and read off the dependencies for `tp` ranks. `unit` is real, in float64; it is left as it is.

    `cut_at` are further modules behind which the graph is cut, as if they were layers, `products` weights
    that functions multiply with (`products.products_in`), each a layer by its own name.
    """
    copied = twin(unit)
    copied.train(False)
    leaves = _named_leaves(copied)
    args, kwargs = call.fresh(seed=seed, all_gradients=True)
    for place, tensor in enumerate(tensors_of((args, kwargs))):
        if tensor.requires_grad:
            leaves[Leaf(kind="argument", name=str(place))] = tensor
    seen = _Seen()
    with _cut(copied, seen, cut_at), Doubled(), _Products(copied, products, seen), torch.enable_grad():
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
            module.__dict__["forward"] = _cutting(name, module.forward, seen, many=name in cut_at)
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


def _cutting(name: str, body: Callable[..., Any], seen: _Seen, *, many: bool) -> Callable[..., Any]:
    """`body` with its output as a leaf; with `many` inputs of one shape, as a norm with a gate has."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.inside = True
        try:
            with torch.no_grad():
                out = body(*args, **kwargs)
        finally:
            seen.inside = False
        given = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.Tensor)]
        if not isinstance(out, torch.Tensor) or not given:
            return body(*args, **kwargs)  # no plain layer (a router that is a subclass of one)
        leaf = out.detach().requires_grad_(True)
        read = [x for x in given if x.shape == given[0].shape] if many else given[:1]
        # copies: what is written into them behind the layer is not what the layer read
        seen.calls.append((name, tuple(x * 1 if x.requires_grad else x for x in read), leaf))
        return leaf * 1  # what is behind may write into it

    return forward


class _Products(TorchFunctionMode):
    """Cuts behind products with parameters that functions make."""

    def __init__(self, unit: nn.Module, names: Collection[str], seen: _Seen) -> None:
        super().__init__()
        self._names = {id(unit.get_parameter(name)): name for name in names}
        self._biases = {id(parameter): name for name, parameter in unit.named_parameters()}
        self._seen = seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = None if self._seen.inside else product_of(func, args, kwargs, lambda given: id(given) in self._names)
        if found is None:
            return func(*args, **kwargs)
        with torch.no_grad():
            leaf = func(*args, **kwargs).detach().requires_grad_(True)
        name = self._names[id(found.weight)]
        product = dataclasses.replace(found.product, bias=self._biases.get(id(found.bias), ""))
        if self._seen.products.setdefault(name, product) != product:
            return func(*args, **kwargs)  # multiplied in two ways: no layer
        self._seen.calls.append((name, (args[found.place],), leaf))
        return leaf * 1


def _read_off(
    unit: nn.Module, leaves: dict[Leaf, torch.Tensor], seen: _Seen, tp: int, read: frozenset[int] | None
) -> Supports:
    outputs: dict[Leaf, list[torch.Tensor]] = {}
    features: dict[str, int] = {}
    modules = dict(unit.named_modules())
    for name, _, out in seen.calls:
        layer = layer_of(modules[name]) if name in modules else None
        features[name] = seen.products[name].y_dim if name in seen.products else -1 if layer is None else layer.features
        outputs.setdefault(Leaf(kind="layer", name=name), []).append(out)
    everything = {**{leaf: [tensor] for leaf, tensor in leaves.items()}, **outputs}
    result = Supports(
        shapes={leaf: tuple(tensors[0].shape) for leaf, tensors in everything.items()},
        reads={},
        needs={},
        order=list(features),
        features=features,
        products=seen.products,
    )
    flat = [(leaf, tensor) for leaf, tensors in everything.items() for tensor in tensors]
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, read_here, _ in seen.calls:
        inputs.setdefault(name, []).extend(read_here)
    for name, given in inputs.items():
        dim = seen.products[name].x_dim if name in seen.products else features[name]
        found = _needs(given, dim, tp, flat)
        result.reads[Sink(kind="layer", name=name)] = set(found)
        result.needs[name] = _sets(found, features)
    for place, tensor in enumerate(tensors_of(seen.out)):
        if tensor.requires_grad and (read is None or place in read):
            grads = _gradients([tensor], [torch.randn_like(tensor)], flat)
            result.reads[Sink(kind="output", name=str(place))] = {
                leaf for (leaf, _), grad in zip(flat, grads, strict=True) if grad is not None
            }
    return result


def _gradients(
    tensors: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor], flat: list[tuple[Leaf, torch.Tensor]]
) -> tuple[torch.Tensor | None, ...]:
    found: tuple[torch.Tensor | None, ...] = torch.autograd.grad(
        tensors, [leaf for _, leaf in flat], cotangents, retain_graph=True, allow_unused=True
    )
    return found


def _needs(
    inputs: Sequence[torch.Tensor], dim: int, tp: int, flat: list[tuple[Leaf, torch.Tensor]]
) -> dict[Leaf, list[list[torch.Tensor]]]:
    """Leaf -> for each rank, the masks of what its share of a layer's inputs needs, one of each tensor of the leaf.

    All calls of a layer at once: what any of them needs. One entry for all ranks where the width does not divide.
    """
    given = [x for x in inputs if x.requires_grad]
    if not given:
        return {}
    shares = tp if all(x.shape[dim] % tp == 0 for x in given) else 1
    found: dict[Leaf, list[list[torch.Tensor]]] = {}
    for rank in range(shares):
        cotangents = [_share(x, dim, rank, shares) for x in given]
        for (leaf, _), grad in zip(flat, _gradients(given, cotangents, flat), strict=True):
            if grad is not None:
                of_ranks = found.setdefault(leaf, [[] for _ in range(shares)])
                of_ranks[rank].append(grad != 0)
    return found


def _share(x: torch.Tensor, dim: int, rank: int, shares: int) -> torch.Tensor:
    """Random numbers in the rank's share of `x`, zero elsewhere."""
    cotangent, width = torch.zeros_like(x), x.shape[dim] // shares
    share = cotangent.narrow(dim % x.dim(), rank * width, width)
    share.copy_(torch.randn(share.shape, dtype=x.dtype))
    return cotangent


def _sets(found: dict[Leaf, list[list[torch.Tensor]]], features: dict[str, int]) -> dict[Leaf, dict[int, Sets]]:
    """What each rank needs of the leaves that several ranks read, along each dim that may be divided."""
    needs: dict[Leaf, dict[int, Sets]] = {}
    for leaf, of_ranks in found.items():
        if len(of_ranks) < 2 or not of_ranks[0]:
            continue
        num_dims = of_ranks[0][0].dim()
        dims = [features[leaf.name] % num_dims] if leaf.kind == "layer" else list(range(num_dims))
        needs[leaf] = {
            dim: tuple(frozenset().union(*(_indices(mask, dim) for mask in masks)) for masks in of_ranks)
            for dim in dims
        }
    return needs


def _indices(mask: torch.Tensor, dim: int) -> frozenset[int]:
    others = [other for other in range(mask.dim()) if other != dim]
    along = mask.any(dim=others) if others else mask
    return frozenset(along.nonzero().flatten().tolist())
