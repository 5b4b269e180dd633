"""Experts divided among ranks of which one is here, on tensors without values: as if every expert were chosen as often.

What a rank sends, computes and gets back follows from numbers alone: nobody looks at what the router says. Knows the
forwards of divided experts and a group that counts; refuses to know how experts compute.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.expert import ExpertPlan, Stacked, runs_of_experts
from shardwise.describe.kernels import ExchangeKind
from shardwise.parallel.counted_group import Note
from shardwise.parallel.expert.dispatch import anchor, bring_back, send_to
from shardwise.parallel.expert.install import DividedExperts
from shardwise.parallel.forwards import Forward

__all__ = ["CountedExpertGroup", "EvenExperts", "rows_of_a_token"]


class CountedExpertGroup:
    """Rank `rank` of `size` that divide experts. The others send what this one does, and get as much."""

    def __init__(self, note: Note, *, size: int, rank: int) -> None:
        self._note = note
        self._size = size
        self._rank = rank
        self.sent_bytes = 0

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def headers(self, own: torch.Tensor) -> torch.Tensor:
        """What every other rank sends here is what this one sends to itself."""
        return own[self._rank].expand(own.shape)

    def rows(self, own: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
        """(sum(received), width), of which nothing is known."""
        away = sum(sent) - sent[self._rank]
        self._note(ExchangeKind.ALL_TO_ALL, "ep", away * own.shape[1:].numel() * own.element_size(), False)
        return own.new_empty((sum(received), *own.shape[1:]))


class EvenExperts(DividedExperts):
    """The experts of `model`, divided in place as `plan` says, for a run without values."""

    def __init__(self, model: nn.Module, plan: ExpertPlan, group: CountedExpertGroup) -> None:
        stacked = {
            ".".join(name for name in (unit, each.module) if name): each
            for unit, experts in plan.units.items()
            for each in experts
            if isinstance(each, Stacked)
        }
        bodies = {layer: model.get_submodule(layer).forward for layer in stacked}
        super().__init__(model, plan, group)
        for layer, experts in stacked.items():
            module = model.get_submodule(layer)
            self._forwards.wrap(module, _even_forward(module, bodies[layer], experts, group))


def rows_of_a_token(num_experts: int, choices: int, size: int) -> float:
    """To how many of `size` ranks a token goes that chooses `choices` different experts, on average."""
    chosen = min(choices, num_experts)
    none = [
        math.comb(num_experts - (stop - start), chosen) / math.comb(num_experts, chosen)
        for start, stop in runs_of_experts(num_experts, size)
    ]
    return sum(1 - share for share in none)


def _even_forward(module: nn.Module, body: Forward, experts: Stacked, group: CountedExpertGroup) -> Forward:
    signature = inspect.signature(body)
    start, stop = runs_of_experts(experts.num_experts, group.size)[group.rank]

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)

        def compute(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            bound.arguments.update({experts.rows: rows, experts.index: index, experts.weights: weights})
            out: torch.Tensor = body(*bound.args, **bound.kwargs)
            return out

        rows, index, weights = (bound.arguments[name] for name in (experts.rows, experts.index, experts.weights))
        tokens, choices = index.shape
        to_each = math.ceil(tokens * rows_of_a_token(experts.num_experts, choices, group.size) / group.size)
        pairs = max(1, round(tokens * choices * group.size * (stop - start) / experts.num_experts))
        tie = anchor(rows, weights, *module.parameters())
        return _dispatched(compute, (rows, index, weights), tie, group, to_each, pairs)

    return forward


def _dispatched(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    tie: torch.Tensor,
    group: CountedExpertGroup,
    to_each: int,
    pairs: int,
) -> torch.Tensor:
    """As `stacked` does with rows that it has counted: so many to each rank, so many pairs of a row and an expert."""
    rows, index, weights = given
    counts = [to_each] * group.size
    with torch.no_grad():
        token = index.new_zeros(to_each * group.size, dtype=torch.int64)
        choice = index.new_zeros(token.shape[0], index.shape[1], dtype=torch.int32)
    (x, w, i), tie = send_to([rows[token], weights[token], choice], tie, group, counts, counts)
    row = column = i.new_zeros(pairs, dtype=torch.int64)
    y = compute(x[row], i[row, column].long()[:, None], w[row, column][:, None])
    summed = y.new_zeros(x.shape[0], y.shape[1]).index_add(0, row, y)
    back, _ = bring_back(summed, tie, group, counts, counts)
    return back.new_zeros(rows.shape[0], back.shape[1]).index_add(0, token, back)
