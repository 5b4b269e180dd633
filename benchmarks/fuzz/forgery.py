"""Forgeries: files whose form is right and whose content is not. A tree of JSON or TOML values with one or a few nodes
changed, written again with checksums and lengths that fit.
"""

from __future__ import annotations

import copy
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzz.damage import MARK

__all__ = ["forge", "forged_header", "forged_json", "forged_manifest", "toml_text"]

_COMMAND = f"__import__('os').system('touch {MARK}')"
_POISON: tuple[Any, ...] = (
    *(-1, 0, 1, 2**31, 2**63, 2**70, 10**30, -(2**63), 0.5, -0.25, 1e308, True, False),
    *("", " ", "a", "\u0000", "\ud7ff", "../../outside", "/etc/passwd", "C:\\windows", "nan", "1" * 5000, "é" * 300),
    *(_COMMAND, f"$(touch {MARK})", f"`touch {MARK}`", f"!!python/object/apply:os.system ['touch {MARK}']"),
    *([], {}, [[]], [None], [0], {"": {}}, {"__class__": "os.system", "args": [f"touch {MARK}"]}),
    {"py/object": "os.system", "py/reduce": [f"touch {MARK}"]},
    None,
)
_NAMES = ("", "extra", "__proto__", "__init__", "self", "../x", "a" * 2000, "step", "\u0000")


def forge(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """A changed copy of a tree of dicts and lists, and what was changed."""
    changed = copy.deepcopy(tree)
    told = [_one(changed, chance) for _ in range(chance.choice([1, 1, 1, 2, 5]))]
    return changed, "; ".join(told)


def forged_json(path: Path, chance: random.Random) -> str:
    """The JSON file, or one line of a file of lines, with nodes changed."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines):
        number = chance.randrange(len(lines))
        tree, told = forge(json.loads(lines[number]), chance)
        lines[number] = json.dumps(tree)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return f"line {number + 1}: {told}"
    tree, told = forge(json.loads("\n".join(lines)), chance)
    text = json.dumps(tree)
    if chance.random() < 0.1:
        text, told = _odd_text(text, chance)
    path.write_text(text, encoding="utf-8")
    return told


def forged_manifest(path: Path, chance: random.Random) -> str:
    """The manifest of a checkpoint with nodes of its content changed, and a checksum that fits."""
    outer = json.loads(path.read_text(encoding="utf-8"))
    part = chance.choice(["content", "state", "tensors", "piece"])
    if part == "content":
        outer["content"], told = forge(outer["content"], chance)
    elif part == "piece":
        name = chance.choice(sorted(outer["content"]["tensors"]))
        tensors = outer["content"]["tensors"]
        tensors[name], told = forge(tensors[name], chance)
    else:
        outer["content"][part], told = forge(outer["content"][part], chance)
    text = json.dumps(outer["content"], sort_keys=True, separators=(",", ":"))
    outer["crc32"] = f"{zlib.crc32(text.encode()):08x}"
    path.write_text(json.dumps(outer), encoding="utf-8")
    return f"{part}: {told}"


def forged_header(path: Path, chance: random.Random) -> str:
    """A safetensors file whose header says something else, with a length that fits."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    tree, told = forge(json.loads(data[8 : 8 + size]), chance)
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    return told


def toml_text(tree: dict[str, Any]) -> str:
    """TOML of a tree without None: every table inline, which the format allows."""
    return "".join(f"{json.dumps(name)} = {_toml_value(value)}\n" for name, value in tree.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(name)} = {_toml_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return '"none"' if value is None else json.dumps(value)


def _odd_text(text: str, chance: random.Random) -> tuple[str, str]:
    """JSON that parsers differ about."""
    odd: list[tuple[str, Callable[[], str]]] = [
        ("a hundred thousand brackets", lambda: "[" * 100_000),
        ("nested as deep", lambda: '{"a":' * 100_000 + "1" + "}" * 100_000),
        ("a key twice", lambda: text[:-1] + "," + text[1:]),
        ("NaN", lambda: '{"a": NaN}'),
        ("a number of 10,000 digits", lambda: '{"step": ' + "9" * 10_000 + "}"),
        ("more behind its end", lambda: text + text),
        ("a byte order mark", lambda: "\ufeff" + text),
        ("half a surrogate", lambda: '{"\\ud800": "\\ud800"}'),
    ]
    told, made = chance.choice(odd)
    return made(), told


def _one(tree: Any, chance: random.Random) -> str:
    """Change one node in place."""
    places = [place for place in _places(tree, ()) if place]
    if not places:
        return "nothing to change"
    place = chance.choice(places)
    parent = tree
    for step in place[:-1]:
        parent = parent[step]
    last, where = place[-1], ".".join(map(str, place))[:80]
    action = chance.choice(["replace", "replace", "replace", "remove", "rename", "double", "other", "type"])
    if action == "remove":
        del parent[last]
        return f"{where} removed"
    if action == "rename" and isinstance(parent, dict):
        name = chance.choice(_NAMES)
        parent[name] = parent.pop(last)
        return f"{where} renamed to {name[:20]!r}"
    if action == "double" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(parent[last]))
        return f"{where} twice"
    if action == "double":
        parent[chance.choice(_NAMES)] = copy.deepcopy(parent[last])
        return f"{where} again under another name"
    if action == "other":
        source = tree
        for step in chance.choice(places):
            source = source[step]
        parent[last] = copy.deepcopy(source)
        return f"{where} is what stands elsewhere"
    if action == "type" and not isinstance(parent[last], dict | list):
        parent[last] = str(parent[last]) if not isinstance(parent[last], str) else len(parent[last])
        return f"{where} of another type"
    poison = copy.deepcopy(chance.choice(_POISON))
    parent[last] = poison
    return f"{where} = {poison!r:.60}"


def _places(tree: Any, prefix: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The paths of all nodes; of long lists the first."""
    found = [prefix]
    if isinstance(tree, dict):
        for name, value in tree.items():
            found += _places(value, (*prefix, name))
    elif isinstance(tree, list):
        for number, value in enumerate(tree[:20]):
            found += _places(value, (*prefix, number))
    return found
