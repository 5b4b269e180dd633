"""Durable steps on a disk: files replaced whole, folders synced, failures told as CheckpointErrors.

Knows the order in which bytes become safe. Refuses to know what the bytes mean.

A file is safe once its bytes are synced (fsync of the file) and its name is (fsync of its folder); os.replace
swaps a name in one step, so a reader sees the old file or the new one, never a part.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shardwise.errors import CheckpointError
from shardwise.files import irregular

__all__ = ["check_file", "disk_errors", "replace_file", "sync_folder", "temporary_name", "write_synced"]


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an OSError inside into a CheckpointError: action, path, and what the system said."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"could not {action} {path}: {reason}; check the path, its permissions and the free space"
        ) from error


def check_file(path: Path) -> None:
    """Raise CheckpointError where there is no regular file: reading a named pipe would never end."""
    with disk_errors("read", path):
        kind = irregular(path)
    if kind is not None:
        raise CheckpointError(f"{path} must be a regular file, but is {kind}; copy it again from where it came")


def temporary_name(name: str) -> str:
    """A fresh name beside `name` that no finished thing ever has."""
    return f"{name}.tmp-{secrets.token_hex(4)}"


def sync_folder(folder: Path) -> None:
    """Make the names in a folder safe against a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and sync its bytes; its name is safe after `sync_folder`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new bytes in one step: a crash leaves the old file or the new one."""
    temporary = path.with_name(temporary_name(path.name))
    with disk_errors("write", path):
        write_synced(temporary, data)
        os.replace(temporary, path)
        sync_folder(path.parent)
