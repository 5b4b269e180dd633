"""Damage that knows nothing of what a file means: bytes lost, turned, moved, and other things in its place.

A damage is a function of a file and a generator of random numbers; it returns what it did, in words.
"""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

__all__ = ["DAMAGES", "MARK", "Damage"]

Damage = Callable[[Path, random.Random], str]

MARK = "executed_by_a_file"  # a file of this name appears where a forged file's code was run


class _Payload:
    """An object whose unpickling runs code, as a malicious checkpoint has it."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {MARK}",)


def _cut(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    kept = chance.choice([0, 1, 7, 8, chance.randrange(len(data)), len(data) - 1])
    path.write_bytes(data[:kept])
    return f"cut to {min(kept, len(data))} of {len(data)} bytes"


def _flip(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    places = [chance.randrange(len(data)) for _ in range(chance.choice([1, 1, 1, 8, 64]))]
    for place in places:
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(bytes(data))
    return f"{len(places)} bits turned, the first in byte {places[0]}"


def _blank(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.choice([1, 16, 512, 4096]))
    value = chance.choice([0, 255])
    data[start:stop] = bytes([value]) * (stop - start)
    path.write_bytes(bytes(data))
    return f"bytes {start} to {stop} are {value}"


def _insert(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    place = chance.randrange(len(data) + 1)
    more = chance.randbytes(chance.choice([1, 8, 300]))
    path.write_bytes(data[:place] + more + data[place:])
    return f"{len(more)} bytes put in at {place}"


def _swap(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    a, b = sorted(chance.sample(range(len(data) + 1), 2))
    c = chance.randrange(b, len(data) + 1)
    path.write_bytes(data[:a] + data[b:c] + data[a:b] + data[c:])
    return f"bytes {a} to {b} behind byte {c}"


def _noise(path: Path, chance: random.Random) -> str:
    size = chance.choice([1, 8, 100, path.stat().st_size])
    path.write_bytes(chance.randbytes(size))
    return f"{size} random bytes"


def _long_header(path: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    size = chance.choice([0, 1, len(data), len(data) - 8, 2**31, 2**63 - 1, 2**64 - 1, 99_999_999])
    path.write_bytes(size.to_bytes(8, "little") + data[8:])
    return f"the first eight bytes say {size}"


def _pickled(path: Path, chance: random.Random) -> str:
    path.write_bytes(pickle.dumps(_Payload(), protocol=chance.randrange(6)))
    return "a pickle that runs a command"


def _archive(path: Path, chance: random.Random) -> str:
    """What torch.save writes: a zip archive with a pickle inside; here one that runs a command."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Payload(), protocol=2))
        archive.writestr("../../outside", b"x" * chance.randrange(100))
    path.write_bytes(packed.getvalue())
    return "an archive with a pickle that runs a command, and a name outside of it"


def _foreign(path: Path, chance: random.Random) -> str:
    begins = {
        "GGUF": b"GGUF\x03\x00\x00\x00" + bytes(64),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "NPY": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
        "PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "ELF": b"\x7fELF\x02\x01\x01" + bytes(64),
        "HTML": b"<!doctype html><title>404 Not Found</title>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
        "a script": f"#!/bin/sh\ntouch {MARK}\n".encode(),
    }
    name = chance.choice(sorted(begins))
    path.write_bytes(begins[name])
    return f"{name} in its place"


def _gone(path: Path, chance: random.Random) -> str:
    path.unlink()
    return "the file is gone"


def _folder(path: Path, chance: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _pipe(path: Path, chance: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a named pipe in its place"


def _link(path: Path, chance: random.Random) -> str:
    path.unlink()
    to = chance.choice(["/dev/zero", "/dev/null", path.name, "/proc/self/environ", "nowhere"])
    path.symlink_to(to)
    return f"a link to {to} in its place"


DAMAGES: Mapping[str, Damage] = MappingProxyType(
    {
        "cut": _cut,
        "flip": _flip,
        "blank": _blank,
        "insert": _insert,
        "swap": _swap,
        "noise": _noise,
        "long_header": _long_header,
        "pickled": _pickled,
        "archive": _archive,
        "foreign": _foreign,
        "gone": _gone,
        "folder": _folder,
        "pipe": _pipe,
        "link": _link,
    }
)
