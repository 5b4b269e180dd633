"""Recipes of tensors: the ops that made and wrote each storage, and the slice of them that one tensor needs.

Pure bookkeeping on numbers of storages and positions in a list. It runs nothing and knows no values; who
records is in `build_recorder.py`, who runs a slice is in `replay.py`. After the idea of torchdistx's deferred
initialisation.

    a = empty(3)         storage 0: -                 the slice of c: b = rand, c = b * 2
    b = rand(3)          storage 1: op 0, op 3        (op 3 came after c, a's storage is not read,
    c = b * 2            storage 2: op 1               and zero_ hides what was in a before)
    a.zero_()            storage 0: op 2, hides
    b.add_(c)
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shardwise.trace.keys import key_of

__all__ = ["Op", "Recipe", "View"]


@dataclass(frozen=True, slots=True)
class View:
    """Where a tensor looks: the number of its storage, and its geometry in elements."""

    storage: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    conjugate: bool
    negative: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One recorded call. `args` and `kwargs` hold a `View` where a tensor stood.

    `made[i]` is the view of the i-th tensor returned, None where it shows a storage that was there before.
    `hides` says that the op overwrites the one storage in `writes` without looking at it.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    reads: frozenset[int]  # storages of all tensors among the arguments
    writes: frozenset[int]
    made: tuple[View | None, ...]
    hides: bool
    random: bool
    generator_state: torch.Tensor | None = None  # of the generator that the user gave to the call

    @property
    def made_storages(self) -> frozenset[int]:
        return frozenset(view.storage for view in self.made if view is not None)


@dataclass
class Recipe:
    """All ops of a build, in order; the writers of each storage; the key of each random op.

    `num_bytes[s]` is the size of storage s; `constants[s]` its first content, where it was not computed.
    """

    ops: list[Op] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    constants: dict[int, torch.UntypedStorage] = field(default_factory=dict)
    keys: dict[int, int] = field(default_factory=dict)  # position in ops -> seed
    _writers: dict[int, list[int]] = field(default_factory=dict)

    def new_storage(self, num_bytes: int) -> int:
        self.num_bytes.append(num_bytes)
        return len(self.num_bytes) - 1

    def append(self, op: Op) -> None:
        for storage in op.writes | op.made_storages:
            self._writers.setdefault(storage, []).append(len(self.ops))
        self.ops.append(op)

    def slice_of(self, storage: int) -> list[int]:
        """Positions of the ops that the present content of `storage` depends on, in order."""
        wanted, found = [(storage, len(self.ops))], set[int]()
        seen = dict[int, int]()  # storage -> the latest moment whose content was asked for and followed back
        while wanted:
            storage, before = wanted.pop()
            if seen.get(storage, -1) >= before:
                continue
            seen[storage] = before
            writers = self._writers.get(storage, [])
            for position in reversed(writers[: bisect_left(writers, before)]):
                op = self.ops[position]
                if position not in found:
                    found.add(position)
                    wanted += [(read, position) for read in self._looked_at(op)]
                if op.hides or storage in op.made_storages:
                    break
        return sorted(found)

    def assign_keys(self, named: Mapping[str, int], seed: int) -> None:
        """Gives every random op that a name needs its key: (seed, name of its owner, number of the draw).

        The owner of a draw is the tensor that it is drawn into, or else the first named one that depends on
        it. So the key does not depend on which tensors are wanted later, and a copy of a weight equals the
        weight.
        """
        names: dict[int, str] = {}
        for name, storage in named.items():
            names.setdefault(storage, name)
        slices = {name: self._random_ops(storage) for name, storage in named.items()}
        counts = dict.fromkeys(named, 0)
        for into_own in (True, False):
            for name, storage in named.items():
                for position in slices[name]:
                    into = storage in self.ops[position].writes | self.ops[position].made_storages
                    if position in self.keys or (into_own and not (into and names[storage] == name)):
                        continue
                    self.keys[position] = key_of("init", seed, name, counts[name])
                    counts[name] += 1

    def assign_reading_keys(self, positions: Iterable[int], seed: int) -> None:
        """Keys for draws that the program looks at before they have a name: by their place in the program."""
        for position in positions:
            if self.ops[position].random:
                self.keys.setdefault(position, key_of("read", seed, position))

    def _random_ops(self, storage: int) -> list[int]:
        return [position for position in self.slice_of(storage) if self.ops[position].random]

    @staticmethod
    def _looked_at(op: Op) -> frozenset[int]:
        return op.reads - op.writes if op.hides else op.reads
