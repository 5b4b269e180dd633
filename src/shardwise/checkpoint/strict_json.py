"""JSON that is read strictly: every surprise is a CheckpointError that names file, field and repair.

Knows JSON and how to complain. Refuses to know what the fields mean.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

from shardwise.errors import CheckpointError

__all__ = ["DAMAGED", "Record", "parse_object"]

DAMAGED = "the file is damaged: load an older checkpoint, or copy the file again from where it came"


def parse_object(data: bytes, *, path: Path) -> Record:
    """The JSON object in `data`, which came from `path`.

    Refuses other values at the top, bytes that are no UTF-8, NaN and infinity, and repeated keys.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{path} must hold JSON, but: {error}; {DAMAGED}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}; {DAMAGED}")
    return Record(path=path, where="", fields=value)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One JSON object inside a file; `where` is its place in there, such as "content.tensors.w"."""

    path: Path
    where: str
    fields: dict[str, object]

    def refuse(self, name: str, *, rule: str) -> NoReturn:
        """Raise the CheckpointError for one field."""
        value = repr(self.fields.get(name, "nothing"))
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise CheckpointError(f"{self.path}: field {self._place(name)} {rule}, got {shown}; {DAMAGED}")

    def only(self, *names: str) -> None:
        """Check that the object has these fields and no other."""
        for name in names:
            if name not in self.fields:
                self.refuse(name, rule="must be there")
        for name in self.fields:
            if name not in names:
                self.refuse(name, rule=f"is unknown; known are {', '.join(names)}")

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else self.refuse(name, rule="must be a string")

    def integer(self, name: str) -> int:
        """A whole number from 0 up."""
        value = self.fields.get(name)
        return value if _is_count(value) else self.refuse(name, rule="must be a whole number from 0 up")

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers from 0 up."""
        values = self.fields.get(name)
        if not isinstance(values, list):
            self.refuse(name, rule="must be a list of whole numbers")
        counts = tuple(value for value in values if _is_count(value))
        if len(counts) != len(values):
            self.refuse(name, rule="must be a list of whole numbers from 0 up")
        return counts

    def record(self, name: str) -> Record:
        value = self.fields.get(name)
        if not isinstance(value, dict):
            self.refuse(name, rule="must be an object")
        return Record(path=self.path, where=self._place(name), fields=value)

    def records(self, name: str) -> Sequence[Record]:
        values = self.fields.get(name)
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.refuse(name, rule="must be a list of objects")
        place = self._place(name)
        return [Record(path=self.path, where=f"{place}[{number}]", fields=value) for number, value in enumerate(values)]

    def _place(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return unique


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")
