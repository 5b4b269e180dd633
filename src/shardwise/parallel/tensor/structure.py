"""What makes two modules alike, in words: classes, settings, shapes of tensors and which of them are one.

Two blocks with equal words, called alike and doing the same operations, share a proof; so a setting that is missed here
lets what was proven of one be used for another. Knows modules and plain values; refuses to know what settings mean.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
import torch.nn as nn

__all__ = ["Structures"]

_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}  # tables of parameters, children and hooks
_NUMBERS = frozenset({"layer_idx"})  # which block it is; what it does otherwise for that, its operations show
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_FUNCTIONS = (*_NAMED, types.MethodDescriptorType, types.WrapperDescriptorType)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


class Structures:
    """Words for modules of one model; settings that many of them share (its config) are put into words once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, str]] = {}  # id -> the object, kept so that its id stays its own

    def of(self, module: nn.Module) -> str:
        """Everything that makes two modules alike but the values of their tensors."""
        lines: list[str] = []
        numbers: dict[int, int] = {}  # of tensors: one that has two names has one number
        for name, part in module.named_modules(remove_duplicate=False):
            settings = [(key, self._told(value)) for key, value in sorted(_settings(vars(part)).items())]
            tensors = [
                (key, tuple(t.shape), str(t.dtype), t.requires_grad, numbers.setdefault(id(t), len(numbers)))
                for key, t in _tensors(part)
            ]
            lines.append(f"{name} {_class(type(part))} {settings} {tensors}")
        return "\n".join(lines)

    def _told(self, value: object) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, torch.Tensor):
            return f"tensor {tuple(value.shape)} {value.dtype}"
        if isinstance(value, nn.Module):
            return _class(type(value))
        if id(value) not in self._known:
            self._known[id(value)] = value, "itself"  # what holds itself
            self._known[id(value)] = value, self._of_object(value)
        return self._known[id(value)][1]

    def _of_object(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{{{', '.join(sorted(f'{self._told(k)}: {self._told(v)}' for k, v in value.items()))}}}"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self._told, value))}]"
        if isinstance(value, (set, frozenset)):
            return f"{{{', '.join(sorted(map(self._told, value)))}}}"
        if isinstance(value, functools.partial):
            return f"partial {self._told(value.func)} {self._told(value.args)} {self._told(value.keywords)}"
        if isinstance(value, _FUNCTIONS):
            return f"{value.__module__ if isinstance(value, _NAMED) else ''}.{value.__qualname__}"
        own = getattr(value, "__dict__", {})  # what is there, and not what asking for it raises (some configs do)
        if not own and dataclasses.is_dataclass(value):  # with slots
            own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{_class(type(value))} {self._told(_settings(own))}"


def _settings(own: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in own.items() if key not in _OF_TORCH and key not in _NUMBERS}


def _class(of: type) -> str:
    return f"{of.__module__}.{of.__qualname__}"


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None:
                yield name, tensor
