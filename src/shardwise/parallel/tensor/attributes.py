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
from shardwise.parallel.tensor.instance import Call, Doubled, twin
from shardwise.parallel.tensor.layers import layer_of
from shardwise.parallel.tensor.reshapes import misfit
from shardwise.parallel.tensor.silent import SilentGroup

__all__ = ["Fit", "Place", "Tries", "fits", "hindrance"]

Place = tuple[str, str]  # module, attribute (or path)
_MOST_RUNS = 80
_MOST_STILL = 24  # runs, one after another, of which none gets further than those before
_LONGEST = 120  # letters of a model's own error


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Attributes with the values of a rank, and the dims of reshapes in `module` that are divided."""

    attributes: Mapping[Place, int] = dataclasses.field(default_factory=dict)
    module: str = ""
    dims: tuple[int, ...] = ()

    def applied(self, plan: UnitPlan, tp: int) -> UnitPlan:
        """`plan` with this fit added to it."""
        attributes = {**plan.attributes, **{place: (value,) * tp for place, value in self.attributes.items()}}
        reshapes = {**plan.reshapes, **({self.module: self.dims} if self.dims else {})}
        return dataclasses.replace(plan, attributes=attributes, reshapes=reshapes)

    @property
    def _size(self) -> int:
        return len(self.attributes) + len(self.dims)

    @property
    def _key(self) -> tuple[frozenset[tuple[Place, int]], tuple[int, ...]]:
        return frozenset(self.attributes.items()), self.dims


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


@dataclasses.dataclass(frozen=True, slots=True)
class _Given:
    """What one function was given: the marks among its arguments, the shapes of its tensors."""

    marks: frozenset[Place]
    shapes: tuple[tuple[int, ...], ...]


class _Watch(TorchFunctionMode):
    """Notes which marks each function is given, and gives it plain integers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.given: list[_Given] = []  # the calls that were given marks, in order
        self.done = False
        self.failed: frozenset[Place] | None = None
        self.dims: tuple[int, ...] = ()  # that would make the reshape fit which failed
        self.error = ""  # of the first function that failed

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        leaves = tree_flatten((args, kwargs))[0]
        marks = frozenset().union(*(_marks(leaf) for leaf in leaves))
        if marks:
            shapes = tuple(tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
            self.given.append(_Given(marks, shapes))
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if self.failed is None:
                self.failed = marks
                self.error = " ".join(str(error).split())[:_LONGEST]
                self.dims = _dims(func, args)
            raise


def _dims(func: Callable[..., Any], args: tuple[Any, ...]) -> tuple[int, ...]:
    """Dims of a failed reshape that may be the divided one, likeliest first: heads before their sizes, widths last."""
    wrong = misfit(func, args)
    if wrong is None:
        return ()
    sizes, factor = wrong
    order = list(range(len(sizes)))
    order = [*order[-2:], *order[:-2]] if len(sizes) > 3 else [*order[-1:], *order[:-1]]
    return tuple(dim for dim in order if sizes[dim] % factor == 0)


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
    suspects: tuple[Place, ...]  # of a failure; else see `_touched`
    dims: tuple[int, ...]  # of the reshape that failed
    given: tuple[_Given, ...] = ()  # of one that ran through
    error: str = ""  # of one that did not


_Key = tuple[frozenset[tuple[Place, int]], tuple[int, ...]]


@dataclasses.dataclass(slots=True)
class Tries:
    """What was tried of one plan, for who searches in it again, and what the whole unit's functions are given."""

    known: dict[_Key, _Try] = dataclasses.field(default_factory=dict)
    whole: list[_Given] | None = None


def fits(
    unit: nn.Module, call: Call, plan: UnitPlan, *, module: str, tp: int, tries: Tries | None = None
) -> Iterator[Fit]:
    """Fits with which rank 0 of the divided `unit` (in float64, real) runs through, likeliest first.

    First attributes alone; then also the reshapes of `module`, which is around the layers that are divided. Nothing
    in `tries` is tried again, and what is tried is noted there.
    """
    tries = Tries() if tries is None else tries
    yield from _search(unit, call, plan, module, tp, tries, reshapes=False)
    yield from (fit for fit in _search(unit, call, plan, module, tp, tries, reshapes=True) if fit.dims)


def hindrance(unit: nn.Module, call: Call, plan: UnitPlan, *, tp: int, otherwise: str) -> str:
    """Which numbers, of those that the first failing functions were given, `tp` does not divide: "attention.num_heads
    = 7 cannot be divided by 2". Where none is odd, `otherwise`; where that is empty, what the first of them says: a
    view as heads of 32, say, where a share has 112 columns.
    """
    values, tried = _integers(unit), _try(unit, call, plan, Fit(), tp)
    odd = [place for place in tried.suspects if values[place] % tp and values[place] > 1]
    heads = [place for place in odd if "head" in place[1]] or odd
    told = [f"{'.'.join(part for part in place if part)} = {values[place]}" for place in heads[:2]]
    if told:
        return f"{' and '.join(told)} cannot be divided by {tp}"
    return otherwise or f"a share of it does not fit: {tried.error or 'no attributes and reshapes let it run'}"


def _search(
    unit: nn.Module, call: Call, plan: UnitPlan, module: str, tp: int, tries: Tries, *, reshapes: bool
) -> Iterator[Fit]:
    """Fits that get further before others; no more when none has got further for long."""
    values, sizes = _integers(unit), _uneven_sizes(plan)
    queue: list[tuple[tuple[int, ...], int, Fit]] = [((0,), 0, Fit(module=module))]
    known: set[_Key] = set()
    runs, furthest, since = 0, 0, 0
    while queue and runs < _MOST_RUNS and since < _MOST_STILL:
        _, _, fit = heapq.heappop(queue)
        runs += 1
        if fit._key not in tries.known:
            tries.known[fit._key] = _try(unit, call, plan, fit, tp)
        tried = tries.known[fit._key]
        since = 0 if tried.done or tried.calls > furthest else since + 1
        furthest = max(furthest, tried.calls)
        if tried.done:
            yield fit
            if tries.whole is None:
                tries.whole = _watched(unit, call).given
        suspects = _touched(tried.given, tries.whole or []) if tried.done else tried.suspects
        progress = 0 if tried.done else -tried.calls
        dims = tried.dims if reshapes else ()
        for unlikely, child in _children(fit, suspects, dims, values, sizes, tp):
            if child._key not in known:
                known.add(child._key)
                heapq.heappush(queue, ((progress, child._size, unlikely, len(known)), len(known), child))


def _children(
    fit: Fit,
    suspects: Sequence[Place],
    dims: Sequence[int],
    values: Mapping[Place, int],
    sizes: Mapping[int, Sequence[int]],
    tp: int,
) -> Iterator[tuple[int, Fit]]:
    for place in suspects:
        if place in fit.attributes:
            continue
        whole = values[place]
        divided = [whole // d for d in (tp, *(d for d in range(2, tp) if tp % d == 0)) if whole % d == 0]
        for value in dict.fromkeys((*sizes.get(whole, ()), *divided)):
            yield _unlikely(place), dataclasses.replace(fit, attributes={**fit.attributes, place: value})
    for dim in dims:
        yield 1, dataclasses.replace(fit, dims=(*fit.dims, dim))


def _uneven_sizes(plan: UnitPlan) -> dict[int, list[int]]:
    """Size of a divided tensor -> what every rank has of it, where some of it is on several ranks: [x | B | C]."""
    found: dict[int, list[int]] = {}
    for part in plan.slices.values():
        local = {part.local_size(rank) for rank in range(part.num_ranks)}
        if part.shared and len(local) == 1:
            found.setdefault(part.size, []).append(local.pop())
    return found


def _unlikely(place: Place) -> int:
    """Numbers of heads before other numbers, sizes of one head last."""
    name = place[1].rpartition(".")[2]
    if "dim" in name or "size" in name:
        return 2 if "head" in name else 1
    return 0 if "head" in name or "group" in name else 1


def _try(unit: nn.Module, call: Call, plan: UnitPlan, fit: Fit, tp: int) -> _Try:
    applied = fit.applied(plan, tp)
    marked = dataclasses.replace(applied, attributes=_marked(applied.attributes))
    watch = _watched(unit, call, lambda copied: shard_unit(copied, marked, SilentGroup(tp)))
    if watch.done:
        return _Try(True, watch.calls, (), (), tuple(watch.given))
    recent = [watch.failed or frozenset(), *(given.marks for given in reversed(watch.given))][:8]
    suspects = tuple(dict.fromkeys(place for marks in recent for place in sorted(marks)))
    return _Try(False, watch.calls, suspects, watch.dims, error=watch.error)


def _watched(unit: nn.Module, call: Call, divide: Callable[[nn.Module], object] = lambda copied: None) -> _Watch:
    """One run of a marked copy of `unit`."""
    copied, watch = twin(unit), _Watch()
    _mark(copied)
    try:
        divide(copied)
        args, kwargs = call.fresh(seed=0)
        with torch.no_grad(), Doubled(), watch:
            copied(*args, **kwargs)
        watch.done = True
    except Exception:  # whatever a model raises of sizes that do not fit
        watch.done = False
    return watch


def _touched(given: Sequence[_Given], whole: Sequence[_Given]) -> list[Place]:
    """Attributes that stand beside a divided tensor, or beside none, in a function's arguments.

    All that were seen where the functions are not those of the whole unit.
    """
    alike = len(given) == len(whole) and all(a.marks == b.marks for a, b in zip(given, whole, strict=True))
    near = [a for a, b in zip(given, whole, strict=True) if a.shapes != b.shapes or not a.shapes] if alike else given
    return list(dict.fromkeys(place for seen in near for place in sorted(seen.marks)))


def _marked(divided: Mapping[Place, tuple[Any, ...]]) -> dict[Place, tuple[Any, ...]]:
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


def _mark(unit: nn.Module) -> None:
    """Every integer of `_integers` remembers its place."""
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
