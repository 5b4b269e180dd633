"""A unit or a kernel that looks at its own values (a router, say), run once on random real numbers for its shapes.

Knows one call: real twins of its arguments and parameters go in, fake twins of what it made come out, also in the
lists and dictionaries among its arguments. Refuses to know dataflows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

from shardwise.trace.extras import containers_of
from shardwise.trace.substitute import Undo, put_back, substitute

__all__ = ["Twins", "real_parameters"]


class Twins:
    """Real random tensors for fake ones, and fake ones for what a real run made. `bear` is told of the latter."""

    def __init__(self, fake: FakeTensorMode, bear: Callable[[torch.Tensor], None]) -> None:
        self._fake = fake
        self._bear = bear
        self._fakes: dict[int, torch.Tensor] = {}  # id(real) -> fake
        self._reals: dict[int, torch.Tensor] = {}  # id(fake) -> real
        self._keep: list[torch.Tensor] = []

    def real(self, leaf: torch.Tensor) -> torch.Tensor:
        """The real twin of a fake tensor; other tensors are what they are."""
        if not isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self._reals:
            made = random_like(leaf, seed=len(self._keep)).requires_grad_(leaf.requires_grad)
            made = made * 1 if leaf.requires_grad else made
            self._reals[id(leaf)], self._fakes[id(made)] = made, leaf
            self._keep.append(leaf)
        return self._reals[id(leaf)]

    def _given(self, leaf: torch.Tensor) -> torch.Tensor:
        self._fakes.setdefault(id(leaf), leaf)  # handed through, a real argument is what it was
        return self.real(leaf)

    def faked(self, leaf: object) -> object:
        """The fake twin of a real tensor; other leaves are what they are."""
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        if id(leaf) not in self._fakes:
            with self._fake:
                twin = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
            twin.requires_grad_(leaf.requires_grad)
            self._bear(twin)
            self._fakes[id(leaf)] = twin
            self._keep.append(leaf)
        return self._fakes[id(leaf)]

    def run(self, body: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """`body` on real twins, its answer as fake ones. Lists and dictionaries keep what it put into them, faked."""
        undo: Undo = []
        before = [(box, _elements(box)) for _, box in containers_of((args, kwargs))]
        try:
            real_args, real_kwargs = substitute((tuple(args), dict(kwargs)), self._given, undo)
            out = body(*real_args, **real_kwargs)
        finally:
            put_back(undo)
        for box, elements in before:
            for key, element in _elements(box).items():
                if elements.get(key) is not element:
                    box[key] = tree_map(self.faked, element)
        return tree_map(self.faked, out)


@contextlib.contextmanager
def real_parameters(module: nn.Module, names: dict[int, str]) -> Iterator[set[str]]:
    """The module with random real parameters where it has fake ones that `names` knows; yields their names."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    reals: dict[int, nn.Parameter] = {}
    known = set(names)
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or id(parameter) not in names:
                continue
            swapped.append((part, name, parameter))
            if id(parameter) not in reals:
                numbers = random_like(parameter, seed=len(reals))
                real = nn.Parameter(numbers, requires_grad=parameter.requires_grad)
                reals[id(parameter)] = real
                names[id(real)] = names[id(parameter)]
            part._parameters[name] = reals[id(parameter)]
    try:
        yield {names[id(parameter)] for _, _, parameter in swapped}
    finally:
        for part, name, parameter in swapped:
            part._parameters[name] = parameter
        for key in set(names) - known:
            del names[key]  # of tensors that are gone: the next one at that place is another


def random_like(tensor: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Small random numbers where `tensor` is real-valued, zeros elsewhere; torch's own generator is left alone."""
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.randn(tensor.shape, device=tensor.device, generator=generator).mul_(0.02).to(tensor.dtype)


def _elements(box: Any) -> dict[object, object]:
    return dict(enumerate(box)) if isinstance(box, list) else dict(box)
