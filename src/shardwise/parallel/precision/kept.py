"""Which modules of a model stay in float32 while the rest is in 16 bits, and so which parameters become narrow.

    kept, as a kind   "norms"    classes named ...Norm that hold vectors alone (LayerNorm, LlamaRMSNorm, BatchNorm2d)
                      "routers"  classes named ...Router..., and modules called `router` or `gate`
    kept, as a name   "lm_head", "layers.*.mlp"     with all that is in them

Knows modules by class and name; refuses to know layouts and what is done with the answer.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence

import torch
import torch.nn as nn

from shardwise.errors import ConfigError

__all__ = ["KINDS", "kept_modules", "narrow_names"]

KINDS = ("norms", "routers")
_ROUTER_NAMES = frozenset({"router", "gate"})
_NORM = re.compile(r"norm(?:[0-9]d)?(?![a-z])|norm$", re.IGNORECASE)


def kept_modules(model: nn.Module, keep: Sequence[str]) -> dict[str, nn.Module]:
    """The outermost modules that `keep` names, by name. Raises `ConfigError` where a name is that of no module."""
    modules = dict(model.named_modules())
    for pattern in keep:
        if pattern not in KINDS and not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise ConfigError(
                f"what is kept in float32 is {', '.join(KINDS)} or a module of the model, but it has no {pattern!r}; "
                f"its modules are called {', '.join(list(modules)[1:4])}, ..."
            )
    patterns = [pattern for pattern in keep if pattern not in KINDS]
    kept: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if not name or any(name.startswith(f"{outer}.") for outer in kept):
            continue
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        norm = "norms" in keep and _is_norm(module)
        if named or norm or ("routers" in keep and _is_router(name, module)):
            kept[name] = module
    return kept


def narrow_names(model: nn.Module, kept: Collection[nn.Module]) -> frozenset[str]:
    """The parameters that are computed with in 16 bits: all of a floating type but those in `kept` modules.

    Raises `ConfigError` for parameters that are in 16 bits already: nothing knows what was rounded off.
    """
    exempt = {id(parameter) for module in kept for parameter in module.parameters()}
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or id(parameter) in exempt:
            continue
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"masters are the model's own values in float32, but {name} is {parameter.dtype}; give the model in "
                'float32 (dtype = "float32" in [model]), or leave compute out'
            )
        names.add(name)
    return frozenset(names)


def _is_norm(module: nn.Module) -> bool:
    own = [parameter for parameter in module.parameters() if parameter is not None]
    return bool(_NORM.search(type(module).__name__)) and bool(own) and all(each.dim() <= 1 for each in own)


def _is_router(name: str, module: nn.Module) -> bool:
    has_own = any(parameter is not None for parameter in module._parameters.values())
    return has_own and ("Router" in type(module).__name__ or name.rpartition(".")[2] in _ROUTER_NAMES)
