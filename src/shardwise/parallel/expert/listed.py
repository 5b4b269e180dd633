"""The forwards of experts that are modules in a list: rows of all ranks meet where the expert is.

rank 0  calls  e0(x)  e1(x)         e3(x)          what a rank leaves out it joins with no rows, so that all ranks
rank 1  calls         e1(x)  e2(x)                 exchange e0, e1, e2, e3 in this order, and backward in reverse
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from shardwise.describe.expert import Listed, runs_of_experts
from shardwise.errors import DataflowError, ModelError
from shardwise.parallel.expert.dispatch import after, anchor, bring_back, send_to
from shardwise.parallel.expert.groups import ExpertGroup
from shardwise.parallel.expert.load import Loads

__all__ = ["ListedExperts"]

Forward = Callable[..., Any]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ListedExperts:
    """The experts of one list, of which this rank holds some, for rows of all ranks."""

    def __init__(
        self,
        members: Sequence[nn.Module],
        experts: Listed,
        group: ExpertGroup,
        loads: Loads,
        *,
        layer: str,
        number: int,
    ) -> None:
        runs = runs_of_experts(experts.num_experts, group.size)
        self._owners = [rank for rank, (start, stop) in enumerate(runs) for _ in range(start, stop)]
        self._members = members
        self._bodies = [member.forward for member in members]
        self._group = group
        self._loads = loads
        self._layer = layer
        self._number = number
        self._next: int | None = None  # the first expert of this call that has not been exchanged
        self._tie = torch.empty(0)
        self._counts: list[int] = []
        self._width = 0  # of rows

    def caller(self, body: Forward) -> Forward:
        """`body`, the forward of the module that calls the experts: at its end all of them have been exchanged."""

        @functools.wraps(body)
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
            trained = [parameter for member in self._members for parameter in member.parameters()]
            self._next, self._counts = 0, []
            self._tie = anchor(*given, *trained)
            try:
                out = body(*args, **kwargs)
                self._leave_out(len(self._members))
            finally:
                self._next = None
            self._loads.add(self._layer, torch.tensor([*self._counts, self._num_dropped(given)]))
            return self._ended(out)

        return forward

    def member(self, expert: int) -> Forward:
        """The forward of an expert: one tensor of rows (..., width)."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._next is None or expert < self._next:
                raise ModelError(
                    f"experts that are divided are called in their order, once in a call of {self._layer}: expert "
                    f"{expert} is called {'outside of it' if self._next is None else f'behind {self._next - 1}'}; "
                    "use ep=1"
                )
            self._leave_out(expert)
            rows = self._exchanged(expert, x.reshape(-1, x.shape[-1]))
            assert rows is not None
            return rows.view(*x.shape[:-1], rows.shape[-1])

        return forward

    def _leave_out(self, until: int) -> None:
        assert self._next is not None
        while self._next < until:
            self._exchanged(self._next, None)

    def _exchanged(self, expert: int, x: torch.Tensor | None) -> torch.Tensor | None:
        """Rows (n, width) to the rank of the expert and back; None where this rank does not call it."""
        self._next = expert + 1
        self._counts.append(0 if x is None else x.shape[0])
        owner, group = self._owners[expert], self._group
        told = self._headers(expert, x)
        callers = [each for each in told if each[1]]
        if not callers:
            return None
        self._width = width = callers[0][3]
        dtype = _DTYPES[callers[0][4]]
        own = torch.empty(0, width, dtype=dtype, device=self._tie.device) if x is None else x
        sent = [len(own) if rank == owner else 0 for rank in range(group.size)]
        received = [each[0] if group.rank == owner else 0 for each in told]
        (arrived,), tie = send_to([own], self._tie, group, sent, received)
        y = self._bodies[expert](arrived) if group.rank == owner else arrived
        if y.dtype != dtype or y.shape != arrived.shape:
            raise ModelError(
                f"experts that are divided return rows like those they are given, but expert {expert} of {self._layer} "
                f"makes {tuple(y.shape)} {y.dtype} of {tuple(arrived.shape)} {dtype}; use ep=1"
            )
        back, self._tie = bring_back(y, tie, group, received, sent)
        return None if x is None else back

    def _headers(self, expert: int, x: torch.Tensor | None) -> list[list[int]]:
        """Of every rank: rows, whether it calls the expert, which expert of which list, width, dtype."""
        place = self._number * 2**20 + expert
        own = [0, 0, place, 0, 0] if x is None else [x.shape[0], 1, place, x.shape[1], _DTYPES.index(x.dtype)]
        device = self._tie.device
        told: list[list[int]] = self._group.headers(torch.tensor([own] * self._group.size, device=device)).tolist()
        if any(each[2] != place for each in told):
            raise DataflowError(
                f"ranks that divide experts call them in one order, but this one is at expert {expert} of "
                f"{self._layer} and others elsewhere; a layer that some micro-batches leave out (LayerDrop) cannot "
                "have its experts divided: use ep=1"
            )
        return told

    def _num_dropped(self, given: Sequence[torch.Tensor]) -> int:
        """Tokens that no expert takes, at least: fewer rows than tokens (all of them where a token has one choice)."""
        tokens = (t.shape[:-1].numel() for t in given if t.is_floating_point() and t.shape[-1:] == (self._width,))
        return max(0, next(tokens, 0) - sum(self._counts))

    def _ended(self, out: Any) -> Any:
        """What the caller returns, whose backward begins those of all exchanges."""
        if not self._tie.requires_grad:
            return out
        leaves, spec = tree_flatten(out)
        for place, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaves[place] = after(leaf, self._tie)
                return tree_unflatten(leaves, spec)
        raise ModelError(f"a module that calls experts returns a tensor, but {self._layer} returns none; use ep=1")
