"""The forward of a module whose parameters are stacked by expert: every token goes to the ranks of its experts.

token t, experts 0, 1, 6      ranks of experts 0-3 and 4-7      one row of t to each rank, not to each expert
rank 0: (t, 0) (t, 1)  ─experts' own forward, one choice a row─►  summed  ─┐
rank 1: (t, 6)         ─experts' own forward, one choice a row─►  summed  ─┴─►  added at home
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.expert import Stacked, runs_of_experts
from shardwise.errors import DataflowError
from shardwise.parallel.expert.dispatch import anchor, bring_back, send_to
from shardwise.parallel.expert.groups import ExpertGroup
from shardwise.parallel.expert.load import Loads

__all__ = ["stacked_forward"]

Forward = Callable[..., Any]


def stacked_forward(
    module: nn.Module, experts: Stacked, group: ExpertGroup, loads: Loads, *, layer: str, number: int
) -> Forward:
    """The forward of `module`, which holds this rank's experts, for tokens of all ranks.

    `layer` and `number` name it in errors and among the group's exchanges.
    """
    body = module.forward
    signature = inspect.signature(body)
    owners, locals_ = _where(experts.num_experts, group.size)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)

        def compute(rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            bound.arguments.update({experts.rows: rows, experts.index: index, experts.weights: weights})
            out: torch.Tensor = body(*bound.args, **bound.kwargs)
            return out

        rows, index, weights = (bound.arguments[name] for name in (experts.rows, experts.index, experts.weights))
        loads.add(layer, _counts(index, experts.num_experts))
        tie = anchor(rows, weights, *module.parameters())
        where = (owners.to(index.device), locals_.to(index.device))
        return _dispatched(compute, rows, index, weights, where, tie, group, layer, number)

    return forward


def _dispatched(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor],
    tie: torch.Tensor,
    group: ExpertGroup,
    layer: str,
    number: int,
) -> torch.Tensor:
    """rows (tokens, width), index and weights (tokens, choices) -> (tokens, width)."""
    owners, locals_ = where
    with torch.no_grad():
        nowhere = (index < 0) | (index >= len(owners))  # models mark choices that no expert gets so
        known = index.masked_fill(nowhere, 0)
        to = owners[known].masked_fill(nowhere, group.size)  # (tokens, choices)
        wanted = torch.zeros(rows.shape[0], group.size + 1, dtype=torch.bool, device=rows.device)
        wanted.scatter_(1, to, True)
        rank_of, token = wanted[:, : group.size].t().nonzero(as_tuple=True)  # by rank, then by token
        choice = locals_[known[token]].masked_fill(to[token] != rank_of[:, None], -1).to(torch.int32)
        sent = wanted[:, : group.size].sum(0).tolist()
        received = _received(sent, rows, group, layer, number)
    (x, w, i), tie = send_to([rows[token], weights[token], choice], tie, group, sent, received)
    row, column = (i >= 0).nonzero(as_tuple=True)  # one for each pair of a row and an expert of this rank
    if row.numel():
        y = compute(x[row], i[row, column].long()[:, None], w[row, column][:, None])
        summed = y.new_zeros(x.shape[0], y.shape[1]).index_add(0, row, y)
    else:  # gradients of the experts are zeros then, not missing
        y = compute(rows.new_ones(1, rows.shape[1]), index.new_zeros(1, 1), weights.new_zeros(1, 1))
        summed = y[:0]
    back, _ = bring_back(summed, tie, group, received, sent)
    return back.new_zeros(rows.shape[0], back.shape[1]).index_add(0, token, back)


def _where(num_experts: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(experts) each: the rank of an expert, and its number there."""
    runs = runs_of_experts(num_experts, size)
    owners = [rank for rank, (start, stop) in enumerate(runs) for _ in range(start, stop)]
    numbers = [expert - start for start, stop in runs for expert in range(start, stop)]
    return torch.tensor(owners), torch.tensor(numbers)


def _counts(index: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(experts + 1): the choices of each expert, and of none."""
    flat = index.detach().reshape(-1)
    nowhere = (flat < 0) | (flat >= num_experts)
    return torch.bincount(flat.masked_fill(nowhere, num_experts), minlength=num_experts + 1)


def _received(sent: list[int], rows: torch.Tensor, group: ExpertGroup, layer: str, number: int) -> list[int]:
    """How many rows every rank sends here; that all are at the same layer is checked."""
    width = rows.shape[1]
    own = torch.tensor([[count, number, width] for count in sent], dtype=torch.int64, device=rows.device)
    told = group.headers(own).tolist()
    if any(theirs[1:] != [number, width] for theirs in told):
        raise DataflowError(
            f"ranks that divide experts call them in one order, but this one is at {layer} (number {number}, {width} "
            f"wide) and others at numbers {sorted({theirs[1] for theirs in told})}; a layer that some micro-batches "
            "leave out (LayerDrop) cannot have its experts divided: use ep=1"
        )
    return [theirs[0] for theirs in told]
