"""Which token comes next: chosen from logits, the same on every layout.

A draw is one number between 0 and 1 that follows from the seed, the number of the prompt and of the token alone, read
off the cumulated probabilities. Knows logits and options; no models, no ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from shardwise.errors import ConfigError
from shardwise.trace.keys import key_of

__all__ = ["Choice", "Forced", "next_tokens", "scores_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a token is chosen: the likeliest one where `temperature` is 0, drawn otherwise.

    temperature         divides logits; 0: greedy
    top_k               the likeliest so many are left; 0: all
    top_p               of these the likeliest that have this probability together, at least one
    repetition_penalty  logits of tokens that stand in the text already are divided by it, negative ones multiplied
                        (CTRL, arXiv:1909.05858, section 4.1); 1: none
    seed                of draws
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"a temperature is 0 (greedy) or above, got {self.temperature}; 1 leaves logits as is")
        if self.top_k < 0:
            raise ConfigError(f"top_k is a number of tokens, or 0 for all of them, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is a probability above 0 and up to 1, got {self.top_p}; 1 leaves all tokens")
        if not self.repetition_penalty > 0:
            raise ConfigError(f"repetition_penalty is above 0, got {self.repetition_penalty}; 1 is none")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Forced:
    """What a model's generation config says of tokens, whatever is likely.

    never          tokens that are never chosen; `never_first`: not as the first
    first, last    what the first token is, and the last where a text has not ended before; None: chosen
    """

    never: tuple[int, ...] = ()
    never_first: tuple[int, ...] = ()
    first: int | None = None
    last: int | None = None

    def token(self, number: int, *, is_last: bool) -> int | None:
        """The token of this number, where it is not chosen."""
        if is_last and self.last is not None:
            return self.last
        return self.first if number == 0 else None

    def left_out(self, number: int) -> tuple[int, ...]:
        """Tokens that are not chosen."""
        return self.never + self.never_first if number == 0 else self.never


def next_tokens(
    logits: torch.Tensor,
    texts: Sequence[torch.Tensor],
    choice: Choice,
    *,
    samples: Sequence[int],
    number: int,
    forced: Forced | None = None,
    is_last: bool = False,
) -> torch.Tensor:
    """One token a row, int64 (batch,), on the device of `logits` (batch, vocabulary).

    `texts` are the tokens so far of each row, without padding; `samples` the numbers of the rows among all prompts;
    `number` that of the token to come, from 0; `is_last`: no other follows.
    """
    if forced is not None:
        token = forced.token(number, is_last=is_last)
        if token is not None:
            return torch.full((len(logits),), token, dtype=torch.int64, device=logits.device)
        left_out = forced.left_out(number)
        if left_out:
            logits = logits.index_fill(-1, torch.tensor(left_out, device=logits.device), -torch.inf)
    if choice.is_greedy and choice.repetition_penalty == 1:
        return logits.argmax(dim=-1)
    scores = scores_of(logits, texts, choice)
    if choice.is_greedy:
        return scores.argmax(dim=-1)
    drawn = [key_of(choice.seed, "generate", sample, number) / 2.0**63 for sample in samples]
    likely, tokens = scores.double().softmax(dim=-1).sort(dim=-1, descending=True, stable=True)  # (batch, vocabulary)
    reached = likely.cumsum(dim=-1)
    wanted = torch.tensor(drawn, dtype=torch.float64, device=scores.device)[:, None] * reached[:, -1:]
    last = (likely > 0).sum(dim=-1, keepdim=True) - 1  # rounding must not reach behind what is left
    place = torch.searchsorted(reached, wanted, right=True).minimum(last)
    return tokens.gather(1, place)[:, 0]


def scores_of(logits: torch.Tensor, texts: Sequence[torch.Tensor], choice: Choice) -> torch.Tensor:
    """Logits in float32 as they are drawn from: penalised, divided, those that are left out -inf."""
    scores = logits.to(torch.float32, copy=True)
    if choice.repetition_penalty != 1:
        for row, text in enumerate(texts):
            seen = torch.unique(text)
            value = scores[row, seen]
            scores[row, seen] = torch.where(
                value < 0, value * choice.repetition_penalty, value / choice.repetition_penalty
            )
    if choice.is_greedy:
        return scores
    scores /= choice.temperature
    if 0 < choice.top_k < scores.shape[-1]:
        least = scores.topk(choice.top_k, dim=-1).values[:, -1:]  # (batch, 1)
        scores.masked_fill_(scores < least, -torch.inf)
    if choice.top_p < 1:
        ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
        likely = ordered.softmax(dim=-1)
        before = likely.cumsum(dim=-1) - likely  # what likelier ones have together
        scores.masked_fill_((before >= choice.top_p).scatter(1, tokens, before >= choice.top_p), -torch.inf)
    return scores
