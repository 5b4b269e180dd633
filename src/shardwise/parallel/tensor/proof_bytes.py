"""How much memory the proof of a block takes, before it is begun. Knows kinds of units and numbers of ranks."""

from __future__ import annotations

from shardwise.parallel.tensor.calls import Kind

__all__ = ["bytes_to_prove"]

_COPIES = 8  # of a block's parameters: values, gradients and sums, whole and in parts, and what analysis keeps
_ACTIVATIONS = 64  # of each rank and of the whole: of the arguments' size


def bytes_to_prove(kind: Kind, tp: int) -> int:
    """An upper estimate of what finding and proving a kind of block takes, in float64."""
    parameters = sum(parameter.numel() for parameter in kind.module.parameters())
    given = sum(t.numel() for call in kind.calls for t in call.tensors if t.is_floating_point())
    return 8 * (max(_COPIES, tp + 3) * parameters + (tp + 1) * _ACTIVATIONS * given)
