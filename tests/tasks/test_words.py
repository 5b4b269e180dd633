"""Words of instructions are numbers; what is not known is told apart from what is not there."""

from __future__ import annotations

from shardwise.tasks.words import Words


def test_words_are_numbered_in_order_and_unknown_ones_are_one_number() -> None:
    words = Words.of(["Go to the ball", "go to a box"])
    assert words.words == ("a", "ball", "box", "go", "the", "to")
    assert words.num_numbers == 8
    assert words.numbers(["go to the key", "go", "go to a red ball"]).tolist() == [
        [5, 7, 6, 1],
        [5, 0, 0, 0],
        [5, 7, 2, 1],
    ]
