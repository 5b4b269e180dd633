"""Greedy generation from looks at whole batches: what a model would say token by token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from shardwise.tasks.greedy import GreedyRules, Tokens, greedily, seq2seq_batch

START, END, PADDING = 1, 0, 2
RULES = GreedyRules(start=START, end=END, padding=PADDING, rows=4, pad_to=4, max_tokens=12)

Next = Callable[[list[int], list[int]], int]  # (source, tokens so far) -> token


def chained(source: list[int], said: list[int]) -> int:
    """Every token depends on all before it: one wrong guess changes all that follow."""
    token = 3 + (sum((i + 1) * t for i, t in enumerate([*source, *said])) * 7919) % 50
    return END if len(said) >= sum(source) % 9 or token % 11 == 0 else token


def copied(source: list[int], said: list[int]) -> int:
    """The same token over and over: a guess by what was said before is right."""
    return END if len(said) == len(source) - 1 else source[0]


def endless(source: list[int], said: list[int]) -> int:
    return 5


def one_by_one(source: list[int], next_token: Next, limit: int) -> list[int]:
    said: list[int] = []
    while len(said) < limit and (token := next_token(source, said)) != END:
        said.append(token)
    return said


def looked_at(sources: list[list[int]], next_token: Next) -> tuple[list[Tokens], list[tuple[torch.Size, torch.Size]]]:
    """What `greedily` says with a model that is a function, and the shapes that it was shown."""
    game = greedily([np.array(source) for source in sources], RULES)
    shapes = []
    try:
        batch = next(game)
        while True:
            shapes.append((batch["input_ids"].shape, batch["decoder_input_ids"].shape))
            assert (batch["decoder_input_ids"][:, 0] == START).all()
            best = torch.zeros_like(batch["target_labels"])
            for row in range(len(best)):
                shown = batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()
                before = batch["decoder_input_ids"][row].tolist()
                for place in range(best.shape[1]):
                    best[row, place] = next_token(shown, before[1 : place + 1])
            batch = game.send({"best": best.to(torch.int32)})
    except StopIteration as end:
        return end.value, shapes


@pytest.mark.parametrize("next_token", [chained, copied, endless])
def test_it_says_what_token_by_token_would(next_token: Next) -> None:
    drawn = np.random.default_rng(0)
    sources = [[*drawn.integers(3, 50, size=size).tolist(), END] for size in (1, 2, 6, 3, 3, 9, 2, 1, 3, 2, 11, 3)]
    said, shapes = looked_at(sources, next_token)
    for source, found in zip(sources, said, strict=True):
        assert found.tolist() == one_by_one(source, next_token, RULES.limit(-(-len(source) // 4) * 4))
    assert len(set(shapes)) == len({-(-len(source) // 4) for source in sources})  # one of each length


def test_a_right_guess_saves_looks_and_rows_that_ended_make_room() -> None:
    alike = [[7, 8, 9, END]] * 4
    assert len(looked_at(alike, copied)[1]) == 2  # 7 is found, then 7 7 and the end behind it are known
    assert len(looked_at(alike * 3, copied)[1]) == 6
    mixed = [[7, 8, 9, END], [7, 7, END, END]] * 6
    assert len(looked_at(mixed, chained)[1]) < sum(len(looked_at(mixed[i : i + 4], chained)[1]) for i in (0, 4, 8)) + 1


def test_few_sources_of_a_length_have_fewer_rows() -> None:
    assert [shape[0] for shape, _ in looked_at([[3, END]], copied)[1]] == [1, 1]
    assert {shape[0] for shape, _ in looked_at([[3, END]] * 3, copied)[1]} == {4}
    assert looked_at([], copied) == ([], [])


def test_a_batch_has_the_target_one_place_later() -> None:
    batch = seq2seq_batch([[5, 0], [6, 7, 0]], [[8, 9, 0], [4, 0]], (4, 4), start=START, padding=PADDING)
    assert batch["input_ids"].tolist() == [[5, 0, 2, 2], [6, 7, 0, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch["decoder_input_ids"].tolist() == [[1, 8, 9, 2], [1, 4, 2, 2]]
    assert batch["target_labels"].tolist() == [[8, 9, 0, -100], [4, 0, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
