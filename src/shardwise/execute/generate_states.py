"""What a model remembers of texts in attributes of its modules, beside its cache: every micro-batch has its own.

    pass of        texts 0     texts 1     texts 0
    .conv_state    a0          b0          a1         put in before a pass, taken out behind it
    found          None                               what was there before the first pass, and is again in the end

Which attributes these are is seen by the first passes of each micro-batch. Knows modules; no caches, no stages.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn

from shardwise.errors import ModelError
from shardwise.trace.extras import changed_attributes
from shardwise.trace.tape import AtAttribute

__all__ = ["LeftShapes", "ModuleStates", "States"]

States = dict[AtAttribute, torch.Tensor]
LeftShapes = Mapping[AtAttribute, tuple[torch.Size, torch.dtype]]

_MISSING = object()


class ModuleStates:
    """The tensors that forwards of `model` leave in attributes of its modules."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._names = {module: name for name, module in self._modules.items()}
        self._found: dict[AtAttribute, Any] = {}  # what stood there before anything was generated
        self._forget()

    @contextlib.contextmanager
    def of(self, own: States, *, looks: bool) -> Iterator[None]:
        """Inside, modules hold what is in `own`, which is what a pass has left there afterwards; then what was found.

        `looks`: see whether the pass leaves something that none before has left. Raises `ModelError` for a tensor that
        is left inside a list or a dictionary.
        """
        for place, found in self._found.items():
            self._put(place, own.get(place, found))
        attributes = self._attributes() if looks else {}
        changed = changed_attributes(self._model, self._names) if looks else dict
        try:
            yield
            for left in changed().values():
                assert isinstance(left, AtAttribute)
                if left.path:
                    raise ModelError(
                        f"a state of a text is kept in a cache or in an attribute that is a tensor, but "
                        f"{_dotted(left)}[{left.path[0]!r}] is one inside a container; let the model keep a "
                        "cache of transformers"
                    )
                if left not in self._found:
                    self._found[left] = attributes.get((left.module, left.name), _MISSING)
        finally:
            for place, found in self._found.items():
                value = self._values(place).get(place.name)
                if isinstance(value, torch.Tensor) and value is not found:
                    own[place] = value
                self._put(place, found)

    @contextlib.contextmanager
    def recorded(self, own: States, left: dict[AtAttribute, tuple[torch.Size, torch.dtype]]) -> Iterator[None]:
        """Inside, where a forward is recorded, modules hold what is in `own`; what it leaves is described in `left`.
        Who records puts attributes back."""
        for place, tensor in own.items():
            self._put(place, tensor)
        changed = changed_attributes(self._model, self._names)
        yield
        for each in changed().values():
            if isinstance(each, AtAttribute) and not each.path:
                tensor = self._values(each)[each.name]
                left[each] = tensor.shape, tensor.dtype

    def _forget(self) -> None:
        """States of texts that the model has met before are no beginning of others: what its class does not put there
        is taken away. Only models that keep states have any (transformers marks them)."""
        kept = [place for place, value in self._attributes().items() if value is not None]
        if not kept or not getattr(self._model, "_is_stateful", False):
            return
        described: Any = self._model
        with torch.device("meta"):
            fresh = dict(type(described)(copy.deepcopy(described.config)).named_modules())
        for module, name in kept:
            if module in fresh and vars(fresh[module]).get(name, _MISSING) is None:
                self._modules[module].__dict__[name] = None

    def _attributes(self) -> dict[tuple[str, str], Any]:
        return {
            (name, attribute): value
            for name, module in self._modules.items()
            for attribute, value in vars(module).items()
            if value is None or isinstance(value, torch.Tensor)
        }

    def _put(self, place: AtAttribute, value: Any) -> None:
        if value is _MISSING:
            self._values(place).pop(place.name, None)
        else:
            self._values(place)[place.name] = value

    def _values(self, place: AtAttribute) -> dict[str, Any]:
        values: dict[str, Any] = self._modules[place.module].__dict__
        return values


def _dotted(place: AtAttribute) -> str:
    return f"{place.module}.{place.name}" if place.module else place.name
