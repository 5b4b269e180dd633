"""Prompts as tokens, and tokens as text while they come. Knows a tokenizer of transformers; runs no model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from shardwise.errors import BatchError, ConfigError

__all__ = ["Prompts", "Stream", "prompts_of", "tokenizer_at"]

_UNFINISHED = "\ufffd"  # what the first bytes of a character look like


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts:
    """Tokens of prompts, int64 (prompts, tokens); where `mask` is 0 they are padding."""

    tokens: torch.Tensor
    mask: torch.Tensor

    @property
    def batch(self) -> dict[str, torch.Tensor]:
        """As a model takes them."""
        return {"input_ids": self.tokens, "attention_mask": self.mask}


def tokenizer_at(folder: Path) -> Any:
    """The tokenizer in a folder; None where there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def prompts_of(prompts: Sequence[str | Sequence[int]], *, tokenizer: Any, pad: int, on_the_left: bool) -> Prompts:
    """Texts, or tokens of texts, side by side. Raises BatchError for none and for empty ones, ConfigError for texts
    without a tokenizer."""
    if not prompts:
        raise BatchError("text is generated behind a prompt, and there is none; give one or more")
    rows = [_encoded(prompt, tokenizer) for prompt in prompts]
    empty = [place for place, row in enumerate(rows) if not row]
    if empty:
        raise BatchError(f"a prompt has at least one token, but prompt {empty[0]} has none; write something")
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        own = slice(width - len(row), width) if on_the_left else slice(0, len(row))
        tokens[place, own] = torch.tensor(row)
        mask[place, own] = 1
    return Prompts(tokens=tokens, mask=mask)


def _encoded(prompt: str | Sequence[int], tokenizer: Any) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if tokenizer is None:
        raise ConfigError(
            "a prompt in words is read by the checkpoint's tokenizer, and it has none; give token numbers"
        )
    return list(tokenizer(prompt)["input_ids"])


class Stream:
    """The text of one prompt's tokens, piece by piece: what is added to it is not changed any more."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, token: int) -> str:
        """What there is to show now; nothing while a character is unfinished."""
        self._tokens.append(token)
        return self._new(whole=False)

    def end(self) -> str:
        """The rest."""
        return self._new(whole=True)

    def restart(self) -> None:
        """From no tokens on."""
        self._tokens.clear()
        self._shown = 0

    def _new(self, *, whole: bool) -> str:
        text = text_of(self._tokens, self._tokenizer)
        if not whole and text.endswith(_UNFINISHED):
            return ""
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return new


def text_of(tokens: Sequence[int], tokenizer: Any) -> str:
    """Tokens as text, without special ones; numbers where there is no tokenizer."""
    if tokenizer is None:
        return "".join(f"{token} " for token in tokens)
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
