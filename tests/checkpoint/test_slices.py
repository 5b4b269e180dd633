"""Boxes of tensors: intersections, covers, and the plan of reads, checked against boolean masks."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.checkpoint.slices import (
    HeldTensor,
    SliceTable,
    TensorSlice,
    boxes_of_run,
    check_cover,
    first_hole,
    plan_reads,
)
from shardwise.errors import CheckpointError


def box(*ranges: tuple[int, int]) -> TensorSlice:
    return TensorSlice(offsets=tuple(a for a, _ in ranges), sizes=tuple(b - a for a, b in ranges))


def index(region: TensorSlice) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in zip(region.offsets, region.stops, strict=True))


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], list[TensorSlice]]:
    """A shape and a grid of slices that tile it, some of them empty."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    cuts = [[0, *sorted(draw(st.lists(st.integers(0, size), max_size=3))), size] for size in shape]
    ranges = [list(itertools.pairwise(cut)) for cut in cuts]
    return shape, [box(*each) for each in itertools.product(*ranges)]


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> TensorSlice:
    return box(*(tuple(sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))) for n in shape))


def test_a_slice_prints_as_python_would_index_it() -> None:
    assert str(box((1, 3), (2, 5))) == "[1:3, 2:5]"


def test_boxes_share_their_overlap_and_nothing_when_they_only_touch() -> None:
    assert box((0, 4), (0, 4)).intersection(box((2, 6), (3, 9))) == box((2, 4), (3, 4))
    assert box((0, 4), (0, 4)).intersection(box((4, 6), (0, 4))) is None


def test_a_scalar_is_one_element_and_covers_itself() -> None:
    scalar = TensorSlice.whole(())
    assert scalar.num_elements == 1
    assert scalar.intersection(scalar) == scalar
    check_cover("scale", (), [scalar])
    with pytest.raises(CheckpointError, match="scale"):
        check_cover("scale", (), [])


@pytest.mark.parametrize("offsets, sizes", [((0,), (1, 2)), ((-1,), (2,)), ((0,), (-2,))])
def test_crooked_slices_are_refused(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="offsets"):
        TensorSlice(offsets=offsets, sizes=sizes)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reads_fill_every_wanted_element_once_from_the_right_place(data: st.DataObject) -> None:
    shape, pieces = data.draw(grids())
    pieces = data.draw(st.permutations([*pieces, *pieces[:2]]))  # replicas among them
    wanted = data.draw(boxes_in(shape))
    values = np.arange(math.prod(shape)).reshape(shape)
    result, times = np.full(wanted.sizes, -1), np.zeros(wanted.sizes, int)
    for read in plan_reads("w", pieces, wanted):
        result[index(read.target)] = values[index(pieces[read.piece])][index(read.source)]
        times[index(read.target)] += 1
    assert (result == values[index(wanted)]).all()
    assert (times == 1).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_hole_is_found_where_and_only_where_there_is_one(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    pieces = data.draw(st.lists(boxes_in(shape), max_size=6))
    covered = np.zeros(shape, bool)
    for piece in pieces:
        covered[index(piece)] = True
    hole = first_hole(TensorSlice.whole(shape), pieces)
    if hole is None:
        assert covered.all()
    else:
        assert hole.num_elements > 0
        assert not covered[index(hole)].any()


@settings(max_examples=40, deadline=None)
@given(grids())
def test_a_grid_covers_its_tensor_and_without_any_slice_does_not(
    grid: tuple[tuple[int, ...], list[TensorSlice]],
) -> None:
    shape, pieces = grid
    check_cover("w", shape, pieces)
    filled = [piece for piece in pieces if piece.num_elements]
    for number in range(len(filled)):
        with pytest.raises(CheckpointError, match="must cover"):
            check_cover("w", shape, filled[:number] + filled[number + 1 :])


def test_the_error_of_a_cover_names_hole_overlap_and_stray_slice() -> None:
    #   a a b b
    #   a a . .     the hole is [1:2, 2:4]
    with pytest.raises(CheckpointError, match=r"\[1:2, 2:4\] of w with shape \(2, 4\)"):
        check_cover("w", (2, 4), [box((0, 2), (0, 2)), box((0, 1), (2, 4))])
    with pytest.raises(CheckpointError, match=r"\[0:2, 0:3\] and \[0:2, 2:4\] of w share"):
        check_cover("w", (2, 4), [box((0, 2), (0, 3)), box((0, 2), (2, 4))])
    with pytest.raises(CheckpointError, match=r"\[0:2, 0:5\] of w leaves its shape \(2, 4\)"):
        check_cover("w", (2, 4), [box((0, 2), (0, 5))])


def test_a_wanted_part_that_nobody_saved_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"of w \[0:4\] the part \[2:4\] is in none of the 1"):
        plan_reads("w", [box((0, 2))], box((0, 4)))


def test_the_lowest_holder_of_a_slice_writes_it() -> None:
    top, bottom = box((0, 2)), box((2, 4))
    table = SliceTable(
        tensors={
            "w": HeldTensor(
                global_shape=(4,),
                dtype="float32",
                holders=((3, bottom), (1, bottom), (2, top), (0, top)),
            ),
            "norm": HeldTensor(
                global_shape=(2,), dtype="float32", holders=tuple((rank, box((0, 2))) for rank in (2, 1, 3))
            ),
        }
    )
    assert table.written_by(0) == (("w", top),)
    assert table.written_by(1) == (("w", bottom), ("norm", box((0, 2))))
    assert table.written_by(2) == table.written_by(3) == ()


def test_a_table_with_a_hole_is_refused_when_it_is_made() -> None:
    with pytest.raises(CheckpointError, match=r"\[2:4\] of w"):
        SliceTable(tensors={"w": HeldTensor(global_shape=(4,), dtype="float32", holders=((0, box((0, 2))),))})


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    """A shape and a run of its elements in row-major order."""
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    return shape, start, stop


@settings(max_examples=300)
@given(runs())
def test_a_run_of_elements_is_boxes_in_its_order(run: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = run
    found = boxes_of_run(shape, start, stop)
    elements = np.arange(math.prod(shape)).reshape(shape)
    told = [elements[index(each)].ravel() for each in found]
    assert np.concatenate([*told, []]).tolist() == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


def test_a_run_that_leaves_its_tensor_is_refused() -> None:
    with pytest.raises(CheckpointError, match="7 .. 13 leaves the 12"):
        boxes_of_run((4, 3), 7, 13)
