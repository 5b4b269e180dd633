"""Which integers of a module's attributes follow the division: numbers of heads, sizes of splits.

A rank's part is run once with attributes that remember where they came from (`Marked`): the function that fails, and
what it was given, shows which of them to divide. Assignments that get further are tried first. It proposes; whether an
assignment is right the proof says.

    view(batch, tokens, num_heads, head_dim) of half the elements fails ──► suspects: num_heads, head_dim
"""

from __future__ import annotations

import copy
import dataclasses
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from shardwise.describe.tensor import UnitPlan
from shardwise.parallel.tensor.install import shard_unit
from shardwise.parallel.tensor.instance import Call, Doubled
from shardwise.parallel.tensor.layers import layer_of

__all__ = ["Assignment", "Place", "assignments"]

Place = tuple[str, str]  # module, attribute (or path)
Assignment = Mapping[Place, int]
_MOST_RUNS = 80


class Marked(int):
    """An integer that knows which attributes it was computed from."""

    marks: frozenset[Place]

    def __new__(cls, value: int, marks: frozenset[Place]) -> Marked:
        made = super().__new__(cls, value)
        made.marks = marks
        return made

    def __reduce__(self) -> Any:
        return (Marked, (int(self), self.marks))


def _arithmetic(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Marked, *others: Any) -> Any:
        value = plain(self, *others)
        if type(value) is not int:
            return value
        marks = frozenset().union(self.marks, *(o.marks for o in others if isinstance(o, Marked)))
        return Marked(value, marks)

    return method


for _name in "add radd sub rsub mul rmul floordiv rfloordiv mod rmod neg".split():
    setattr(Marked, f"__{_name}__", _arithmetic(f"__{_name}__"))


class _Alone:
    """A group of which the other ranks are silent: sums are what this rank has."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


class _Watch(TorchFunctionMode):
    """Notes which marks each function is given, and gives it plain integers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.given: list[frozenset[Place]] = []  # of the calls that were given marks, in order
        self.failed: frozenset[Place] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        marks = frozenset().union(*(_marks(leaf) for leaf in tree_flatten((args, kwargs))[0]))
        if marks:
            self.given.append(marks)
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if self.failed is None:
                self.failed = marks
            raise


def _marks(leaf: object) -> frozenset[Place]:
    if isinstance(leaf, Marked):
        return leaf.marks
    if isinstance(leaf, slice):
        return frozenset().union(*(_marks(end) for end in (leaf.start, leaf.stop, leaf.step)))
    return frozenset()


@dataclasses.dataclass(frozen=True, slots=True)
class _Try:
    done: bool
    calls: int
    suspects: tuple[Place, ...]


def assignments(unit: nn.Module, call: Call, plan: UnitPlan, *, tp: int) -> Iterator[Assignment]:
    """Assignments with which rank 0 of the divided `unit` (in float64, real) runs through, likeliest first."""
    values = _integers(unit)
    queue: list[tuple[tuple[int, ...], int, dict[Place, int]]] = [((0,), 0, {})]
    known: set[frozenset[tuple[Place, int]]] = set()
    runs = 0
    while queue and runs < _MOST_RUNS:
        _, _, assigned = heapq.heappop(queue)
        runs += 1
        tried = _try(unit, call, plan, assigned, tp)
        if tried.done:
            yield assigned
        for order, place in enumerate(tried.suspects):
            for divisor in (tp, *(d for d in range(2, tp) if tp % d == 0)):
                if place in assigned or values[place] % divisor:
                    continue
                child = {**assigned, place: values[place] // divisor}
                key = frozenset(child.items())
                if key in known:
                    continue
                known.add(key)
                progress = 0 if tried.done else -tried.calls
                rank = (progress, len(child), _unlikely(place), order)
                heapq.heappush(queue, (rank, len(known), child))


def _unlikely(place: Place) -> int:
    """Numbers of heads before other numbers, sizes of one head last."""
    name = place[1].rpartition(".")[2]
    if "dim" in name or "size" in name:
        return 2 if "head" in name else 1
    return 0 if "head" in name or "group" in name else 1


def _try(unit: nn.Module, call: Call, plan: UnitPlan, assigned: Assignment, tp: int) -> _Try:
    divided = {place: (value,) * tp for place, value in assigned.items()}
    copied = copy.deepcopy(unit)
    _mark(copied, assigned)
    watch = _Watch()
    try:
        shard_unit(copied, dataclasses.replace(plan, attributes=_marked(divided)), _Alone(tp))
        args, kwargs = call.fresh(seed=0)
        with torch.no_grad(), Doubled(), watch:
            copied(*args, **kwargs)
    except Exception:  # whatever a model raises of sizes that do not fit
        recent = [watch.failed or frozenset(), *reversed(watch.given)][:8]
        return _Try(False, watch.calls, tuple(dict.fromkeys(place for marks in recent for place in sorted(marks))))
    seen = dict.fromkeys(place for marks in watch.given for place in sorted(marks))
    return _Try(True, watch.calls, tuple(seen))


def _marked(divided: Mapping[Place, tuple[int, ...]]) -> dict[Place, tuple[Any, ...]]:
    return {place: tuple(Marked(v, frozenset({place})) for v in values) for place, values in divided.items()}


def _integers(unit: nn.Module) -> dict[Place, int]:
    """Attributes of modules, and of the settings objects that they hold, that are integers."""
    found: dict[Place, int] = {}
    for name, module in unit.named_modules():
        if not _may_follow(module):
            continue
        for attribute, value in vars(module).items():
            if _is_integer(value):
                found[name, attribute] = value
            elif _is_settings(value):
                found.update({(name, f"{attribute}.{inner}"): v for inner, v in vars(value).items() if _is_integer(v)})
    return found


def _mark(unit: nn.Module, assigned: Assignment) -> None:
    """Every integer of `_integers` that is not assigned remembers its place."""
    places = _integers(unit)
    modules = dict(unit.named_modules())
    settings: dict[tuple[str, str], Any] = {}
    for place, value in places.items():
        name, (attribute, _, inner) = place[0], place[1].partition(".")
        marked = Marked(value, frozenset({place}))
        if not inner:
            modules[name].__dict__[attribute] = marked
            continue
        if (name, attribute) not in settings:
            settings[name, attribute] = copy.copy(modules[name].__dict__[attribute])
            modules[name].__dict__[attribute] = settings[name, attribute]
        vars(settings[name, attribute])[inner] = marked


def _may_follow(module: nn.Module) -> bool:
    if layer_of(module) is not None or isinstance(module, (nn.Embedding, nn.LayerNorm)):
        return False
    return type(module).__module__.partition(".")[0] != "torch" or isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.GroupNorm)
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


_PLAIN = (str, bytes, float, int, list, tuple, dict, set, frozenset, torch.Tensor, nn.Module, torch.dtype, torch.device)


def _is_settings(value: object) -> bool:
    if value is None or isinstance(value, _PLAIN) or callable(value):
        return False
    try:
        vars(value)
    except TypeError:
        return False
    return True
