"""Four blocks of a decoder, forward and backward, by shardwise and by torch.distributed.pipelining. One micro-batch.

Both sides add to gradients that are there, as all but the first micro-batch of a step do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from shardwise.execute.backward import run_backward
from shardwise.execute.deferred import Deferred
from shardwise.execute.weight_sums import WeightSums

__all__ = ["PHASES", "SIDES", "Block", "Side", "blocks", "run"]

PHASES = ("forward", "input gradient", "weight gradient")
HEAD = 64


class Block(nn.Module):
    """Attention and a gated feed-forward layer, with norms ahead of them. (batch, tokens, hidden) -> the same."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        inner = hidden * 11 // 4
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.gate, self.up, self.down = nn.Linear(hidden, inner), nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, hidden = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(batch, tokens, 3, hidden // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, tokens, head)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, hidden))
        y = self.norms[1](x)
        out: torch.Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out


def blocks(num: int, hidden: int) -> nn.Sequential:
    """The same weights each time, and gradients to add to."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(hidden) for _ in range(num)))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


class Side(Protocol):
    """A way to run a backward."""

    def running(self) -> contextlib.AbstractContextManager[None]: ...

    def inputs(self, y: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The gradient of x."""
        ...

    def weights(self) -> None:
        """What `inputs` has left."""
        ...


class Ours:
    """Split, or whole with `whole`."""

    def __init__(self, model: nn.Sequential, *, whole: bool) -> None:
        self._sums, self._whole = WeightSums(), whole
        self._sums.install(model, [str(place) for place in range(len(model))], dict(model.named_parameters()))
        self._queue = Deferred()

    def running(self) -> contextlib.AbstractContextManager[None]:
        return self._sums.running(sums=True, splits=not self._whole)

    def inputs(self, y: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with self._sums.adding(True) if self._whole else self._sums.deferring(self._queue):
            run_backward([y], [dy])
        assert x.grad is not None
        return x.grad

    def weights(self) -> None:
        self._queue.run()


class Torchs:
    """torch.distributed.pipelining's, split, or whole with `whole`."""

    def __init__(self, model: nn.Sequential, *, whole: bool) -> None:
        self._model, self._whole = model, whole
        self._groups: list[dict[str, object]] = []

    def running(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def inputs(self, y: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self._whole:
            torch.autograd.backward([y], [dy])
        else:
            _, self._groups = stage_backward_input([y], [dy], [x], self._model.parameters())
        assert x.grad is not None
        return x.grad

    def weights(self) -> None:
        if not self._whole:
            stage_backward_weight(self._model.parameters(), self._groups)
        self._groups = []


def _of(kind: type[Ours] | type[Torchs], whole: bool) -> Callable[[nn.Sequential], Side]:
    return lambda model: kind(model, whole=whole)


SIDES: dict[str, Callable[[nn.Sequential], Side]] = {
    "shardwise whole": _of(Ours, True),
    "shardwise split": _of(Ours, False),
    "torch whole": _of(Torchs, True),
    "torch split": _of(Torchs, False),
}


def run(model: nn.Sequential, side: Side, x: torch.Tensor) -> Iterator[float]:
    """Processor seconds of each of PHASES, behind it; what a phase has not to keep is gone by then."""
    x = x.detach().requires_grad_()
    with side.running():
        start = time.process_time()
        y = model(x)
        dy = y.detach() * 1e-3
        yield time.process_time() - start
        start = time.process_time()
        side.inputs(y, dy, x)
        del y, dy, x
        yield time.process_time() - start
        start = time.process_time()
        side.weights()
        yield time.process_time() - start
