"""The values that cross a stage's borders in one micro-batch: what came in, what must go out.

Knows tensors by the names of values, and their traced shapes; no order of nodes, no messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from shardwise.errors import DataflowError
from shardwise.execute.dealt import Dealt
from shardwise.execute.ledger import Ledger
from shardwise.execute.programme import Programme
from shardwise.trace.absent import Absent
from shardwise.trace.tape import Made, Record, Tape

__all__ = ["Crossings"]


class _Arrive(torch.autograd.Function):
    """Identity that is no view and no leaf: glue may write into a received value in place."""

    @staticmethod
    def forward(ctx: Any, received: torch.Tensor) -> torch.Tensor:
        alias = torch.empty(0, dtype=received.dtype, device=received.device)
        alias.set_(received.detach())  # type: ignore[call-overload]
        return alias

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _arrived(leaf: torch.Tensor) -> torch.Tensor:
    """The tensor that the glue sees for a received leaf."""
    return _Arrive.apply(leaf) if leaf.requires_grad else leaf  # type: ignore[no-untyped-call]


class Crossings:
    """`received` holds the leaves that came in (value -> tensor); `sent` what must go out, with the autograd graph."""

    def __init__(
        self,
        tape: Tape,
        table: Programme,
        received: Mapping[int, torch.Tensor],
        *,
        ledger: Ledger,
        dealt: Dealt | None = None,
    ) -> None:
        self._tape = tape
        self._table = table
        self._ledger = ledger
        self._dealt = dealt or Dealt(tape, None)
        self.sent: dict[int, torch.Tensor] = {}
        self.received = {
            value: self._dealt.arrived(value, _arrived(leaf) if table.writes else leaf)
            for value, leaf in received.items()
        }

    def value(self, value: int) -> torch.Tensor:
        """What arrived, or what stands in for it where nobody here needs its numbers."""
        tensor = self.received.get(value)
        if tensor is None:
            return self._tape.stand_ins[value]
        if self._ledger.checked:
            self._ledger.note(value, tensor)
        return tensor

    def made(self, index: int, record: Record, out: Any) -> None:
        """Keep what is sent, note identities when checked."""
        leaves = [out] if isinstance(out, torch.Tensor) else tree_flatten(out)[0]
        sends = self._table.sends[index]
        for place, leaf in enumerate(leaves):
            answer = record.answer.leaves[place] if place < len(record.answer.leaves) else None
            if not isinstance(answer, Made) or not isinstance(leaf, torch.Tensor):
                continue
            if self._ledger.checked:
                self._ledger.note(answer.value, leaf)
            if answer.value in sends:
                self.send(answer.value, leaf, record)

    def send(self, value: int, tensor: torch.Tensor, record: Record) -> None:
        """Keep it as what goes out. Raises `DataflowError` where it is absent, or not of the traced shape."""
        if isinstance(tensor, Absent):
            raise DataflowError(
                f"{tensor.what} must be sent and is absent: an edge is missing in the recorded dataflow"
            )
        about = self._tape.flow.values[value]
        if tuple(tensor.shape) != about.shape or str(tensor.dtype) != f"torch.{about.dtype}":
            raise DataflowError(
                f"{self._tape.stand_ins[value].what} was traced as {about.dtype} {about.shape} and is now "
                f"{tensor.dtype} {tuple(tensor.shape)}: the signature does not determine its shape; name the enclosing "
                "module as a unit"
            )
        tensor = self._dealt.leaving(value, tensor)
        self.sent[value] = tensor.clone() if record.written_later else tensor
