"""The forward of a module whose parameters are stacked by expert, for rows that stand in the order of their experts.

rows of rank 0   e0 e0 │ e1 │ e2 e2 e2 │ e3        ranks of experts 0-1 and 2-3; each is sent two runs, by its experts,
rows of rank 1   e0 │ e1 e1 │ e2 │ e3 e3           and sorts what came of all ranks by expert: e0 e0 e0 │ e1 e1 e1
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.expert import Ordered, runs_of_experts
from shardwise.errors import DataflowError
from shardwise.parallel.expert.dispatch import after, anchor, bring_back, send_to
from shardwise.parallel.expert.groups import ExpertGroup
from shardwise.parallel.expert.load import Loads

__all__ = ["ordered_forward"]

Forward = Callable[..., Any]


def ordered_forward(
    module: nn.Module, experts: Ordered, group: ExpertGroup, loads: Loads, *, layer: str, number: int
) -> Forward:
    """The forward of `module`, which holds this rank's experts, for rows of all ranks.

    `layer` and `number` name it in errors and among the group's exchanges.
    """
    body = module.forward
    signature = inspect.signature(body)
    runs = runs_of_experts(experts.num_experts, group.size)

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        bound = signature.bind(*args, **kwargs)

        def compute(rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
            bound.arguments.update({experts.rows: rows} | ({experts.counts: list(counts)} if experts.counts else {}))
            out: torch.Tensor = body(*bound.args, **bound.kwargs)
            return out

        rows = bound.arguments[experts.rows]
        even = [rows.shape[0] // experts.num_experts] * experts.num_experts
        counts = list(bound.arguments[experts.counts]) if experts.counts else even
        loads.add(layer, torch.tensor([*counts, 0]))
        tie = anchor(rows, *module.parameters())
        given = [counts[start:stop] for start, stop in runs]  # of this rank's rows, by rank of their experts
        told = _told(given, rows, group, layer, number)
        sent, received = [sum(each) for each in given], [sum(each) for each in told]
        (arrived,), tie = send_to([rows], tie, group, sent, received)
        y = _computed(compute, arrived, told)
        back, tie = bring_back(y, tie, group, received, sent)
        return after(back, tie)

    return forward


def _computed(
    compute: Callable[[torch.Tensor, Sequence[int]], torch.Tensor], rows: torch.Tensor, told: Sequence[Sequence[int]]
) -> torch.Tensor:
    """`rows` (rows, width) by rank and then by expert, so many of each as told -> what comes of them, in that order."""
    if not rows.shape[0]:  # gradients of the experts are zeros then, not missing
        return compute(rows.new_ones(len(told[0]), rows.shape[1]), [1] * len(told[0]))[:0]
    expert = torch.tensor([expert for counts in told for expert, count in enumerate(counts) for _ in range(count)])
    order = expert.argsort(stable=True).to(rows.device)
    y = compute(rows[order], [sum(counts) for counts in zip(*told, strict=True)])
    return y[order.argsort()]


def _told(
    given: Sequence[Sequence[int]], rows: torch.Tensor, group: ExpertGroup, layer: str, number: int
) -> list[list[int]]:
    """Of every rank, how many rows it sends to each expert of this one; that all are at the same layer is checked."""
    width, longest = rows.shape[1], max(map(len, given))
    own = [[number, width, *counts, *itertools.repeat(0, longest - len(counts))] for counts in given]
    told = group.headers(torch.tensor(own, dtype=torch.int64, device=rows.device)).tolist()
    if any(theirs[:2] != [number, width] for theirs in told):
        raise DataflowError(
            f"ranks that divide experts call them in one order, but this one is at {layer} (number {number}, {width} "
            f"wide) and others at numbers {sorted({theirs[0] for theirs in told})}; a layer that some micro-batches "
            "leave out (LayerDrop) cannot have its experts divided: use ep=1"
        )
    return [theirs[2 : 2 + len(given[group.rank])] for theirs in told]
