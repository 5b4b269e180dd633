"""What a run names as "package.module:function": found, or refused with the reason."""

from __future__ import annotations

import importlib
from typing import Any

from shardwise.errors import ConfigError

__all__ = ["found"]


def found(name: str, what: str) -> Any:
    """The function "package.module:function"; `what` is who names it, such as "a task". Raises ConfigError."""
    module_name, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{what} {name!r} names a module and a function in it: {error}; correct the name") from error
