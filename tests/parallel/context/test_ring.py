"""Ring attention equals attention of the whole sequence, output and gradients, on threads and on ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from parallel.context.attention_cases import Case, Divided, assert_close, joined, on_one_rank
from shardwise.errors import DataflowError, ModelError
from shardwise.parallel.context import ring
from shardwise.parallel.context.masks import Runs, cut_rows, visible_blocks
from shardwise.parallel.context.placement import Placement
from shardwise.parallel.context.ring import ring_attention
from shardwise.parallel.context.ulysses import ulysses_attention
from shardwise.parallel.tensor.threads import ThreadGroup, on_threads

# sums in another order, relative to the norm of the whole
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

CASES = [
    Case(),
    Case(is_causal=True),
    Case(is_causal=True, zigzag=False),
    Case(size=16, is_causal=True),
    Case(size=16, kv_heads=2, is_causal=True),
    Case(kv_heads=1),
    Case(size=5, is_causal=True),  # fewer tokens than chunks, from 3 ranks on
    Case(size=3, is_causal=True, zigzag=False),  # a rank of 4 has none
    Case(size=3),
    Case(size=1, is_causal=True),
    Case(value_dim=5, is_causal=True),  # written out
    Case(value_dim=5, kv_heads=2, mask="bias"),
    Case(scale=0.3, is_causal=True),
    Case(samples=1, heads=1, kv_heads=1, mask="boolean"),
    Case(mask="boolean"),
    Case(mask="padding"),
    Case(mask="padding", zigzag=False),
    Case(mask="padded from the left"),
    Case(mask="padded from the left", value_dim=5),
    Case(mask="the same, lowest"),
    Case(mask="the same, lowest", zigzag=False, kv_heads=2),
    Case(mask="-inf"),
    Case(mask="-inf", zigzag=False, value_dim=5),
    Case(mask="window"),
    Case(mask="window", size=24, zigzag=False),
    Case(mask="bias"),
    Case(mask="bias", kv_heads=2),
    Case(mask="bias of samples"),
    Case(mask="bias of keys"),
    Case(keys=7),
    Case(keys=29, mask="padding"),
    Case(keys=7, mask="bias", kv_heads=2),
    Case(keys=7, whole_keys=True),
    Case(keys=7, whole_keys=True, mask="padding"),
    Case(keys=29, is_causal=True),
    Case(keys=7, is_causal=True, zigzag=False),
    Case(keys=2, zigzag=False),
    Case(samples=0),
]


def divided(case: Case, ranks: int, *, learns_mask: bool = False) -> list[torch.Tensor]:
    parts = on_threads(ranks, lambda group: on_one_rank(case, ring_attention, group, learns_mask=learns_mask))
    return joined(case, parts)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranks_give_what_one_device_gives(case: Case, ranks: int) -> None:
    assert_close(divided(case, ranks), case.expected(), tolerance=TOLERANCES[case.dtype])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_they_do_in_float32(case: Case) -> None:
    case = dataclasses.replace(case, dtype=torch.float32)
    expected = [value.float() for value in case.expected()]
    assert_close(divided(case, 2), expected, tolerance=TOLERANCES[torch.float32])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mask", ["bias", "bias of samples", "bias of keys"])
@pytest.mark.parametrize("keys", [None, 7])
def test_a_mask_that_is_learned_has_its_gradient(mask: str, keys: int | None, ranks: int) -> None:
    case = Case(mask=mask, kv_heads=2, keys=keys)
    got = divided(case, ranks, learns_mask=True)
    assert_close(got, case.expected(learns_mask=True), tolerance=TOLERANCES[torch.float64])


@pytest.mark.parametrize("most", [1, 3, 5])
@pytest.mark.parametrize("queries", [((0, 3), (9, 12)), ((3, 9),), ((0, 12),)], ids=str)
@pytest.mark.parametrize("keys", [((0, 3), (9, 12)), ((3, 9),), ((0, 5),)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_of_fewer_rows_see_the_same(queries: Runs, keys: Runs, is_causal: bool, most: int) -> None:
    seen = torch.zeros(12, 12, dtype=torch.int64)
    for block in visible_blocks(queries, keys, is_causal=is_causal):
        for piece in cut_rows(block, most):
            (top, bottom), (left, right) = piece.rows, piece.columns
            assert bottom - top <= most
            ones = torch.ones(bottom - top, right - left, dtype=torch.int64)
            seen[top:bottom, left:right] += ones.tril() if piece.causal else ones
    rows, columns = (torch.cat([torch.arange(*run) for run in runs]) for runs in (queries, keys))
    expected = rows[:, None] >= columns if is_causal else torch.ones(len(rows), len(columns), dtype=torch.bool)
    assert torch.equal(seen[: len(rows), : len(columns)], expected.to(torch.int64))
    assert seen.sum() == expected.sum()


@pytest.mark.parametrize("case", [case for case in CASES if case.value_dim == 5 or case.mask == "bias"], ids=str)
def test_written_out_it_keeps_few_scores_at_once(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "_MOST_SCORES", 3 * case.samples * case.heads * case.num_keys)
    learns = case.mask == "bias"
    got = divided(case, 2, learns_mask=learns)
    assert_close(got, case.expected(learns_mask=learns), tolerance=TOLERANCES[torch.float64])


def test_one_rank_is_attention_as_it_is() -> None:
    case = Case(is_causal=True)
    assert_close(divided(case, 1), case.expected(), tolerance=TOLERANCES[torch.float64])


@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention], ids=["ring", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [Case(is_causal=True, size=64), Case(mask="bias", value_dim=5)], ids=str)
def test_half_types_are_as_near_as_on_one_device(case: Case, dtype: torch.dtype, attention: Divided) -> None:
    case = dataclasses.replace(case, dtype=dtype)
    exact = [value.double() for value in case.exact()]
    got = joined(case, on_threads(3, lambda group: on_one_rank(case, attention, group)))
    for one, alone, right in zip(got, case.expected(), exact, strict=True):
        assert one.dtype == alone.dtype == dtype
        allowed = 1.5 * (alone.double() - right).norm()  # several roundings to the half type are joined
        assert (one.double() - right).norm() <= allowed


@pytest.mark.parametrize("attention", [ring_attention, ulysses_attention], ids=["ring", "ulysses"])
def test_autocast_computes_in_its_dtype(attention: Divided) -> None:
    case = Case(dtype=torch.float32, is_causal=True)

    def work(group: ThreadGroup) -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return on_one_rank(case, attention, group)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = case.expected()
    got = joined(case, on_threads(2, work))
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    assert_close(got, expected, tolerance=1e-2)


def test_tokens_of_others_are_refused() -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        q = torch.zeros(1, 2, 5, 4)
        return ring_attention(q, q, q, group=group, tokens=Placement(size=8, contexts=2))

    with pytest.raises(DataflowError, match="has 4 of 8 queries"):
        on_threads(2, work)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.ones(4, 4, dtype=torch.bool), "given for all 8 queries"),
        (torch.ones(3, 1, 8, 8), "does not broadcast"),
        (torch.ones(8, 8, dtype=torch.int64), "boolean or added"),
    ],
)
def test_masks_that_are_not_of_the_whole_are_refused(mask: torch.Tensor, told: str) -> None:
    def work(group: ThreadGroup) -> torch.Tensor:
        q = torch.zeros(1, 2, 4, 4)
        return ring_attention(q, q, q, group=group, tokens=Placement(size=8, contexts=2), mask=mask)

    with pytest.raises(ModelError, match=told):
        on_threads(2, work)
