"""Moves between ranks: every wanted element comes once from somebody who holds it, from oneself where one does."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.checkpoint.moves import Move, plan_moves
from shardwise.checkpoint.slices import TensorSlice
from shardwise.errors import CheckpointError


def box(*ranges: tuple[int, int]) -> TensorSlice:
    return TensorSlice(offsets=tuple(a for a, _ in ranges), sizes=tuple(b - a for a, b in ranges))


def cells(region: TensorSlice) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(o, o + n) for o, n in zip(region.offsets, region.sizes, strict=True))))


def shifted(inner: TensorSlice, outer: TensorSlice) -> list[tuple[int, ...]]:
    return [tuple(o + i for o, i in zip(outer.offsets, cell, strict=True)) for cell in cells(inner)]


def check(
    moves: Sequence[Move], held: Sequence[Sequence[TensorSlice]], wanted: Sequence[Sequence[TensorSlice]]
) -> None:
    for target, slices in enumerate(wanted):
        for number, region in enumerate(slices):
            own = [move for move in moves if (move.target, move.wanted) == (target, number)]
            filled = [cell for move in own for cell in shifted(move.put, region)]
            assert sorted(set(filled)) == sorted(cells(region))
            for move in own:
                assert shifted(move.taken, held[move.source][move.piece]) == shifted(move.put, region)


def test_rows_become_columns() -> None:
    held = [[box((0, 2), (0, 4))], [box((2, 4), (0, 4))]]
    wanted = [[box((0, 4), (0, 2))], [box((0, 4), (2, 4))]]
    moves = plan_moves("w", held, wanted)
    assert [(move.source, move.target) for move in moves] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    check(moves, held, wanted)


def test_what_a_rank_holds_it_takes_from_itself_and_replicas_are_asked_in_turn() -> None:
    whole = box((0, 4))
    moves = plan_moves("w", [[whole]] * 4, [[whole]] * 4)
    assert [(move.source, move.target) for move in moves] == [(rank, rank) for rank in range(4)]
    moves = plan_moves("w", [[whole], [whole], [], []], [[], [], [whole], [whole]])
    assert [(move.source, move.target) for move in moves] == [(0, 2), (1, 3)]


def test_a_hole_is_an_error_that_names_it() -> None:
    with pytest.raises(CheckpointError, match=r"of w \[0:4\] the part \[2:4\] is in none"):
        plan_moves("w", [[box((0, 2))], []], [[], [box((0, 4))]])


def test_a_scalar_and_an_empty_slice() -> None:
    scalar = TensorSlice.whole(())
    (move,) = plan_moves("step", [[scalar], []], [[], [scalar]])
    assert (move.source, move.target, move.num_elements) == (0, 1, 1)
    assert list(move.in_parts(1)) == [move]
    assert plan_moves("w", [[box((0, 4))]], [[box((2, 2))]]) == ()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 12))
def test_parts_are_the_move_again(rows: int, columns: int, depth: int, most: int) -> None:
    region = box((0, rows), (0, columns), (0, depth))
    (move,) = plan_moves("w", [[region], []], [[], [region]])
    parts = list(move.in_parts(most))
    assert all(part.num_elements <= most for part in parts)
    assert [cell for part in parts for cell in cells(part.put)] == cells(move.put)
    assert [part.taken for part in parts] == [part.put for part in parts]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_cut_becomes_any_other(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 5)))

    def cut() -> list[list[TensorSlice]]:
        dim, size = data.draw(st.sampled_from([(0, shape[0]), (1, shape[1])]))
        bounds = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=2))})
        parts = []
        for a, b in itertools.pairwise(bounds):
            ranges = [(0, shape[0]), (0, shape[1])]
            ranges[dim] = (a, b)
            parts.append(box(*ranges))
        return [parts[rank::3] for rank in range(3)]

    held, wanted = cut(), cut()
    moves = plan_moves("w", held, wanted)
    check(moves, held, wanted)
    assert sum(move.num_elements for move in moves) == math.prod(shape)
