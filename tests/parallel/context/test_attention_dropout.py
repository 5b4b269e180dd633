"""Dropout of attention weights is that of one device: drawn by one key for all, and each rank takes its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from parallel.context.attention_cases import Case, Divided, assert_close, joined, on_one_rank
from shardwise.errors import ModelError
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.context.ulysses import ulysses_attention
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads
from shardwise.trace.randomness import RandomMode, Scope

SCOPE = Scope(seed=3, step=1, micro_batch=0, samples=(7, 2), place="block", call=0)

CASES = [
    Case(dropout_p=0.3),
    Case(dropout_p=0.3, is_causal=True, kv_heads=2),
    Case(dropout_p=0.5, mask="padded from the left", zigzag=False),
    Case(dropout_p=0.3, mask="bias", keys=7),
    Case(dropout_p=1.0),
]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention], ids=["ring", "ulysses"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_drop_what_one_device_drops(case: Case, attention: Divided, ranks: int) -> None:
    def drawn(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        with RandomMode(SCOPE, first_index=2):
            return attention(*args, **kwargs)

    with RandomMode(SCOPE, first_index=2):
        expected = case.expected()
    got = joined(case, on_threads(ranks, lambda group: on_one_rank(case, drawn, group)))
    assert_close(got, expected, tolerance=1e-12)


def test_dropout_changes_the_answer() -> None:
    case = Case(dropout_p=0.3)
    with RandomMode(SCOPE):
        kept = case.expected()[0]
    assert not torch.allclose(kept, dataclasses.replace(case, dropout_p=0.0).expected()[0])


@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention], ids=["ring", "ulysses"])
def test_one_draw_is_one_draw_on_ranks_too(attention: Divided) -> None:
    def work(group: ThreadGroup) -> list[float]:
        q = torch.ones(2, 2, 4, 4)
        with RandomMode(SCOPE) as mode:
            attention(q, q, q, group=group, tokens=Placement(size=8, contexts=2), dropout_p=0.1)
            assert mode.index == 1
            return F.dropout(torch.ones(2, 8), 0.5).flatten().tolist()

    with RandomMode(SCOPE):
        whole = torch.ones(2, 2, 8, 4)
        F.scaled_dot_product_attention(whole, whole, whole, dropout_p=0.1)
        expected = F.dropout(torch.ones(2, 8), 0.5).flatten().tolist()
    assert on_threads(2, work) == [expected, expected]


def test_what_is_no_probability_is_refused() -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        q = torch.ones(2, 2, 4, 4)
        return ring_attention(q, q, q, group=group, tokens=Placement(size=8, contexts=2), dropout_p=1.5)

    with pytest.raises(ModelError, match="from 0 to 1"):
        on_threads(2, work)
