"""What pydantic found wrong with an option, in words: the rule, what was given, the repair.

Knows pydantic's kinds of faults; refuses to know which options there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["fault_text", "unknown_text"]

# pydantic's name of a fault -> (what the value has to be, what to write)
_TYPES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "int_type": ("a whole number", "write it without quotes and point, as 8"),
        "int_parsing": ("a whole number", "write it without quotes and point, as 8"),
        "int_from_float": ("a whole number", "write it without a fraction, as 8"),
        "float_type": ("a number", "write it without quotes, as 0.1"),
        "float_parsing": ("a number", "write it without quotes, as 0.1"),
        "finite_number": ("a finite number", "write one, as 0.1"),
        "bool_type": ("true or false", "write one of them, without quotes"),
        "string_type": ("text", 'write it in quotes, as "name"'),
        "dict_type": ("a table", "write a table"),
        "model_type": ("a table", "write a table"),
        "tuple_type": ("a list", "write it in brackets, as [0.9, 0.95]"),
        "list_type": ("a list", 'write it in brackets, as ["a", "b"]'),
    }
)
# pydantic's name of a fault -> (its limit, what the value has to be, what to use)
_BOUNDS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "greater_than": ("gt", "more than", "a number above {}"),
        "greater_than_equal": ("ge", "at least", "{} or more"),
        "less_than": ("lt", "less than", "a number below {}"),
        "less_than_equal": ("le", "at most", "{} or less"),
    }
)


def fault_text(where: str, fault: Mapping[str, Any]) -> str:
    """One entry of `ValidationError.errors()` about the option `where`, as one sentence with its repair."""
    kind, given = str(fault["type"]), fault.get("input")
    limits: Mapping[str, Any] = fault.get("ctx") or {}
    if kind == "missing":
        return f"{where} is missing; add it"
    if kind in _TYPES:
        rule, repair = _TYPES[kind]
        repair = f"write [{where}] and its keys below" if rule == "a table" else repair
        return f"{where} is {rule}, but got {given!r:.200}; {repair}"
    if kind in _BOUNDS:
        name, words, repair = _BOUNDS[kind]
        bound = f"{limits[name]:g}"
        return f"{where} is {words} {bound}, but got {given!r:.200}; use {repair.format(bound)}"
    if kind == "literal_error":
        return _choice_text(where, str(limits["expected"]), given)
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def unknown_text(where: str, name: str, known: Collection[str]) -> str:
    """That `where` names no option, with the one that was meant if one is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    starting = [each for each in known if each.startswith(name)]
    meant = (close or starting)[:1]
    return f"{where} is no option; " + (f"write {meant[0]}" if meant else f"there are {', '.join(known)}")


def _choice_text(where: str, expected: str, given: object) -> str:
    """Pydantic writes choices as 'a', 'b' or 'c'."""
    choices = [part.strip().strip("'") for part in expected.replace(" or ", ",").split(",")]
    close = difflib.get_close_matches(str(given), choices, n=1)
    repair = f'write "{close[0]}"' if close else "use one of these"
    return f"{where} is one of {', '.join(choices)}, but got {given!r:.200}; {repair}"
