"""Linear layers that multiply in float8, by torchao, where the device has such products.

Weights stay 16-bit parameters with float32 masters; operands are scaled and rounded to 8 bits in each product, as
torchao's `convert_to_float8_training` does it ("tensorwise" scales). Needs a GPU of compute capability 8.9 or more and
torchao. Knows linear layers; refuses to know how units are divided: shards would need scales of their own.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.util import find_spec

import torch
import torch.nn as nn

from shardwise.errors import ConfigError

__all__ = ["MULTIPLE", "check_float8", "to_float8"]

MULTIPLE = 16  # what both sizes of a float8 product are a multiple of
_CAPABILITY = (8, 9)  # Ada Lovelace, Hopper and later


def check_float8(device: torch.device) -> None:
    """Raises `ConfigError` where the device has no float8 products, or torchao is not there to ask for them."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    has_torchao = find_spec("torchao") is not None
    if found is None or found < _CAPABILITY or not has_torchao:
        what = "is no GPU" if found is None else f"has capability {found[0]}.{found[1]}"
        raise ConfigError(
            f"float8 products need a GPU of compute capability 8.9 or more and the package torchao; {device} {what} "
            f'and torchao is {"" if has_torchao else "not "}installed; use compute = "bfloat16"'
        )


def to_float8(model: nn.Module, *, exempt: Collection[nn.Module] = ()) -> tuple[str, ...]:
    """Make linear layers of `model` multiply in float8, in place, but those in `exempt`; their names.

    Layers with a size that is no multiple of 16 stay as they are. Parameters stay the same objects.
    """
    from torchao.float8 import (  # type: ignore[import-not-found,unused-ignore]
        Float8LinearConfig,
        convert_to_float8_training,
    )

    left = {id(module) for outer in exempt for module in outer.modules()}
    changed: list[str] = []

    def wanted(module: nn.Module, name: str) -> bool:
        takes = _fits(module) and id(module) not in left
        if takes:
            changed.append(name)
        return takes

    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=config, module_filter_fn=wanted)
    return tuple(changed)


def _fits(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or not isinstance(module.weight, nn.Parameter):
        return False
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0
