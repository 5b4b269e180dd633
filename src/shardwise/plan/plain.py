"""Frozen dataclasses as JSON values and back, by the types of their fields: numbers, text, enumerations, tuples,
mappings, other dataclasses. What stays at its default is left out. Knows types; refuses to know what they mean.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from shardwise.errors import ConfigError

__all__ = ["from_plain", "to_plain"]


def to_plain(value: Any) -> Any:
    """What `json.dumps` takes; `from_plain` makes an equal value of it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(own)
            for field in dataclasses.fields(value)
            if field.init and not _is_default(field, own := getattr(value, field.name))
        }
    if isinstance(value, Mapping):
        return {str(key): to_plain(own) for key, own in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(own) for own in value]
    return value.value if isinstance(value, enum.Enum) else value


def from_plain(hint: Any, value: Any, where: str = "") -> Any:
    """The value of a type. Raises `ConfigError`: the place, and what stands there; what the dataclasses raise."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        others = [each for each in arguments if each is not type(None)]
        return None if value is None and len(others) < len(arguments) else from_plain(others[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    if origin is tuple:
        _is(isinstance(value, list), "a list", value, where)
        kinds = [arguments[0]] * len(value) if arguments[-1:] == (Ellipsis,) else arguments
        pairs = zip(kinds, value, strict=True)
        return tuple(from_plain(kind, own, f"{where}[{index}]") for index, (kind, own) in enumerate(pairs))
    if origin is not None and issubclass(origin, Mapping):
        _is(isinstance(value, Mapping), "a table", value, where)
        return {arguments[0](key): from_plain(arguments[1], own, f"{where}.{key}") for key, own in value.items()}
    if issubclass(hint, enum.Enum):
        return hint(value)
    if hint in (int, float):
        _is(isinstance(value, int | float) and not isinstance(value, bool), "a number", value, where)
        return hint(value)
    _is(isinstance(value, hint), hint.__name__, value, where)
    return value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    _is(isinstance(value, Mapping), "a table", value, where)
    hints = _hints(kind)
    for name in value:
        _is(name in hints, f"one of {', '.join(hints)}", name, where)
    try:
        return kind(**{name: from_plain(hints[name], own, f"{where}.{name}") for name, own in value.items()})
    except TypeError as error:  # a field is missing
        raise ConfigError(f"{where or 'the file'} is a {kind.__name__}, but {error}; write it again") from error


def _is(good: bool, rule: str, value: object, where: str) -> None:
    if not good:
        raise ConfigError(f"{where or 'the file'} holds {rule}, but got {value!r}; write it again")


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    if field.default is not dataclasses.MISSING:
        return bool(value == field.default)
    return field.default_factory is not dataclasses.MISSING and bool(value == field.default_factory())
