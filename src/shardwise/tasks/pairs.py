"""Pairs of texts that say the same in two languages: cleaned, each source once, divided into two splits.

    read ──clean: one line, no mnemonics──► which are kept ──each source once──► train and held out, by a hash

It knows texts; it refuses to know files, tokens and models.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shardwise.errors import ConfigError

__all__ = ["Pair", "SplitPairs", "clean_pair", "fault_of", "split_pairs", "words_of"]

_MNEMONIC = re.compile(r"[_&~](?=\w)")  # "_File", "Ex~port": the key that chooses it
_MAX_RATIO, _SLACK_CHARS = 3, 10  # of the lengths of a pair in characters; short ones differ more
_MAX_HELD_OUT_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A text and its translation."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True)
class SplitPairs:
    """Pairs to train on and pairs held out, in an order that their texts alone decide: the first ones are a sample of
    all. `left_out` counts the others by reason."""

    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)


def split_pairs(pairs: Iterable[Pair], *, held_out: Iterable[Pair] = (), held_out_fraction: float = 0.05) -> SplitPairs:
    """Both splits of cleaned pairs: of each source its first translation; no source of a split is in the other.

    Sources are alike where their words are (`words_of`): "Row 1:" and "row 2" are in one split. `held_out` are pairs
    that are held out by their file; without them a hash of a source's words decides, so that more pairs move no other.
    Raises ConfigError for a fraction outside [0, 0.5].
    """
    if not 0 <= held_out_fraction <= _MAX_HELD_OUT_FRACTION:
        raise ConfigError(
            f"held_out_fraction lies in [0, {_MAX_HELD_OUT_FRACTION}]; got {held_out_fraction}; 0.05 is usual"
        )
    left_out: Counter[str] = Counter()
    chosen = _once(held_out, left_out)
    known = {words_of(pair.source) for pair in chosen}
    train: list[Pair] = []
    for pair in _once(pairs, left_out):
        words = words_of(pair.source)
        if known and words in known:
            left_out["held out elsewhere"] += 1
        elif not known and _position(words) < held_out_fraction:
            chosen.append(pair)
        else:
            train.append(pair)
    chosen.sort(key=lambda pair: (_position(words_of(pair.source)), pair.source))
    return SplitPairs(train=tuple(train), held_out=tuple(chosen), left_out=dict(left_out))


def clean_pair(pair: Pair) -> Pair:
    """Both texts in one line of composed characters (NFC), and without the marks of keys, as in "_File" and "Ex~port".

    A mark is the only one of its text, and no word of the other text has it at the same place: `_Bool` stays.
    Quotation marks, formats such as %s, and markup stay as they are.
    """
    source, target = _line(pair.source), _line(pair.target)
    shared = set(source.split()) & set(target.split())
    return Pair(source=_unmarked(source, shared), target=_unmarked(target, shared))


def fault_of(pair: Pair) -> str:
    """Why a cleaned pair teaches nothing: "empty", "equal" or "unequal lengths"; empty if it does."""
    source, target = pair.source, pair.target
    if not any(map(str.isalpha, source)) or not any(map(str.isalpha, target)):
        return "empty"
    if source.casefold() == target.casefold():
        return "equal"
    shorter, longer = sorted((len(source), len(target)))
    return "unequal lengths" if longer > _MAX_RATIO * shorter + _SLACK_CHARS else ""


def words_of(text: str) -> str:
    """The words of a text, in small letters, every number 0: what two texts have in common that are the same to a
    reader."""
    return re.sub(r"\d+", "0", re.sub(r"[\W_]+", " ", text.casefold()).strip())


def _once(pairs: Iterable[Pair], left_out: Counter[str]) -> list[Pair]:
    """Pairs that teach something, each source once; counts the others."""
    kept: dict[str, Pair] = {}
    for pair in map(clean_pair, pairs):
        fault = fault_of(pair) or ("known source" if pair.source in kept else "")
        if fault:
            left_out[fault] += 1
        else:
            kept[pair.source] = pair
    return list(kept.values())


def _line(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _unmarked(text: str, shared: Sequence[str] | set[str]) -> str:
    found = list(_MNEMONIC.finditer(text))
    if len(found) != 1:
        return text
    place = found[0].start()
    word = text[: place + 1].split()[-1] + text[place + 1 :].split()[0]
    return text if word in shared else text[:place] + text[place + 1 :]


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48
