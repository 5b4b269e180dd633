"""Tensors of one side of a verification in files, one each, so that neither side is ever held whole.

Written by the rank that owns them, read where they are compared: a tensor that is read is mapped, its pages come and
go with the file's. Knows safetensors and names; refuses to know what the tensors mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from shardwise.describe.expert import ExpertPlan
from shardwise.describe.tensor import Slice, TensorPlan
from shardwise.parallel.tensor.slices import paste

__all__ = ["Joined", "StoredTensors"]

_KEY = "tensor"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StoredTensors(Mapping[str, torch.Tensor]):
    """Name -> tensor, in a folder that exists. It travels between processes as its names alone."""

    folder: Path
    names: dict[str, None] = dataclasses.field(default_factory=dict)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor; a name has one."""
        save_file({_KEY: tensor.detach().cpu().contiguous()}, self._file(name))
        self.names[name] = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.names:
            raise KeyError(name)
        return load_file(self._file(name))[_KEY]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _file(self, name: str) -> Path:
        """Names may hold what a file's name may not, and be longer."""
        return self.folder / f"{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}.safetensors"


class Joined(Mapping[str, torch.Tensor | None]):
    """The tensors of several ranks as whole ones: `parts` are each rank's mapping, its shard, and the plan of shards;
    `experts`, of each rank, which of those that divide experts it is, and their plan."""

    def __init__(
        self,
        parts: Sequence[tuple[Mapping[str, torch.Tensor | None], int, TensorPlan | None]],
        experts: Sequence[tuple[int, ExpertPlan | None]] = (),
    ) -> None:
        self._parts_of: dict[str, list[tuple[Mapping[str, torch.Tensor | None], tuple[tuple[Slice, int], ...]]]] = {}
        of_ranks = experts or [(0, None)] * len(parts)
        for (tensors, shard, plan), (expert, of_experts) in zip(parts, of_ranks, strict=True):
            stacked = {} if of_experts is None else of_experts.slices()
            for name in tensors:
                slices = [(None if plan is None else plan.slice_of(name), shard), (stacked.get(name), expert)]
                cuts = tuple((part, rank) for part, rank in slices if part is not None)
                self._parts_of.setdefault(name, []).append((tensors, cuts))

    def __getitem__(self, name: str) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for tensors, cuts in self._parts_of[name]:
            mine = tensors[name]
            if not cuts:
                total = mine
            elif mine is not None:
                for part, rank in cuts:
                    mine = paste(mine, part, rank, owned=True)
                total = mine if total is None else total.add_(mine)
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts_of)

    def __len__(self) -> int:
        return len(self._parts_of)
