"""Where tokens are: dealt out once each, and back in order, whatever the numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from shardwise.errors import LayoutError
from shardwise.parallel.context.placement import Placement

CASES = [
    Placement(size=size, contexts=contexts, zigzag=zigzag)
    for size in (0, 1, 2, 3, 5, 8, 13, 24)
    for contexts in (1, 2, 3, 4)
    for zigzag in (False, True)
]


def drawn(placement: Placement) -> str:
    owner = {
        at: str(context)
        for context in range(placement.contexts)
        for start, stop in placement.runs(context)
        for at in range(start, stop)
    }
    return "".join(owner[at] for at in range(placement.size))


@pytest.mark.parametrize(
    ("size", "contexts", "zigzag", "picture"),
    [
        (12, 3, False, "000011112222"),
        (12, 3, True, "001122221100"),
        (8, 2, True, "00111100"),
        (7, 2, True, "0111100"),  # uneven chunks: 1, 2, 2, 2
        (3, 2, True, "110"),  # fewer tokens than chunks
        (3, 4, True, "220"),  # ranks have none
        (5, 1, True, "00000"),
    ],
)
def test_tokens_are_dealt_out_as_drawn(size: int, contexts: int, zigzag: bool, picture: str) -> None:
    assert drawn(Placement(size=size, contexts=contexts, zigzag=zigzag)) == picture


@pytest.mark.parametrize("placement", CASES, ids=str)
def test_every_token_is_on_one_rank_and_comes_back_in_its_place(placement: Placement) -> None:
    whole = torch.arange(2 * placement.size).view(2, placement.size)
    parts = [placement.own(whole, 1, context) for context in range(placement.contexts)]
    assert torch.equal(placement.join(parts, 1), whole)
    assert torch.equal(placement.join([part.T for part in parts], 0), whole.T)
    for context, part in enumerate(parts):
        assert part.shape == (2, placement.num(context))
        assert torch.equal(placement.positions(context), part[0])


@pytest.mark.parametrize("placement", CASES, ids=str)
def test_runs_ascend_are_not_empty_and_do_not_touch(placement: Placement) -> None:
    for context in range(placement.contexts):
        runs = placement.runs(context)
        assert all(start < stop for start, stop in runs)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


@pytest.mark.parametrize("contexts", [2, 3, 4])
def test_zigzag_ranks_have_equal_numbers_of_visible_pairs(contexts: int) -> None:
    placement = Placement(size=8 * contexts, contexts=contexts, zigzag=True)
    pairs = {int((placement.positions(context) + 1).sum()) for context in range(contexts)}
    assert len(pairs) == 1


def test_one_run_is_a_view_of_the_whole() -> None:
    whole = torch.arange(8)
    assert Placement(size=8, contexts=2).own(whole, 0, 1).data_ptr() == whole[4:].data_ptr()
    assert Placement(size=8, contexts=2, zigzag=True).own(whole, 0, 1).data_ptr() == whole[2:].data_ptr()


def test_parts_that_there_are_not_are_refused() -> None:
    with pytest.raises(LayoutError, match="there is no part 2"):
        Placement(size=4, contexts=2).runs(2)
    with pytest.raises(LayoutError, match="1 or more ranks"):
        Placement(size=4, contexts=0)
