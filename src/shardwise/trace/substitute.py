"""Tensors replaced inside the arguments of a call, while lists and dictionaries stay the objects they are.

Who is given a list may append to it, and its owner must see that; so containers are changed in place, and what was
replaced can be put back. Knows structures, nothing of what the tensors mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Undo", "put_back", "substitute"]

Undo = list[tuple[Any, Any, object, object]]  # (container, key, what was there, what is there now)


def substitute(tree: Any, swap: Callable[[torch.Tensor], torch.Tensor], undo: Undo) -> Any:
    """`tree` with every tensor t as `swap(t)`. Changes of lists and dictionaries are noted in `undo`."""
    if isinstance(tree, torch.Tensor):
        return swap(tree)
    if isinstance(tree, (list, dict)):
        for key, old in list(enumerate(tree) if isinstance(tree, list) else tree.items()):
            new = substitute(old, swap, undo)
            if new is not old:
                tree[key] = new
                undo.append((tree, key, old, new))
        return tree
    if type(tree) is tuple:
        parts = tuple(substitute(part, swap, undo) for part in tree)
        return parts if any(a is not b for a, b in zip(parts, tree, strict=True)) else tree
    leaves, spec = tree_flatten(tree)
    if len(leaves) == 1 and leaves[0] is tree:
        return tree
    swapped = [swap(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return tree_unflatten(swapped, spec) if any(a is not b for a, b in zip(swapped, leaves, strict=True)) else tree


def put_back(undo: Undo) -> None:
    """Undo what `substitute` changed, where nobody has written over it since."""
    while undo:
        container, key, old, new = undo.pop()
        with contextlib.suppress(LookupError):
            if container[key] is new:
                container[key] = old
