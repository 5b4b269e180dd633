"""Clusters as TOML: every field by its name, numbers with the units that people write, and back without a digit lost.

    name = "two hosts"                                  a file with one cluster; or with several, which then stand
    [[links]]                                           each under [[clusters]]: one machine behaves as another where
    name = "PCIe"                                       its cores are shared by twice as many ranks
    bytes_per_s = "31 GB/s"

The unit of a field follows from its name (`…_s`, `…_bytes`, `…bytes_per_s`, `…flops_per_s`, `…_flops`), so a field that
is added to a cluster is written and read without a line here. Knows text; refuses to know what the numbers mean.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.describe.cluster import Cluster
from shardwise.errors import ConfigError
from shardwise.files import read_text
from shardwise.quantities import (
    exact_bytes,
    exact_flops,
    exact_rate,
    exact_seconds,
    parse_bytes,
    parse_flops,
    parse_rate,
    parse_seconds,
)

__all__ = ["cluster_text", "clusters_from", "read_clusters", "value_from"]

_SEVERAL = "clusters"


def read_clusters(path: str | Path) -> tuple[Cluster, ...]:
    """All clusters of a file, in its order. Raises `ConfigError` where it is not there, no TOML, or no cluster."""
    text = read_text(path, what="a cluster file", repair="name a cluster file, or a cluster")
    try:
        return clusters_from(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}; mend that line") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def clusters_from(tables: Mapping[str, Any]) -> tuple[Cluster, ...]:
    """Of a parsed file: one cluster, or those under `clusters`. Raises `ConfigError`."""
    if _SEVERAL not in tables:
        return (value_from(Cluster, tables),)
    if others := sorted(set(tables) - {_SEVERAL}):
        raise ConfigError(f"a file of several clusters has [[clusters]] alone, but got {others}; move it into one")
    return tuple(_field(tuple[Cluster, ...], tables[_SEVERAL], _SEVERAL))


def cluster_text(clusters: Cluster | Sequence[Cluster], *, comment: str = "") -> str:
    """What `read_clusters` reads as the same clusters; `comment` stands above, a `#` before each line."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    if isinstance(clusters, Cluster):
        return "\n".join([*lines, *_table(clusters, "")]).lstrip("\n") + "\n"
    for cluster in clusters:
        lines += ["", f"[[{_SEVERAL}]]", *_table(cluster, f"{_SEVERAL}.")]
    return "\n".join(lines).lstrip("\n") + "\n"


# -- writing ------------------------------------------------------------------------------------------


def _table(value: Any, prefix: str) -> list[str]:
    """Plain fields first, then tables: those of a dataclass or a mapping, and arrays of dataclasses."""
    plain: list[str] = []
    tables: list[str] = []
    for field in dataclasses.fields(value):
        own, name = getattr(value, field.name), prefix + field.name
        if own is None:
            continue
        if dataclasses.is_dataclass(own):
            tables += ["", f"[{name}]", *_table(own, f"{name}.")]
        elif isinstance(own, Mapping):
            tables += ["", f"[{name}]", *(f"{_key(key)} = {_written(field.name, own[key])}" for key in own)]
        elif isinstance(own, tuple) and own and dataclasses.is_dataclass(own[0]):
            for each in own:
                tables += ["", f"[[{name}]]", *_table(each, f"{name}.")]
        elif isinstance(own, tuple):
            plain.append(f"{field.name} = [{', '.join(_written(field.name, each) for each in own)}]")
        else:
            plain.append(f"{field.name} = {_written(field.name, own)}")
    return [*plain, *tables]


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _quoted(name)


def _written(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    unit = _unit(name)
    return repr(value) if unit is None else f'"{unit.write(value)}"'


def _quoted(text: str) -> str:
    """A basic string of TOML."""
    special = {'"': '\\"', "\\": "\\\\"}
    return '"' + "".join(special.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


# -- reading ------------------------------------------------------------------------------------------


def value_from(kind: Any, tables: Any, where: str = "") -> Any:
    """A dataclass of numbers, text and other dataclasses, from a table. Raises `ConfigError`: the place, what may stand
    there, the repair."""
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{where} is a table of {_names(kind)}, but got {tables!r}; write one")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in tables:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            meant = f"; did you mean {near[0]}?" if near else "; take it out"
            raise ConfigError(f"{where or 'a cluster'} has {_names(kind)}, but got {name}{meant}")
    missing = [name for name, each in fields.items() if name not in tables and _is_needed(each)]
    if missing:
        raise ConfigError(f"{where or 'a cluster'} needs {', '.join(missing)}, and has {sorted(tables)}; add it")
    inside = f"{where}." if where else ""
    return kind(**{name: _field(hints[name], tables[name], inside + name) for name in tables})


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _names(kind: Any) -> str:
    return ", ".join(field.name for field in dataclasses.fields(kind))


def _field(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None, where none is written by leaving it out
        return _field(next(each for each in arguments if each is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return value_from(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} is a list, but got {value!r}; write [[{where}]] tables, or numbers in brackets")
        return tuple(_field(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(value))
    if origin is not None:  # a mapping of names to numbers
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is a table of names and numbers, but got {value!r}; write [{where}]")
        return {name: _scalar(arguments[1], each, f"{where}.{name}", of=where) for name, each in value.items()}
    return _scalar(hint, value, where, of=where)


def _scalar(hint: type, value: Any, where: str, *, of: str) -> Any:
    if hint is str or hint is bool:
        if not isinstance(value, hint):
            raise ConfigError(f"{where} is {'text' if hint is str else 'true or false'}, but got {value!r}; mend it")
        return value
    unit = _unit(of.rpartition(".")[2].partition("[")[0], whole=hint is int)
    try:
        if isinstance(value, bool) or not isinstance(value, int | float if unit is None else int | float | str):
            such = "" if unit is None else f' such as "{unit.example}"'
            raise ConfigError(f"it is a number{such}, but got {value!r}; mend it")
        number = value if unit is None or not isinstance(value, str) else unit.read(value)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if hint is int and number != int(number):
        raise ConfigError(f"{where} is a whole number, but got {value!r}; round it")
    return hint(number)


# -- units --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class _Unit:
    write: Callable[[float], str]
    read: Callable[[str], float]
    example: str


def _unit(name: str, *, whole: bool = False) -> _Unit | None:
    """Of a field, by its name; None: a plain number. `whole`: of bytes, whether parts of one are rounded."""
    if name.endswith("bytes_per_s"):
        return _Unit(exact_rate, parse_rate, "50 GB/s")
    if name.endswith("flops_per_s"):
        return _Unit(lambda x: exact_rate(x, "flops"), lambda text: parse_rate(text, "flops"), "312 Tflops/s")
    if name.endswith("_bytes"):
        return _Unit(exact_bytes, parse_bytes if whole else lambda text: parse_rate(f"{text}/s"), "80 GB")
    if name.endswith("_flops"):
        return _Unit(exact_flops, parse_flops, "2 Gflops")
    if name.endswith("_s"):
        return _Unit(exact_seconds, parse_seconds, "5 us")
    return None
