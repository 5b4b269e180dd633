"""Text documents from files, folders and globs, in an order that is the same on every machine, and their
split.

It knows files and text; it refuses to know tokens, sequences and batches. All documents are held in memory.
"""

from __future__ import annotations

import glob
import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwise.errors import ConfigError

__all__ = ["STDLIB", "SplitDocuments", "files_of", "read_documents", "split_documents"]

STDLIB = "stdlib"  # the source that every machine with Python has

_STDLIB_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
_MAX_HELD_OUT_FRACTION = 0.5


@dataclass(frozen=True, kw_only=True)
class SplitDocuments:
    """Documents to train on and documents held out for evaluation; no document is in both."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


def read_documents(sources: str | Sequence[str]) -> tuple[str, ...]:
    """Texts of all files that the sources name, one document a file.

    A source is a file, a folder (all files below it, hidden ones left out), a glob (`**` crosses folders), or
    "stdlib": the .py files of the running Python's standard library, without installed packages and test
    folders. A folder of that name is written "./stdlib".

    Order: by source as given, then by path in code point order; a file named twice is read once, at its first
    place. Files are decoded as UTF-8, what is not UTF-8 becomes U+FFFD; files with a NUL byte (binary ones)
    and empty ones are left out. Raises ConfigError if a source names nothing, or if no text is left.
    """
    named = (sources,) if isinstance(sources, str) else tuple(sources)
    seen: set[Path] = set()
    documents: list[str] = []
    for source in named:
        for file in files_of(source):
            resolved = file.resolve()
            if resolved not in seen:
                seen.add(resolved)
                documents += _texts(file)
    if not documents:
        raise ConfigError(
            f"a corpus needs at least one text document; {len(seen)} files of {list(named)} are all empty or "
            "binary; name files of text"
        )
    return tuple(documents)


def split_documents(documents: Sequence[str], *, held_out_fraction: float) -> SplitDocuments:
    """Split by a hash of each document's text: adding documents moves no other one, and equal texts stay
    together.

    The fraction is met on average over documents. Where few or very unequal documents miss it by more than a
    factor of 4 in characters (one big file, say), the end of every document is held out instead, cut at a
    line end. Raises ConfigError for a fraction outside [0, 0.5].
    """
    if not 0 <= held_out_fraction <= _MAX_HELD_OUT_FRACTION:
        raise ConfigError(
            f"held_out_fraction lies in [0, {_MAX_HELD_OUT_FRACTION}]; got {held_out_fraction}; 0.02 is usual"
        )
    if held_out_fraction == 0:
        return SplitDocuments(train=tuple(documents), held_out=())
    held_out = tuple(text for text in documents if _position(text) < held_out_fraction)
    share = sum(map(len, held_out)) / max(1, sum(map(len, documents)))
    if held_out_fraction / 4 <= share <= min(4 * held_out_fraction, (1 + held_out_fraction) / 2):
        train = tuple(text for text in documents if _position(text) >= held_out_fraction)
        return SplitDocuments(train=train, held_out=held_out)
    return _split_ends(documents, held_out_fraction)


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _split_ends(documents: Sequence[str], held_out_fraction: float) -> SplitDocuments:
    train, held_out = [], []
    for text in documents:
        wanted = round(len(text) * (1 - held_out_fraction))
        cut = text.rfind("\n", 0, wanted) + 1 or wanted  # a text without line ends is cut where it falls
        train.append(text[:cut])
        held_out.append(text[cut:])
    return SplitDocuments(train=tuple(filter(None, train)), held_out=tuple(filter(None, held_out)))


def files_of(source: str, *, repair: str = f"correct the path, or use {STDLIB!r}") -> list[Path]:
    """Files of one source of `read_documents`, sorted. Raises ConfigError if there are none, with `repair`."""
    path = Path(source).expanduser()
    if source == STDLIB:
        files = _stdlib_files()
    elif path.is_file():
        files = [path]
    elif path.is_dir():
        files = _sorted_below(path, _visible(path))
    else:
        files = sorted(
            (Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()),
            key=Path.as_posix,
        )
    if not files:
        raise ConfigError(
            f"a source names at least one file; {source!r} is no file, no folder with files and no glob that "
            f"matches (seen from {Path.cwd()}); {repair}"
        )
    return files


def _visible(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file


def _stdlib_files() -> list[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    sources = (f for f in folder.rglob("*.py") if _STDLIB_LEFT_OUT.isdisjoint(f.relative_to(folder).parts))
    return _sorted_below(folder, (f for f in sources if f.is_file()))


def _sorted_below(folder: Path, files: Iterator[Path]) -> list[Path]:
    return sorted(files, key=lambda file: file.relative_to(folder).as_posix())


def _texts(file: Path) -> list[str]:
    """The file's text as a list of one, or of none if it is binary or empty."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"every file of a corpus is readable; {file}: {error.strerror}; leave it out") from error
    if not data or b"\x00" in data:
        return []
    text = data.decode("utf-8-sig", errors="replace")
    return [text] if text else []
