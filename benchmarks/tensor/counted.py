"""Counts what goes into the collectives of torch.distributed: bytes that a rank hands over, and calls.

Sees both families of operators, c10d's and the functional ones of DTensor, in forward and backward alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Counted"]

_FAMILIES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_MOVES = ("all", "_all", "reduce", "_reduce", "gather", "scatter", "broadcast", "send", "recv")  # beginnings of names


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block, `nbytes` and `calls` grow; what went over the world's own group is counted apart, too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nbytes = 0
        self.world_nbytes = 0
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local operations come by once more
        if func.namespace in _FAMILIES and func._schema.name.partition("::")[2].startswith(_MOVES):
            names = [argument.name for argument in func._schema.arguments]
            self._count(args[next((at for at, name in enumerate(names) if name.startswith("input")), 0)], args)
        body: Callable[..., Any] = func
        return body(*args, **(kwargs or {}))

    def _count(self, given: Any, args: tuple[Any, ...]) -> None:
        nbytes = sum(leaf.nbytes for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor))
        self.calls += 1
        self.nbytes += nbytes
        if dist.group.WORLD is not None and dist.group.WORLD.group_name in [_name(arg) for arg in args]:
            self.world_nbytes += nbytes


def _name(argument: object) -> str | None:
    """The name of a process group, if `argument` is one or names one."""
    if isinstance(argument, str):
        return argument
    if isinstance(argument, torch.ScriptObject) and argument._type().name() == "ProcessGroup":  # type: ignore[attr-defined]
        return str(dist.ProcessGroup.unbox(argument).group_name)
    return None
