"""Ulysses attention equals attention of the whole sequence, however heads and ranks divide each other."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from parallel.context.attention_cases import Case, assert_close, joined, on_one_rank
from shardwise.errors import ModelError
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.ulysses import heads_of, ulysses_attention
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

# sums in another order, relative to the norm of the whole
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

CASES = [
    Case(zigzag=False),
    Case(is_causal=True),
    Case(is_causal=True, zigzag=False),
    Case(heads=3, kv_heads=3, is_causal=True),  # heads that ranks do not divide
    Case(heads=2, kv_heads=1, is_causal=True, zigzag=False),  # ranks without a head
    Case(heads=6, kv_heads=2),  # key heads that several ranks read, some with others
    Case(heads=6, kv_heads=3, mask="bias"),
    Case(heads=8, kv_heads=2, is_causal=True, size=16),
    Case(size=3),  # ranks without a token
    Case(value_dim=5, scale=0.3, is_causal=True),
    Case(mask="boolean"),
    Case(mask="padding", zigzag=False),
    Case(mask="padded from the left"),
    Case(mask="the same, lowest", value_dim=5),
    Case(mask="-inf"),
    Case(mask="window"),
    Case(mask="bias", zigzag=False),
    Case(mask="bias of samples"),
    Case(mask="bias of keys"),
    Case(keys=7),
    Case(keys=29, mask="padding", zigzag=False),
    Case(keys=7, whole_keys=True, heads=6, kv_heads=2),
    Case(keys=29, is_causal=True),
]


def divided(case: Case, ranks: int, *, learns_mask: bool = False) -> list[torch.Tensor]:
    parts = on_threads(ranks, lambda group: on_one_rank(case, ulysses_attention, group, learns_mask=learns_mask))
    return joined(case, parts)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_give_what_one_device_gives(case: Case, ranks: int) -> None:
    assert_close(divided(case, ranks), case.expected(), tolerance=TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_they_do_in_float32(case: Case) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    assert_close(divided(case, 2), case.expected(), tolerance=TOLERANCES[torch.float32])


@pytest.mark.parametrize("mask", ["bias", "bias of samples", "bias of keys"])
def test_a_mask_that_is_learned_has_its_gradient(mask: str) -> None:
    case = Case(mask=mask, heads=6, kv_heads=2)
    got = divided(case, 4, learns_mask=True)
    assert_close(got, case.expected(learns_mask=True), tolerance=TOLERANCES[torch.float64])


def test_heads_are_dealt_out_evenly_or_nearly() -> None:
    assert [heads_of(6, 4, rank) for rank in range(4)] == [(0, 1), (1, 3), (3, 4), (4, 6)]
    assert [heads_of(8, 4, rank) for rank in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_masks_that_are_not_of_the_whole_are_refused() -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        q = torch.zeros(1, 2, 4, 4)
        mask = torch.ones(4, 4, dtype=torch.bool)
        return ulysses_attention(q, q, q, group=group, tokens=Placement(size=8, contexts=2), mask=mask)

    with pytest.raises(ModelError, match="given for all 8 queries"):
        on_threads(2, work)
