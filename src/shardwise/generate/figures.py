"""How fast text was generated, in figures: of all ranks together. Arithmetic alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from shardwise.execute.generation import Rates

__all__ = ["Figures", "figures_of"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a generation took.

    first_token_s        until the first token of any prompt was known: the latency
    prefill_s            until the first token of every prompt was
    prefill_tokens_per_s tokens of prompts in that time
    decode_tokens_per_s  tokens behind the first of each prompt, in the time that these took; 0 where there are none
    prompt_tokens        without padding
    generated_tokens     of all prompts
    cache_bytes          what every rank's caches held at the end, by rank
    """

    first_token_s: float
    prefill_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    generated_tokens: int
    cache_bytes: tuple[int, ...]


def figures_of(rates: Sequence[Rates], *, ranks_of_replica: Sequence[Sequence[int]], num_prompts: int) -> Figures:
    """The figures of ranks that each measured their own; those of one replica counted the same tokens."""
    busy = [rate for rate in rates if rate.prompt_tokens]
    first = [rates[ranks[0]] for ranks in ranks_of_replica]
    prompt_tokens = sum(rate.prompt_tokens for rate in first)
    generated_tokens = sum(rate.generated_tokens for rate in first)
    prefill_s = max(rate.prefill_s for rate in busy)
    decode_s = max(rate.decode_s for rate in busy)
    later = generated_tokens - num_prompts
    return Figures(
        first_token_s=min(rate.first_token_s for rate in busy),
        prefill_s=prefill_s,
        prefill_tokens_per_s=prompt_tokens / prefill_s,
        decode_tokens_per_s=later / decode_s if later else 0.0,
        prompt_tokens=prompt_tokens,
        generated_tokens=generated_tokens,
        cache_bytes=tuple(rate.cache_bytes for rate in rates),
    )
