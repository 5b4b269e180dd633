"""A slice holds what a tensor needs, and replaying it gives the recorded memory."""

from __future__ import annotations

import torch

from shardwise.trace.recipe import Op, Recipe, View
from shardwise.trace.replay import replay

aten = torch.ops.aten


def view(storage: int, shape: tuple[int, ...] = (3,), strides: tuple[int, ...] = (1,)) -> View:
    return View(
        storage=storage,
        dtype=torch.float32,
        shape=shape,
        strides=strides,
        offset=0,
        conjugate=False,
        negative=False,
    )


def op(func: object, *args: object, makes: View | None = None, writes: int | None = None, hides: bool = False) -> Op:
    return Op(
        func=func,  # type: ignore[arg-type]
        args=args,
        kwargs={},
        reads=frozenset(arg.storage for arg in args if isinstance(arg, View)),
        writes=frozenset() if writes is None else frozenset({writes}),
        made=(makes,),
        hides=hides,
        random=func in (aten.rand.default, aten.uniform_.default),
    )


def example() -> tuple[Recipe, View, View, View]:
    """The picture in the docstring of the module."""
    recipe = Recipe()
    a, b, c = (view(recipe.new_storage(12)) for _ in range(3))
    recipe.append(op(aten.rand.default, [3], makes=b))
    recipe.append(op(aten.mul.Scalar, b, 2.0, makes=c))
    recipe.append(op(aten.zero_.default, a, writes=a.storage, hides=True))
    recipe.append(op(aten.add_.Tensor, b, c, writes=b.storage))
    return recipe, a, b, c


def test_a_slice_holds_what_came_before_and_nothing_else() -> None:
    recipe, a, b, c = example()
    assert recipe.slice_of(c.storage) == [0, 1]
    assert recipe.slice_of(b.storage) == [0, 1, 3]
    assert recipe.slice_of(a.storage) == [2]


def test_what_is_overwritten_unseen_is_not_made() -> None:
    recipe = Recipe()
    a = view(recipe.new_storage(12))
    recipe.append(op(aten.uniform_.default, a, writes=a.storage, hides=True))
    recipe.append(op(aten.fill_.Scalar, a, 2.0, writes=a.storage, hides=True))
    recipe.append(op(aten.mul_.Scalar, a, 3.0, writes=a.storage))
    assert recipe.slice_of(a.storage) == [1, 2]
    assert replay(recipe, [a])[0].tolist() == [6, 6, 6]


def test_a_replay_computes_the_slice() -> None:
    recipe, a, b, c = example()
    recipe.assign_keys({"b": b.storage}, seed=0)
    assert replay(recipe, [a])[0].tolist() == [0, 0, 0]
    made_b, made_c = replay(recipe, [b, c])
    torch.testing.assert_close(made_b, made_c * 1.5)
    assert made_c.count_nonzero() > 0


def test_a_draw_belongs_to_the_tensor_that_it_is_drawn_into() -> None:
    recipe, _, b, c = example()
    recipe.assign_keys({"c": c.storage, "b": b.storage}, seed=0)
    alone, _, only_b, _ = example()
    alone.assign_keys({"b": only_b.storage}, seed=0)
    assert recipe.keys == alone.keys


def test_a_result_with_other_strides_is_brought_into_the_recorded_ones() -> None:
    recipe = Recipe()
    made = view(recipe.new_storage(24), (2, 3), (3, 1))
    recipe.append(op(lambda: torch.arange(6.0).reshape(3, 2).t(), makes=made))
    row = View(
        storage=made.storage,
        dtype=torch.float32,
        shape=(3,),
        strides=(1,),
        offset=3,
        conjugate=False,
        negative=False,
    )
    value, second_row = replay(recipe, [made, row])
    assert value.tolist() == [[0, 2, 4], [1, 3, 5]]
    assert value.is_contiguous()
    assert second_row.tolist() == [1, 3, 5]
