"""Answers of operations on fake tensors, made from the shapes of an equal operation that was seen before.

A model repeats its layers, so most of what a trace asks has been answered once. Knows operations that make new memory,
or a view of their first argument, from nothing but the description of their arguments; whatever looks at values or
answers what it wrote goes to torch's own fake tensors. Refuses to know who asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shardwise.trace.functions import grouped_mm_like

__all__ = ["Shapes"]

_GROUPED_MM = torch.ops.aten._grouped_mm.default
_BY_VALUE = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view})
_PLAIN = frozenset({bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout})


@dataclasses.dataclass(frozen=True, slots=True)
class _Form:
    """What a tensor is made from; strides and offset in elements. A view has an offset, new memory has none."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int | None = None


_Forms = tuple[type | None, tuple[_Form | None, ...]]  # a tuple or list of tensors, or a tensor alone


class _Unknown(Exception):  # noqa: N818  a finding: the arguments are not all there is to the answer
    pass


class Shapes:
    """Runs operations on the tensors of one fake mode."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self._fake = fake
        self._plain: dict[Any, bool] = {}  # operation -> whether its arguments' descriptions are all that it asks
        self._seen: dict[object, _Forms | None] = {}

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What `func(*args, **kwargs)` answers under the fake mode."""
        if not self._repeats(func):
            return self._by_torch(func, args, kwargs)
        key: list[object] = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
        try:
            _describe(args, key)
            for name, value in kwargs.items():
                key.append(name)
                _describe((value,), key)
        except _Unknown:
            return self._by_torch(func, args, kwargs)
        described = tuple(key)
        if described in self._seen:
            forms = self._seen[described]
            return self._by_torch(func, args, kwargs) if forms is None else self._made(forms, args)
        out = self._by_torch(func, args, kwargs)
        self._seen[described] = self._forms(func, out, args, kwargs)
        return out

    def _repeats(self, func: Any) -> bool:
        known = self._plain.get(func)
        if known is None:
            known = self._plain[func] = not _BY_VALUE.intersection(func.tags) and (_views(func) or _makes(func))
        return known

    def _by_torch(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with self._fake:
            return grouped_mm_like(*args, **kwargs) if func is _GROUPED_MM else func(*args, **kwargs)

    def _forms(self, func: Any, out: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Forms | None:
        """How to make such an answer again; None if that cannot be said."""
        several = type(out) if type(out) in (tuple, list) else None
        leaves: Sequence[Any] = out if several else (out,)
        given = {leaf.untyped_storage()._cdata for leaf in _tensors((*args, *kwargs.values()))}
        forms: list[_Form | None] = []
        for leaf in leaves:
            if leaf is None:
                forms.append(None)
                continue
            if type(leaf) is not FakeTensor or leaf.constant is not None or leaf.layout is not torch.strided:
                return None
            viewed = leaf.untyped_storage()._cdata in given
            offset = int(leaf.storage_offset()) if viewed else None
            form = _Form(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.fake_device, offset)
            if viewed != (_views(func) and bool(args)) or not _alike(leaf, self._one(form, args)):
                return None
            given |= set() if viewed else {leaf.untyped_storage()._cdata}
            forms.append(form)
        return several, tuple(forms)

    def _made(self, forms: _Forms, args: Sequence[Any]) -> Any:
        several, parts = forms
        if several is None and parts[0] is not None:
            return self._one(parts[0], args)
        made = [None if form is None else self._one(form, args) for form in parts]
        return made[0] if several is None else several(made)

    def _one(self, form: _Form, args: Sequence[Any]) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            if form.offset is None:
                empty = torch.empty_strided(form.shape, form.strides, dtype=form.dtype, device="meta")
            else:
                empty = torch.empty(0, dtype=form.dtype, device="meta")
                empty.set_(args[0].untyped_storage(), form.offset, form.shape, form.strides)
        return FakeTensor(self._fake, empty, form.device)


def _views(func: Any) -> bool:
    """Whether an operation answers views of its first argument, the only tensor among them, and writes nothing."""
    arguments = func._schema.arguments
    if not func.is_view or func._schema.is_mutable or not arguments or arguments[0].alias_info is None:
        return False
    return not any("Tensor" in str(other.type) for other in arguments[1:])


def _makes(func: Any) -> bool:
    """Whether everything that an operation answers is new memory, whatever else it writes."""
    schema = func._schema
    kept = [argument for argument in schema.arguments if argument.alias_info and not argument.alias_info.is_write]
    return not kept and not any(answer.alias_info for answer in schema.returns)


def _describe(arguments: Sequence[Any], key: list[object]) -> None:
    """Append all that an operation can ask of its arguments without looking at values."""
    for leaf in arguments:
        kind = type(leaf)
        if kind in _PLAIN:
            key.append(kind)
            key.append(leaf)
        elif isinstance(leaf, torch.Tensor):
            # A real tensor without dims may be a number in disguise, whose dtype counts for less.
            fake = isinstance(leaf, FakeTensor)
            known = leaf.constant is None if isinstance(leaf, FakeTensor) else leaf.dim() > 0
            if leaf.layout is not torch.strided or not known:
                raise _Unknown
            if leaf.is_conj() or leaf.is_neg():
                raise _Unknown
            key += (fake, leaf.shape, leaf.stride(), leaf.dtype, leaf.device, leaf.storage_offset())
        elif kind in (list, tuple):
            key += (kind, len(leaf))
            _describe(leaf, key)
        else:
            raise _Unknown


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    flat = [leaf for given in arguments for leaf in (given if isinstance(given, (list, tuple)) else (given,))]
    return [leaf for leaf in flat if isinstance(leaf, torch.Tensor)]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same to every later operation."""
    sizes = a.untyped_storage().nbytes() == b.untyped_storage().nbytes() and a.storage_offset() == b.storage_offset()
    return sizes and bool(torch._C._dispatch_key_set(a) == torch._C._dispatch_key_set(b))
