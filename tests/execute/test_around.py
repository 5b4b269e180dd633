"""What stands around units is called in one order, once a unit, and not at all where nobody asked for it."""

from __future__ import annotations

from shardwise.execute.around import Around, Body, Order


def test_the_lowest_order_is_outermost_whoever_was_added_first() -> None:
    told: list[str] = []
    around = Around()

    def noting(name: str, unit: str, body: Body) -> Body:
        def noted(x: int) -> int:
            told.append(f"{name} {unit}")
            return int(body(x))

        return noted

    around.add(Order.COMPILE, lambda unit, body: noting("compile", unit, body))
    around.add(Order.RECOMPUTE, lambda unit, body: noting("recompute", unit, body))
    around.add(Order.UNSHARD, lambda unit, body: noting("unshard", unit, body))
    assert around.wrap("layers.0", lambda x: x + 1)(1) == 2
    assert told == ["recompute layers.0", "unshard layers.0", "compile layers.0"]


def test_a_wrapper_is_asked_once_a_unit_and_body() -> None:
    asked: list[str] = []
    around = Around()

    def wrapper(unit: str, body: Body) -> Body:
        asked.append(unit)
        return body

    around.add(Order.CASTS, wrapper)
    first, second = (lambda: 1), (lambda: 2)
    for _ in range(3):
        assert around.wrap("a", first)() == 1
    around.wrap("b", first)
    around.wrap("a", second)
    assert asked == ["a", "b", "a"]


def test_only_units_whose_body_was_taken_are_computed_again() -> None:
    around = Around()
    around.add(Order.RECOMPUTE, lambda unit, body: (lambda: body()) if unit == "a" else body)
    for unit in "ab":
        around.wrap(unit, lambda: None)
    assert around.recomputes("a")
    assert not around.recomputes("b")


def test_nobody_stands_around_at_first() -> None:
    assert not Around()
