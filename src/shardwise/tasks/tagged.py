"""Sentences whose words have tags: CoNLL and IOB files, and folders of the `datasets` library.

    word … tag        a word a line, its tag in the last column (or any other); a blank line ends a sentence
    # text, -DOCSTART-        left out

It knows files; it refuses to know tokens and labels as numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError
from shardwise.tasks.task import Split

__all__ = ["Columns", "Sentence", "read_conll", "read_tagged"]

_TAG = re.compile(r"O|[BIESLUM]-\S+")
_SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".txt", ".tsv")
_NAMES: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "held_out": ("dev", "valid", "test")}


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """Words and their tags, as many."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where words and tags stand: columns of a file from 0 (-1 is the last), or features of a data set."""

    word: int = 0
    tag: int = -1
    words: str = "tokens"
    tags: str = "ner_tags"


def read_tagged(data: Path, files: Mapping[Split, str], columns: Columns) -> dict[Split, tuple[Sentence, ...]]:
    """The sentences of both splits.

    `data` is a folder that `datasets` saved, with splits train and validation (or dev, test), or one of CoNLL files;
    `files` names those of a split in it, empty where one of the usual names is there. Raises ConfigError.
    """
    if not data.is_dir():
        raise ConfigError(f"task.data is a folder of tagged sentences, but {data} is none; correct the path")
    if (data / "dataset_dict.json").is_file():
        return {split: _of_data_set(data, split, columns) for split in _NAMES}
    found: dict[Split, Path] = {split: _file(data, split, files.get(split, "")) for split in _NAMES}
    return {split: read_conll(file, columns) for split, file in found.items()}


def read_conll(file: Path, columns: Columns) -> tuple[Sentence, ...]:
    """The sentences of a file. Raises ConfigError with the line that has no tag."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"tagged sentences are a text file in UTF-8, but {file}: {error}; correct the path"
        ) from error
    sentences = tuple(_sentences(text, file, columns))
    if not sentences:
        raise ConfigError(f"{file} holds no sentence; give a file with a word and its tag in every line")
    return sentences


def _sentences(text: str, file: Path, columns: Columns) -> Iterator[Sentence]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            if words:
                yield Sentence(words=tuple(words), tags=tuple(tags))
            words, tags = [], []
            continue
        word, tag = _at(fields, columns.word), _at(fields, columns.tag)
        if line.startswith("#") and _TAG.fullmatch(tag) is None:
            continue
        if len(fields) < 2 or not word or _TAG.fullmatch(tag) is None:
            raise ConfigError(
                f"{file}:{number}: a line has a word and a tag such as O or B-PER, but column {columns.tag} of "
                f"{line[:60]!r} is {tag!r}; correct it, or set task.tag_column"
            )
        words.append(word)
        tags.append(tag)


def _at(fields: Sequence[str], column: int) -> str:
    return fields[column].strip() if -len(fields) <= column < len(fields) else ""


def _file(data: Path, split: Split, given: str) -> Path:
    if given:
        return data / given
    files = sorted(file for file in data.iterdir() if file.suffix in _SUFFIXES)
    for name in _NAMES[split]:
        named = [file for file in files if name in file.stem.lower()]
        if len(named) == 1:
            return named[0]
        if named:
            raise ConfigError(
                f"{data} has several files for {split}: {', '.join(file.name for file in named)}; name one: "
                f'task.{split} = "{named[0].name}"'
            )
    raise ConfigError(
        f"{data} has no file for {split}: none of {', '.join(file.name for file in files) or 'its files'} has "
        f'{" or ".join(_NAMES[split])} in its name; name one: task.{split} = "…"'
    )


def _of_data_set(data: Path, split: Split, columns: Columns) -> tuple[Sentence, ...]:
    splits = _load(data)
    name = next((known for wanted in _NAMES[split] for known in splits if wanted in known), None)
    if name is None:
        raise ConfigError(f"{data} has splits {', '.join(splits)}, but none for {split}; save it with one")
    rows = splits[name]
    missing = [column for column in (columns.words, columns.tags) if column not in rows.features]
    if missing:
        raise ConfigError(
            f"the data set in {data} has columns {', '.join(rows.features)}, but no {missing[0]}; set "
            f"task.{'words' if missing[0] == columns.words else 'tags'}_feature"
        )
    label = getattr(rows.features[columns.tags], "feature", None)
    names: Sequence[str] | None = getattr(label, "names", None)

    def tag(value: object) -> str:
        return names[value] if names is not None and isinstance(value, int) else str(value)

    return tuple(
        Sentence(words=tuple(map(str, row[columns.words])), tags=tuple(tag(value) for value in row[columns.tags]))
        for row in rows
    )


def _load(data: Path) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{data} was saved by the `datasets` library, which is not installed; run: pip install 'shardwise[tasks]'"
        ) from error
    loaded: Mapping[str, Any] = datasets.load_from_disk(str(data))
    return loaded
