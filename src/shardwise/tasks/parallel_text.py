"""Pairs of two languages from files: gettext catalogues, and text files side by side.

    de/LC_MESSAGES/git.mo            messages of a program and their translations
    news.en  news.de                 line i of one says what line i of the other says; held out: dev, valid, test

It knows which files there are and which language is which; it refuses to know what is done with pairs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.tasks.catalogues import SUFFIXES, read_catalogue
from shardwise.tasks.corpus import files_of
from shardwise.tasks.pairs import Pair

__all__ = ["ReadPairs", "read_pairs"]

_HELD_OUT = re.compile(r"(?<![a-z])(news)?(dev|valid|validation|test)(?![a-z])")


@dataclass(frozen=True, kw_only=True)
class ReadPairs:
    """Pairs as the files have them; `held_out` those of files named so."""

    pairs: tuple[Pair, ...] = field(repr=False)
    held_out: tuple[Pair, ...] = field(repr=False)
    num_files: int


def read_pairs(sources: str | Sequence[str], *, source: str, target: str) -> ReadPairs:
    """All pairs of two languages, such as en and de, in files, folders and globs, in the order that these give.

    Catalogues (.mo, .po) have their messages in `source`, unless their header says that they are translations into it:
    then they are read the other way round. Those of other languages are passed over. Text files are pairs of names that
    end in .source and .target. Raises ConfigError where nothing is found, for damaged files and unequal lines.
    """
    if not source or not target or source == target:
        raise ConfigError(
            f'a translation is between two languages, but source="{source}" and target="{target}"; name two, as en, de'
        )
    named = (sources,) if isinstance(sources, str) else tuple(sources)
    files = {file.resolve(): file for each in named for file in files_of(each, repair="correct task.data")}.values()
    pairs: list[Pair] = []
    held_out: list[Pair] = []
    others: set[str] = set()
    read = 0
    for file in files:
        found: Iterable[Pair] = ()
        if file.suffix in SUFFIXES:
            found, language = _of_catalogue(file, source, target)
            others |= {language} if language else set()
        elif file.suffix == f".{source}":
            found = _side_by_side(file, file.with_suffix(f".{target}"))
        into = held_out if file.suffix not in SUFFIXES and _HELD_OUT.search(file.stem.lower()) else pairs
        before = len(into)
        into.extend(found)
        read += len(into) > before
    if not pairs:
        raise ConfigError(_nothing(named, files, source, target, others))
    return ReadPairs(pairs=tuple(pairs), held_out=tuple(held_out), num_files=read)


def _of_catalogue(file: Path, source: str, target: str) -> tuple[list[Pair], str]:
    """The pairs of a catalogue, or none and the language that it is of."""
    read = read_catalogue(file)
    language = re.split("[_@]", read.language)[0] or target
    if language not in (source, target) and read.language not in (source, target):
        return [], read.language
    pairs = [pair for message in read.messages for pair in message.pairs]
    if source in (language, read.language):
        pairs = [Pair(source=pair.target, target=pair.source) for pair in pairs]
    return pairs, ""


def _side_by_side(first: Path, second: Path) -> list[Pair]:
    if not second.exists():
        raise ConfigError(f"{first} has its translation beside it, but there is no {second.name}; add it")
    sides = [
        read_text(file, what="a text of one language", repair="correct it, or leave it out").splitlines()
        for file in (first, second)
    ]
    if len(sides[0]) != len(sides[1]):
        raise ConfigError(
            f"a line and its translation have one number, but {first} has {len(sides[0])} lines and {second.name} "
            f"{len(sides[1])}; align them"
        )
    return [Pair(source=line, target=translated) for line, translated in zip(*sides, strict=True)]


def _nothing(named: Sequence[str], files: Iterable[Path], source: str, target: str, others: Iterable[str]) -> str:
    seen = sorted({file.suffix or file.name for file in files})
    found = f"catalogues of {', '.join(sorted(others))}" if others else f"files {', '.join(seen[:8])}"
    repair = "correct task.data or task.target" if others else "correct task.data"
    return (
        f"translations from {source} to {target} are in catalogues (.mo, .po) and in pairs of files (.{source} and "
        f".{target}), but {', '.join(named)} has {found}; {repair}"
    )
