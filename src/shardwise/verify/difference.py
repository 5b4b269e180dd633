"""The first difference between a layout and one device, in words. Knows what both sides noted; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from shardwise.verify.comparison import Comparison, TensorError
from shardwise.verify.probe import Outputs
from shardwise.verify.sides import Side

__all__ = ["first_difference"]


def first_difference(reference: Side, sides: Sequence[Side], comparison: Comparison) -> str:
    """The first unit, in the order of the forward, whose output diverges; else the last whose gradients do."""
    outputs: Outputs = {}
    for side in sides:
        outputs.update(side.outputs)
    noted = sorted(reference.outputs.items())
    for unit, call in reference.calls:
        for (micro_batch, name, number), (summed, norm) in noted:
            if (name, number) != (unit, call) or (micro_batch, name, number) not in outputs:
                continue
            other_sum, other_norm = outputs[(micro_batch, name, number)]
            off = max(abs(other_norm - norm), abs(other_sum - summed) / 10) / max(norm, 1e-12)
            if not math.isfinite(off) or off > comparison.tolerance:
                where = f"unit {unit} (call {call}, micro-batch {micro_batch})"
                return f"the output of {where} diverges first, by {off:.1e}"
    return _of_gradients(reference, comparison)


def _of_gradients(reference: Side, comparison: Comparison) -> str:
    bad = [tensor for tensor in comparison.tensors if _worst(tensor) > comparison.tolerance]
    for unit, _ in reversed(reference.calls):
        inside = [tensor for tensor in bad if tensor.name.startswith(unit + ".")]
        if inside:
            return f"outputs are equal; backward, unit {unit} diverges first, at the gradient of {inside[0].name}"
    if bad:
        return f"outputs are equal; the gradient of {bad[0].name} diverges, which glue code reads"
    if comparison.micro_batch_error is not None and comparison.micro_batch_error > comparison.tolerance:
        return (
            "the layout equals the accumulated micro-batches, but these are not the whole batch in one forward: the "
            "loss weighs samples in a way that its weights do not say (give weight=), or samples influence each other "
            "(give couples=)"
        )
    return "the loss or the norm of the gradients diverges, no single tensor does"


def _worst(tensor: TensorError) -> float:
    return max(tensor.gradient, tensor.update)
