"""From what a run file says to wrappers: "bf16", "fp16", "int8", "powersgd:4", "topk:0.01", "none"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shardwise.comm.collective import Collective
from shardwise.comm.compress.int8 import Int8
from shardwise.comm.compress.lossy import Lossy
from shardwise.comm.compress.narrow import Narrow
from shardwise.comm.compress.powersgd import PowerSGD
from shardwise.comm.compress.topk import TopK
from shardwise.comm.compress.transport import CompressedTransport
from shardwise.comm.point_to_point import Transport
from shardwise.layout import Communication

__all__ = ["compressed_transport", "compressing"]

_NARROW = {"bf16": torch.bfloat16, "fp16": torch.float16}


def compressing(communication: Communication) -> Callable[[Collective, Sequence[Sequence[int]]], Lossy] | None:
    """What wraps a group for a flat tensor of tensors of some shapes; None where sums travel as they are."""
    name, number = communication.gradient_code
    if name == "none":
        return None

    def wrap(group: Collective, shapes: Sequence[Sequence[int]]) -> Lossy:
        if name in _NARROW:
            return Narrow(group, _NARROW[name])
        if name == "int8":
            return Int8(group)
        return PowerSGD(group, shapes, int(number)) if name == "powersgd" else TopK(group, number)

    return wrap


def compressed_transport(transport: Transport, communication: Communication) -> CompressedTransport | None:
    """What activations and their gradients pass through between stages; None where they travel as they are."""
    if communication.activations == "none":
        return None
    return CompressedTransport(transport, _NARROW.get(communication.activations))
