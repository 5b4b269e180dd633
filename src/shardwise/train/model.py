"""The model of a run: a function that builds it, and where its initial values come from.

Knows transformers' configs and classes, factories by name, and folders of safetensors. Refuses to know layouts:
a value is asked for by name, and whoever asks holds it.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from shardwise.checkpoint.source import Source
from shardwise.errors import ConfigError
from shardwise.tasks import ModelHead
from shardwise.trace.model_config import read_config
from shardwise.train.run_tables import ModelOptions
from shardwise.train.saved_values import SavedValues, names_in

__all__ = ["Values", "model_factory", "names_in", "sizes_of", "values_of"]

_CAUSAL = "AutoModelForCausalLM", "causal language model"

Values = Callable[[Sequence[str]], Mapping[str, torch.Tensor]]


def model_factory(options: ModelOptions, head: ModelHead | None = None) -> Callable[[], nn.Module]:
    """A function that builds the model, in training mode. Nothing is built here, but names and config are checked.

    `head` is what the task wants of a transformers model: the class for it, where [model] names none, and keys of the
    config that [model] does not write. A factory is given those that it has a parameter for.

    Raises ConfigError for an unknown module, function, class or config, or where nothing says what to build.
    """
    if options.factory is not None:
        factory = _found(options.factory)
        told = dict(options.options) if head is None else _told(factory, head) | options.options
        return functools.partial(_from_factory, factory, told, options.factory)
    read = _config_of(options)
    if head is not None:
        _fit(read, head, options)
    return functools.partial(
        _from_config, _class_of(read, options.class_name, head), read, getattr(torch, options.dtype)
    )


def sizes_of(options: ModelOptions) -> tuple[int | None, int | None]:
    """Rows of the embedding and positions of a transformers model; None for what its config does not say."""
    text = _config_of(options).get_text_config()
    sizes = (getattr(text, name, None) for name in ("vocab_size", "max_position_embeddings"))
    rows, places = (size if isinstance(size, int) and size > 0 else None for size in sizes)
    return rows, places


def values_of(source: Source, model: nn.Module, initial: Values | None = None) -> SavedValues:
    """The values of a model out of a source. Take it while the model still has its shapes. A head that the source does
    not have is given `initial` values."""
    return SavedValues(source, model, initial)


def _config_of(options: ModelOptions) -> Any:
    """The transformers config that [model] names or writes. Raises ConfigError with the key."""
    config, key = options.config, "model.config"
    if config is None and options.path is not None:
        config, key = str(Path(options.path).expanduser() / "config.json"), "model.path"
    if config is None:
        raise ConfigError("a run says what to train: [model] has neither config nor path nor factory; add one of them")
    try:
        return read_config(config)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _found(name: str) -> Callable[..., object]:
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model.factory names a module and a function in it, but {name!r} does not: {error}; correct it"
        ) from error
    if not callable(factory):
        raise ConfigError(f"a factory is a function, but {name!r} is a {type(factory).__name__}; name a function")
    return factory  # type: ignore[no-any-return]


def _from_factory(factory: Callable[..., object], options: Mapping[str, Any], name: str) -> nn.Module:
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a factory returns an nn.Module, but {name!r} returned a {type(model).__name__}; return one")
    return model.train()


def _told(factory: Callable[..., object], head: ModelHead) -> dict[str, Any]:
    """What follows from the data, of a factory's named parameters."""
    try:
        known = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # it cannot be looked into
        return {}
    return {name: value for name, value in {**head.config, **head.inputs}.items() if name in known}


def _fit(config: Any, head: ModelHead, options: ModelOptions) -> None:
    """Set what follows from the data; what a run writes by hand stays. A file's own is that of another head."""
    written = options.config if isinstance(options.config, Mapping) else {}
    inputs = head.inputs if options.path is None else {}
    for name, value in {**head.config, **{name: v for name, v in inputs.items() if name in vars(config)}}.items():
        if name not in written:
            setattr(config, name, value)


def _class_of(config: Any, name: str | None, head: ModelHead | None) -> Any:
    import transformers

    if name is None:
        family, what = _CAUSAL if head is None or not head.family else (head.family, head.family)
        models = getattr(transformers, family)._model_mapping
        if type(config) not in models:
            raise ConfigError(
                f'transformers has no {what} for {type(config).__name__}; name the class: model.class = "…"'
            )
        return models[type(config)]
    found = getattr(transformers, name, None)
    if found is None or not isinstance(found, type) or not issubclass(found, nn.Module):
        close = difflib.get_close_matches(name, [each for each in dir(transformers) if "For" in each], n=2)
        repair = f"did you mean {' or '.join(close)}?" if close else "correct model.class"
        raise ConfigError(f"transformers {transformers.__version__} has no model class {name!r}; {repair}")
    return found


def _from_config(family: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    model = family._from_config(config, dtype=dtype)
    model.config.use_cache = False
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")  # shapes that do not depend on the routing
    return model.train()  # type: ignore[no-any-return]
