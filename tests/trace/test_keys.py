"""A key is the same everywhere and tells everything apart."""

from __future__ import annotations

import pytest

from shardwise.errors import ConfigError
from shardwise.trace.keys import key_of


def test_a_key_is_the_same_in_every_version_of_this_library() -> None:
    assert key_of(7, "layers.0.weight", 1) == 4428108972009704706


def test_keys_are_seeds_of_63_bits() -> None:
    keys = [key_of("seed", n) for n in range(200)]
    assert all(0 <= key < 2**63 for key in keys)
    assert len(set(keys)) == 200
    assert max(keys) > 2**62  # the upper half is used


def test_parts_that_look_alike_have_different_keys() -> None:
    alike = [("a", "b"), ("ab",), (("a", "b"),), ("a", ("b",)), (1,), ("1",), (1, 0), (10,), (), ((),)]
    assert len({key_of(*parts) for parts in alike}) == len(alike)


def test_names_need_not_be_ascii() -> None:
    assert key_of("层") != key_of("注意力")


@pytest.mark.parametrize("part", [True, 1.0, None, b"a", (1, 2.0)])
def test_a_part_whose_text_may_change_is_refused(part: object) -> None:
    with pytest.raises(ConfigError, match="int, str and tuples"):
        key_of("a", part)  # type: ignore[arg-type]
