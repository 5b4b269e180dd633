"""Kernels and exchanges of the parts of a profile in JSON: lists that many parts share stand there once.

    {"calls": [{…, "kernels": 0}, {…, "kernels": 0}], "lists": [[{"kind": "matmul", …}, …]]}

Knows how values are written and read; refuses to know what they cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardwise.describe.kernels import Exchange, ExchangeKind, Kernel, KernelKind, Phase

__all__ = ["Lists", "lists_from", "with_lists"]

_LISTED = ("kernels", "exchanges")


class Lists:
    """Kernels and exchanges of parts, as plain lists: those that many parts share stand there once."""

    def __init__(self) -> None:
        self.lists: list[list[dict[str, Any]]] = []
        self._known: dict[tuple[Kernel | Exchange, ...], int] = {}

    def plain(self, part: Any) -> dict[str, Any]:
        """A part with numbers of `lists` in place of its own."""
        fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
        return fields | {name: self._number(fields[name]) for name in _LISTED if fields.get(name)}

    def _number(self, values: tuple[Kernel | Exchange, ...]) -> int:
        if values not in self._known:
            self._known[values] = len(self.lists)
            self.lists.append([_told(value) for value in values])
        return self._known[values]


def _told(value: Kernel | Exchange) -> dict[str, Any]:
    """Without what is as it is by default."""
    given = {field.name: (getattr(value, field.name), field.default) for field in dataclasses.fields(value)}
    return {name: own for name, (own, default) in given.items() if own != default}


def lists_from(told: Iterable[Iterable[Mapping[str, Any]]]) -> list[tuple[Kernel | Exchange, ...]]:
    """The values of `Lists.lists`."""
    return [tuple(_of_list(each) for each in values) for values in told]


def _of_list(told: Mapping[str, Any]) -> Kernel | Exchange:
    fields: dict[str, Any] = {name: tuple(own) if isinstance(own, list) else own for name, own in told.items()}
    fields["phase"] = Phase(fields["phase"])
    if "axis" in fields:
        return Exchange(**fields | {"kind": ExchangeKind(fields["kind"])})
    return Kernel(**fields | {"kind": KernelKind(fields["kind"])})


def with_lists(part: Mapping[str, Any], lists: Sequence[object]) -> dict[str, Any]:
    """A part with its kernels and exchanges as values; profiles without them are older."""
    found = {**part}
    for name in _LISTED:
        if name in part:
            found[name] = lists[part[name]] if isinstance(part[name], int) else ()
    return found
