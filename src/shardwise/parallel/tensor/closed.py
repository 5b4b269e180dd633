"""Modules that hold both products of a pair themselves, as tensors of experts do: divided inside, closed outside.

    x, routing ──copy──► first product (columns) ──► gate ──► second product (rows) ──all-reduce──► y

Where the first product is cut shows the gradient of a share of the second one's input; where the second is cut shows
its output when only that share is given. Knows functions of torch; what such a module is called does not matter.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from shardwise.describe.tensor import Slice
from shardwise.parallel.tensor.groups import Group, Refused, slice_of_sets
from shardwise.parallel.tensor.instance import Call, Doubled, twin
from shardwise.parallel.tensor.layers import layer_of

__all__ = ["closed_groups", "is_closed"]

# Functions that multiply: positions of activation and weight, dims of the activation that are summed over.
_PRODUCTS: tuple[tuple[Callable[..., Any], int, int, int], ...] = (
    (F.linear, 0, 1, -1),
    (torch.matmul, 0, 1, -1),
    (torch.Tensor.matmul, 0, 1, -1),
    (torch.Tensor.__matmul__, 0, 1, -1),
    (torch._grouped_mm, 0, 1, -1),
    (torch.bmm, 0, 1, -1),
    (torch.bmm, 1, 0, -2),
)

_MOST_LOOKS = 16  # at products of one shape, a loop over experts

Needs = dict[str, list[list[torch.Tensor]]]  # parameter -> for each rank, masks


def is_closed(module: nn.Module) -> bool:
    """Whether it may be such a module: two and more matrices of its own, no layers inside, not of torch itself."""
    given = [parameter for parameter in module._parameters.values() if parameter is not None]
    own = [parameter for parameter in given if sum(size > 1 for size in parameter.shape) >= 2]
    plain = type(module).__module__.partition(".")[0] != "torch"
    return plain and len(own) >= 2 and all(layer_of(part) is None for part in module.modules())


def closed_groups(unit: nn.Module, call: Call, *, tp: int) -> tuple[list[Group], dict[str, str]]:
    """A group for every such module of `unit` that divides, and for the others why they do not."""
    copied = twin(unit)
    copied.train(False)
    watches = {
        name: _Watch({leaf: p for leaf, p in module._parameters.items() if p is not None}, tp)
        for name, module in copied.named_modules()
        if is_closed(module)
    }
    if not watches:
        return [], {}
    args, kwargs = call.fresh(seed=0)
    with _watched(copied, watches), Doubled(), torch.enable_grad():
        copied(*args, **kwargs)
    groups: list[Group] = []
    reasons: dict[str, str] = {}
    for name, watch in watches.items():
        try:
            groups.append(watch.group(name))
        except Refused as refused:
            reasons[name] = str(refused)
    return groups, reasons


@contextlib.contextmanager
def _watched(unit: nn.Module, watches: dict[str, _Watch]) -> Iterator[None]:
    modules = [(unit.get_submodule(name), watch) for name, watch in watches.items()]
    for module, watch in modules:
        module.__dict__["forward"] = _watching(module.forward, watch)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.__dict__["forward"]


def _watching(body: Callable[..., Any], watch: _Watch) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with watch:
            return body(*args, **kwargs)

    return forward


class _Watch(TorchFunctionMode):
    """Looks at the products inside one module, and at what their operands are made of."""

    def __init__(self, parameters: dict[str, nn.Parameter], tp: int) -> None:
        super().__init__()
        self._parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        self._tp = tp
        self._needs: Needs = {}  # of the inputs of second products
        self._cuts: Needs = {}  # of their weights
        self._widths: set[int] = set()
        self._looks: Counter[tuple[Callable[..., Any], tuple[int, ...]]] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for product, activation, weight, dim in _PRODUCTS:
            if func is product and len(args) > max(activation, weight):
                self._look(func, args, kwargs, activation, weight, dim)
        return func(*args, **kwargs)

    def _look(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any, activation: int, weight: int, dim: int
    ) -> None:
        x, w = args[activation], args[weight]
        if not (isinstance(x, torch.Tensor) and isinstance(w, torch.Tensor) and x.requires_grad and w.requires_grad):
            return
        if not x.numel() or self._looks[func, tuple(w.shape)] >= _MOST_LOOKS:  # more experts say the same
            return
        of_weight, of_x = self._made_of(w), self._made_of(x)
        if len(of_weight) != 1 or not any(self._parameters[name].dim() >= 2 for name in of_x) or of_weight & of_x:
            return
        self._widths.add(x.shape[dim])
        if x.shape[dim] % self._tp:
            return
        self._looks[func, tuple(w.shape)] += 1
        share = x.shape[dim] // self._tp
        for rank in range(self._tp):
            mask = torch.zeros_like(x)
            mask.narrow(dim % x.dim(), rank * share, share).fill_(1.0)
            self._note(self._needs, rank, self._gradients(x, mask * torch.randn_like(x)))
            given = [mask * torch.randn_like(x) if place == activation else arg for place, arg in enumerate(args)]
            out = func(*given, **kwargs)
            found = self._gradients(out, torch.randn_like(out))
            self._note(self._cuts, rank, {name: grad for name, grad in found.items() if name in of_weight})

    def _made_of(self, tensor: torch.Tensor) -> set[str]:
        return set(self._gradients(tensor, torch.ones_like(tensor)))

    def _gradients(self, tensor: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
        given = torch.autograd.grad(
            tensor, list(self._parameters.values()), cotangent, retain_graph=True, allow_unused=True
        )
        return {name: grad for name, grad in zip(self._parameters, given, strict=True) if grad is not None}

    def _note(self, into: Needs, rank: int, found: dict[str, torch.Tensor]) -> None:
        for name, gradient in found.items():
            into.setdefault(name, [[] for _ in range(self._tp)])[rank].append(gradient != 0)

    def group(self, name: str) -> Group:
        """What was seen, as a group. Raises `Refused`."""
        if not self._cuts:
            about = f"of widths {sorted(self._widths)} on {self._tp} ranks" if self._widths else "seen"
            raise Refused(f"no product of a product {about} inside")
        tensors: dict[str, Slice] = {}
        for seen in (self._needs, self._cuts):
            for leaf, masks in seen.items():
                part = slice_of_sets(tuple(self._parameters[leaf].shape), masks)
                if part is not None:
                    tensors[f"{name}.{leaf}" if name else leaf] = part
        if not all(any(f"{name}.{leaf}".lstrip(".") in tensors for leaf in seen) for seen in (self._needs, self._cuts)):
            raise Refused("no share of the second product is made from a share of the first")
        once = {leaf for leaf in self._parameters if leaf not in self._needs and leaf not in self._cuts}
        return Group(
            columns={},
            rows=(),
            closed=(name,),
            tensors=tensors,
            once=frozenset(f"{name}.{leaf}" if name else leaf for leaf in once),
        )
