"""Which modules are units: placed whole on a stage. Knows the module tree only; refuses to know the forward.

Repeated blocks (elements of a ModuleList and the like) stay whole; containers and whatever holds most of the model
are opened; modules without parameters are glue.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch.nn as nn

from shardwise.errors import ModelError

__all__ = ["choose_units"]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def choose_units(
    model: nn.Module, *, named: Sequence[str] = (), whole: Collection[str] = (), largest_share: float = 0.3
) -> dict[str, nn.Module]:
    """Name -> module of every unit, in the order of the module tree; no unit contains another.

    `named` are the user's units: they and everything outside them that has parameters; `whole` are modules that must
    not be opened. A module outside repeated blocks is opened while it holds more than `largest_share` of the
    parameters. Raises `ModelError` for a name that the model does not have.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in (*named, *whole):
        if name not in modules:
            close = [known for known in modules if known.endswith(name.rsplit(".", 1)[-1])][:5]
            raise ModelError(
                f"units are named as in model.named_modules(): there is no {name!r}; did you mean {close}?"
            )
    total = _count(model) or 1
    units: dict[str, nn.Module] = {}
    taken: set[nn.Module] = set()
    closed = {*named, *whole}

    def visit(name: str, module: nn.Module, is_block: bool) -> None:
        if module in taken or _count(module) == 0:
            return
        if name and (name in closed or not _opens(name, module, is_block)):
            taken.add(module)
            units[name] = module
            return
        own = list(module.parameters(recurse=False))
        if name and own and not isinstance(module, _CONTAINERS) and not list(module.children()):
            taken.add(module)
            units[name] = module
            return
        inside_list = isinstance(module, _CONTAINERS)
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, inside_list)

    def _opens(name: str, module: nn.Module, is_block: bool) -> bool:
        if not any(_count(child) for child in module.children()):
            return False
        if any(other.startswith(name + ".") for other in closed):
            return True
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            return True
        share = _count(module) / total
        if is_block:
            return share > largest_share and _has_blocks(module)
        return _has_blocks(module) or share > largest_share

    visit("", model, False)
    if not units and _count(model):
        units = {name: child for name, child in model.named_children() if _count(child)}
    return units


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _has_blocks(module: nn.Module) -> bool:
    """Whether somewhere below stands a list of at least two modules of one class with children of their own."""
    for child in module.modules():
        if isinstance(child, _CONTAINERS):
            kinds = [type(element) for element in child.children() if any(True for _ in element.children())]
            if any(kinds.count(kind) >= 2 for kind in set(kinds)) or (
                isinstance(child, nn.ModuleList) and len(kinds) >= 1 and child is not module
            ):
                return True
    return False
