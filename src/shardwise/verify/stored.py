"""Tensors of one side of a verification in files, one each, so that neither side is ever held whole.

Written by the rank that owns them, read where they are compared: a tensor that is read is mapped, its pages come and
go with the file's. Knows safetensors and names; refuses to know what the tensors mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

__all__ = ["Merged", "StoredTensors"]

T = TypeVar("T")

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


class Merged(Mapping[str, T]):
    """Several mappings as one, each asked for what it has; of a name in two of them, the last."""

    def __init__(self, parts: Sequence[Mapping[str, T]]) -> None:
        self._part_of = {name: part for part in parts for name in part}

    def __getitem__(self, name: str) -> T:
        return self._part_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._part_of)

    def __len__(self) -> int:
        return len(self._part_of)
