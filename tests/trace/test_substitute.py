"""Tensors in arguments are replaced; lists and dictionaries stay the objects they are."""

from __future__ import annotations

import torch

from shardwise.trace.substitute import Undo, put_back, substitute


def test_lists_stay_themselves_and_keep_what_is_appended() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    seen, notes = [a], {"a": a, "n": 3}
    tree = ((a, seen), {"notes": notes, "other": (a, None)})
    undo: Undo = []
    args, kwargs = substitute(tree, lambda tensor: b if tensor is a else tensor, undo)
    assert args[0] is b
    assert args[1] is seen
    assert seen == [b]
    assert kwargs["notes"] is notes
    assert kwargs["other"] == (b, None)
    seen.append(c)
    put_back(undo)
    assert [id(tensor) for tensor in seen] == [id(a), id(c)]
    assert notes["a"] is a
    assert undo == []


def test_what_was_written_over_since_is_left_alone() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    first, second = [a], [a]
    undo: Undo = []
    substitute((first, second), lambda tensor: b, undo)
    first[0] = c
    second.clear()
    put_back(undo)
    assert first[0] is c
    assert second == []
