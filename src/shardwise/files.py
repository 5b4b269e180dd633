"""Small files of text, read so that whatever stands in their place is one clear error: a folder, a named pipe (which
would never end), a device, bytes that are no UTF-8, more than anybody meant.

Knows files. Refuses to know what is in them.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardwise.errors import ConfigError, ShardwiseError

__all__ = ["check_regular", "irregular", "read_text"]

_MAX_BYTES = 1 << 30  # far beyond any description of a run; a model's weights are read otherwise


def read_text(path: str | Path, *, what: str, repair: str, error: type[ShardwiseError] = ConfigError) -> str:
    """The text of a UTF-8 file. `what` it should be ("a run file") and the `repair` stand in the error's message.

    Raises `error` where it cannot be read, is no regular file, too large, or no UTF-8.
    """
    check_regular(path, what=what, repair=repair, error=error)
    try:
        size = os.stat(path).st_size
        if size > _MAX_BYTES:
            raise error(f"{what} is a file of at most {_MAX_BYTES} bytes, but {path} has {size}; {repair}")
        return Path(path).read_text(encoding="utf-8")
    except OSError as found:
        raise error(f"{what} is a file that can be read, but {path}: {found.strerror or found}; {repair}") from found
    except UnicodeDecodeError as found:
        raise error(f"{what} is text in UTF-8, but {path} is not: {found}; {repair}") from found


def check_regular(path: str | Path, *, what: str, repair: str, error: type[ShardwiseError] = ConfigError) -> None:
    """Raise `error` where there is no regular file: nothing, a folder, a named pipe, a device."""
    try:
        kind = irregular(path)
    except (OSError, ValueError) as found:  # ValueError: a null byte in the name
        reason = found.strerror if isinstance(found, OSError) else found
        raise error(f"{what} is a file that can be read, but {path}: {reason}; {repair}") from found
    if kind is not None:
        raise error(f"{what} is a regular file, but {path} is {kind}; {repair}")


def irregular(path: str | Path) -> str | None:
    """What stands there instead of a regular file, in words; None where it is one. Raises OSError."""
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        return None
    return next((name for name, is_one in _KINDS if is_one(mode)), "no regular file")


_KINDS = (
    ("a folder", stat.S_ISDIR),
    ("a named pipe", stat.S_ISFIFO),
    ("a device", stat.S_ISCHR),
    ("a device", stat.S_ISBLK),
    ("a socket", stat.S_ISSOCK),
)
