"""Greedy generation by a model that is shown whole batches: text grows by what the model finds likeliest.

    guessed   start  Die  Datei  wird   nicht   …        what the decoder is shown
    best      Die    Datei  ist  nicht  …                the likeliest next token at every place
              ├─── true ────┤ where all before it is true, and becomes the next guess

A causal decoder says at each place what follows the tokens up to there, so one look tells of every place. What it says
where all before was guessed right is what it would have said token by token; at least one token is won each time, and
more where it agrees with the guess (Santilli et al., ACL 2023, arXiv:2305.10427). No cache is needed: any layout
will do.

Rows are alike in length, and as many throughout; one that has ended makes room for the next source. Knows tokens; no
words, no model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shardwise.tasks.task import IGNORED_LABEL

__all__ = ["GreedyRules", "greedily", "seq2seq_batch"]

Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class GreedyRules:
    """Tokens with a meaning, how many rows are shown together, and how long text may become."""

    start: int  # what a decoder begins with
    end: int
    padding: int
    rows: int
    pad_to: int  # lengths are multiples of it
    max_tokens: int  # of a translation, the end among them

    def limit(self, num_source: int) -> int:
        """Tokens that a decoder is shown for sources of that length: half as many again, and eight."""
        longest = min(self.max_tokens, num_source + num_source // 2 + 8)
        return -(-longest // self.pad_to) * self.pad_to


def seq2seq_batch(
    sources: Sequence[Sequence[int] | Tokens], guesses: Sequence[Sequence[int] | Tokens], lengths: tuple[int, int], *,
    start: int, padding: int,
) -> dict[str, Tensor]:  # fmt: skip
    """What an encoder-decoder is shown, int64: `input_ids`, `attention_mask` (rows, lengths[0]), `decoder_input_ids`,
    which are `start` and all of a guess but its last place, and `target_labels`, the guess, (rows, lengths[1])."""
    ids = np.full((len(sources), lengths[0]), padding, dtype=np.int64)
    mask = np.zeros_like(ids)
    shown = np.full((len(sources), lengths[1]), padding, dtype=np.int64)
    labels = np.full_like(shown, IGNORED_LABEL)
    for place, (source, guess) in enumerate(zip(sources, guesses, strict=True)):
        ids[place, : len(source)], mask[place, : len(source)] = source, 1
        shown[place, 1 : len(guess)], labels[place, : len(guess)] = guess[:-1], guess
    shown[:, 0] = start
    made = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shown, "target_labels": labels}
    return {name: torch.from_numpy(array) for name, array in made.items()}


def greedily(
    sources: Sequence[Tokens], rules: GreedyRules
) -> Generator[Mapping[str, Tensor], Mapping[str, Tensor], list[Tokens]]:
    """Yields batches of `rules.rows` rows, or a quarter at least for the few of a length; is sent `best`, the likeliest
    token at every place (rows, length of the decoder); returns the tokens said to each source, without the end."""
    said: list[Tokens] = [np.empty(0, dtype=np.int64)] * len(sources)
    for length, numbers in _alike(sources, rules.pad_to):
        limit = rules.limit(length)
        num_rows = min(rules.rows, max(rules.rows // 4, 1 << (len(numbers) - 1).bit_length()))
        waiting = iter(numbers)
        rows = [_Row.empty(limit) for _ in range(num_rows)]
        while True:
            rows = [_refilled(row, waiting, limit) for row in rows]
            if all(row.number is None for row in rows):
                break
            shown = [sources[numbers[0] if row.number is None else row.number] for row in rows]
            batch = seq2seq_batch(
                shown, [row.guess for row in rows], (length, limit), start=rules.start, padding=rules.padding
            )
            best = (yield batch)["best"].numpy().astype(np.int64)
            for row, answer in zip(rows, best, strict=True):
                row.take(answer, end=rules.end)
                if row.number is not None and row.ended:
                    said[row.number] = row.text(rules.end)
    return said


@dataclass(kw_only=True)
class _Row:
    """A source's number, what was guessed of its translation, and how many of its first tokens are true."""

    number: int | None
    guess: Tokens
    known: int = 0
    ended: bool = False

    @classmethod
    def empty(cls, limit: int, number: int | None = None) -> _Row:
        return cls(number=number, guess=np.zeros(limit, dtype=np.int64), ended=number is None)

    def take(self, best: Tokens, *, end: int) -> None:
        """The guess holds up to the first place where the answer differs, and there the answer is true."""
        before = self.known
        wrong = np.flatnonzero(self.guess[before:] != best[before:])
        self.known = before + int(wrong[0]) + 1 if len(wrong) else len(best)
        self.guess = np.concatenate([self.guess[:before], best[before:]])
        self.ended = self.known == len(best) or end in self.guess[: self.known]

    def text(self, end: int) -> Tokens:
        """Tokens before the end."""
        true = self.guess[: self.known]
        ends = np.flatnonzero(true == end)
        return true[: ends[0]] if len(ends) else true


def _refilled(row: _Row, waiting: Iterator[int], limit: int) -> _Row:
    if not row.ended:
        return row
    return _Row.empty(limit, next(waiting, None))


def _alike(sources: Sequence[Tokens], pad_to: int) -> list[tuple[int, list[int]]]:
    """Padded lengths, and the numbers of the sources that have them, the longest first."""
    numbers: dict[int, list[int]] = {}
    for number, source in enumerate(sources):
        numbers.setdefault(-(-max(1, len(source)) // pad_to) * pad_to, []).append(number)
    return sorted(numbers.items(), reverse=True)
