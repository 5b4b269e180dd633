"""Results that are slow to make, kept in folders named by what they were made from.

A folder is filled under another name and then renamed, so a reader finds all of it or nothing, also after a
kill and when several processes make the same one. It knows no tokenizer and no corpus, and it never deletes
what is finished.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

__all__ = ["content_key", "filled_folder"]


def content_key(parts: Iterable[str | bytes]) -> str:
    """32 hexadecimal digits that stand for these parts; ("ab", "c") and ("a", "bc") differ."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def filled_folder(final: Path, fill: Callable[[Path], None]) -> Path:
    """`final`, made by calling `fill` with an empty folder if it is not there yet; whole or absent at every
    moment.

    Whoever renames first wins and the others' work is dropped: equal names stand for equal contents. A
    process that is killed while filling leaves a hidden folder that nobody reads.
    """
    if final.is_dir():
        return final
    draft = final.parent / f".{final.name}.{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        fill(draft)
        _flush(draft)
        _rename(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return final


def _rename(draft: Path, final: Path) -> None:
    try:
        draft.rename(final)
    except OSError:
        if not final.is_dir():  # anything else than "another process was first" is the caller's to hear
            raise


def _flush(folder: Path) -> None:
    """Push the files to the disk before the rename shows them: a power cut must not leave empty ones."""
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
