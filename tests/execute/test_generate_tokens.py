"""Choosing tokens: what is left of the scores beside transformers' own, and that draws are fair and keyed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.execute.generate_tokens import Choice, Forced, next_tokens, scores_of

ROWS, VOCABULARY = 5, 40


def logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def texts() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "choice",
    [
        Choice(temperature=0.7),
        Choice(temperature=1.0, top_k=5),
        Choice(temperature=1.3, top_p=0.6),
        Choice(temperature=0.9, top_k=9, top_p=0.5, repetition_penalty=1.4),
        Choice(temperature=1.0, top_k=VOCABULARY + 3, top_p=1.0, repetition_penalty=0.8),
    ],
)
def test_scores_are_those_of_transformers(choice: Choice) -> None:
    from transformers.generation import logits_process as theirs

    expected = logits()
    for process in (
        theirs.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty),
        theirs.TemperatureLogitsWarper(choice.temperature),
        theirs.TopKLogitsWarper(min(choice.top_k or VOCABULARY, VOCABULARY)),
        theirs.TopPLogitsWarper(choice.top_p),
    ):
        expected = process(texts(), expected)
    got = scores_of(logits(), list(texts()), choice)
    assert torch.equal(got.isinf(), expected.isinf())
    torch.testing.assert_close(got, expected)


def test_greedy_takes_the_likeliest_and_leaves_the_logits_alone() -> None:
    given = logits()
    chosen = next_tokens(given, [], Choice(), samples=range(ROWS), number=0)
    assert chosen.tolist() == given.argmax(dim=-1).tolist()
    assert torch.equal(given, logits())


def test_tokens_are_forced_and_left_out_as_transformers_does() -> None:
    from transformers.generation import logits_process as theirs

    forced = Forced(never=(3, 7), never_first=(int(logits()[0].argmax()),), first=None, last=9)
    text, after = torch.zeros(ROWS, 1, dtype=torch.int64), torch.zeros(ROWS, 2, dtype=torch.int64)
    for number, given in ((0, text), (1, after)):
        scores = theirs.SuppressTokensLogitsProcessor([3, 7])(given, logits())
        scores = theirs.SuppressTokensAtBeginLogitsProcessor(list(forced.never_first), 1)(given, scores)
        chosen = next_tokens(logits(), [], Choice(), samples=range(ROWS), number=number, forced=forced)
        assert chosen.tolist() == scores.argmax(dim=-1).tolist()
    last = next_tokens(logits(), [], Choice(), samples=range(ROWS), number=5, forced=forced, is_last=True)
    assert last.tolist() == [9] * ROWS
    begun = next_tokens(logits(), [], Choice(), samples=range(ROWS), number=0, forced=Forced(first=4))
    assert begun.tolist() == [4] * ROWS


def test_a_draw_is_of_the_sample_and_the_number_and_not_of_the_rows_beside_it() -> None:
    choice = Choice(temperature=2.0, seed=3)
    whole = next_tokens(logits(), [], choice, samples=range(ROWS), number=4)
    for row in range(ROWS):
        alone = next_tokens(logits()[row : row + 1], [], choice, samples=[row], number=4)
        assert alone.item() == whole[row].item()
    assert whole.tolist() != next_tokens(logits(), [], choice, samples=range(ROWS), number=5).tolist()
    other = Choice(temperature=2.0, seed=4)
    assert whole.tolist() != next_tokens(logits(), [], other, samples=range(ROWS), number=4).tolist()


def test_draws_follow_the_probabilities() -> None:
    draws = 4000
    row = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    wanted = row.softmax(dim=-1)[0]
    same = row.expand(draws, -1)
    drawn = Counter(next_tokens(same, [], Choice(temperature=1.0), samples=range(draws), number=0).tolist())
    for token, probability in enumerate(wanted.tolist()):
        spread = (probability * (1 - probability) / draws) ** 0.5
        assert abs(drawn[token] / draws - probability) < 4 * spread, token


def test_what_is_left_out_is_never_drawn() -> None:
    same = logits()[:1].expand(500, -1)
    choice = Choice(temperature=5.0, top_k=3)
    drawn = set(next_tokens(same, [], choice, samples=range(500), number=1).tolist())
    assert drawn == set(logits()[0].topk(3).indices.tolist())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -1.0}, "a temperature is 0"),
        ({"top_k": -1}, "top_k is a number of tokens"),
        ({"top_p": 0.0}, "top_p is a probability"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is above 0"),
    ],
)
def test_wrong_choices_are_named(options: dict[str, float], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Choice(**options)  # type: ignore[arg-type]
