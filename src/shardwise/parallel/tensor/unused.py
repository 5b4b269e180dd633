"""Parameters of a unit that its calls do not use: of branches that a batch does not take (cross-attention, say).

They get no gradient on one device either. Knows a unit, real and in float64, and its calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn as nn

from shardwise.parallel.tensor.extra_outputs import picked_up
from shardwise.parallel.tensor.instance import Call, Doubled, tensors_of, twin

__all__ = ["called_or_not", "unused"]

_SEEDS = 4  # other numbers, other routes to experts


def unused(unit: nn.Module, calls: Sequence[Call]) -> frozenset[str]:
    """Names of the parameters that nothing depends on of what `calls` give. `unit` is left as it is."""
    copied = twin(unit)
    parameters = {name: p for name, p in copied.named_parameters() if p.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    found = sorted(parameters)
    for seed in range(_SEEDS):
        for training, call in itertools.product((False,) if seed else (False, True), calls):
            copied.train(training)
            found = _unused(copied, call, parameters, found, seed) if found else []
    return frozenset(found)


def _unused(
    unit: nn.Module, call: Call, parameters: Mapping[str, nn.Parameter], names: list[str], seed: int
) -> list[str]:
    """Those of `names` that nothing depends on of what one call gives."""
    args, kwargs = call.fresh(seed=seed)
    with picked_up(unit, call.extras) as left, Doubled(), torch.enable_grad():
        out = tensors_of(unit(*args, **kwargs))
    read = [tensor for place, tensor in enumerate(out) if call.read is None or place in call.read]
    ends = [tensor.double().sum() for tensor in (*read, *left((args, kwargs)).values()) if tensor.requires_grad]
    if not ends or not names:
        return names
    given = torch.autograd.grad(ends, [parameters[name] for name in names], allow_unused=True)
    return [name for name, gradient in zip(names, given, strict=True) if gradient is None]


def called_or_not(reason: str, dead: Collection[str]) -> str:
    """A unit's reasons, "layer: why; layer: why", where the layers of `dead` weights say that they are not called."""
    parts = [(part, part.partition(": ")[0]) for part in reason.split("; ")]
    return "; ".join(
        f"{name}: not called with this batch" if f"{name}.weight" in dead else part for part, name in parts
    )
