"""Trace a model of the transformers library from its config alone: nothing is made but buffers.

The build is deferred; of its values only buffers (rotary tables, position ids, running means) are made. The
batch is synthetic: shapes count, values do not. Knows transformers' naming of models and inputs; refuses to
know weights and files of weights.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from shardwise.describe.profile import ModelProfile
from shardwise.errors import ConfigError, ModelError
from shardwise.files import read_text
from shardwise.trace.deferred import defer, place
from shardwise.trace.profile import trace

__all__ = ["empty_model", "read_config", "synthetic_batch", "trace_config"]

# Tasks with a loss, in the order in which a model class is looked for: the first that has one for a config.
_FAMILIES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForImageClassification",
    "AutoModelForAudioClassification",
)
_ENCODER_DECODERS = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
_ENCODERS = ("AutoModelForMaskedLM",)  # BERT has a decoder's head too, and is none


def trace_config(
    config: Any, *, batch_size: int = 1, sequence_length: int = 128, units: Sequence[str] = (), seed: int = 0
) -> ModelProfile:
    """The profile of the model that a transformers config describes: a config, its dict or its JSON file.

    In training mode, on a synthetic batch of `batch_size` samples, of `sequence_length` tokens where it takes
    tokens. Experts run as grouped products, whose shapes do not depend on the routing. A model of 671 B
    parameters takes seconds and no memory of its own. Raises ConfigError for an unreadable config, ModelError
    for a model whose inputs cannot be made up.
    """
    model = empty_model(read_config(config), seed=seed)
    batch = synthetic_batch(model, batch_size=batch_size, sequence_length=sequence_length, seed=seed)
    return trace(model, batch, units=units)


def read_config(config: Any) -> Any:
    """A transformers config from itself, a dict with `model_type`, or the path of a JSON file with one."""
    import transformers

    if isinstance(config, transformers.PreTrainedConfig):
        return config
    where, written = "the config", isinstance(config, Mapping)
    if isinstance(config, str | Path):
        where = str(config)
        text = read_text(config, what="a model config", repair="correct the path")
        try:
            config = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"a model config is a JSON file, but {where} is none: {error}; correct the path"
            ) from error
    if not isinstance(config, Mapping) or "model_type" not in config:
        raise ConfigError(f"a config names its model_type, such as llama, but {where} does not; add it")
    values = {name: value for name, value in config.items() if name != "model_type"}
    known = transformers.CONFIG_MAPPING
    if config["model_type"] not in known:
        close = difflib.get_close_matches(str(config["model_type"]), list(known), n=3)
        repair = f"did you mean {' or '.join(close)}?" if close else "see transformers' list of models"
        raise ConfigError(
            f"a config names a model_type that transformers {transformers.__version__} knows, but {where} says "
            f"{config['model_type']!r}; {repair}"
        )
    try:
        read = transformers.AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # its checks raise errors of several libraries, none of them a ValueError alone
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where} is none that transformers takes as {config['model_type']}: {reason:.300}; correct it"
        ) from error
    if written:
        _check_names(values, read)
    return read


def _check_names(values: Mapping[str, Any], config: Any) -> None:
    """transformers keeps any key it is given. Written by hand, one that is almost a key it knows is a slip.

    Raises ConfigError. Not for files: published ones carry keys of older versions.
    """
    kind = type(config)
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    for name in values:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.85) if name not in known else []
        if close:
            raise ConfigError(
                f"the keys of the config are those of {kind.__name__}, and {name} = {values[name]!r} is none; write "
                f"{close[0]}"
            )


def empty_model(config: Any, *, seed: int = 0) -> nn.Module:
    """The model of a config, in training mode: parameters fake, buffers real, experts of static shapes."""
    config = copy.deepcopy(config)
    starts = getattr(config, "decoder_start_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and starts is None:
        config.decoder_start_token_id = config.pad_token_id or 0  # labels are shifted behind it
    family = _family(config)
    blueprint = defer(lambda: family._from_config(config), seed=seed)
    model: Any = blueprint.module
    place(model, blueprint.materialize([name for name, _ in model.named_buffers(remove_duplicate=False)]))
    if model._can_set_experts_implementation():
        model.set_experts_implementation("grouped_mm")
    model.config.use_cache = False
    return model.train()  # type: ignore[no-any-return]


def _family(config: Any) -> Any:
    """The first architecture that the config names, else the first task that has a model for this config."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    first: tuple[str, ...] = () if getattr(config, "is_decoder", False) else _ENCODERS
    first = _ENCODER_DECODERS if getattr(config, "is_encoder_decoder", False) else first
    for name in (*first, *_FAMILIES):
        models = getattr(transformers, name)._model_mapping
        if type(config) in models:
            return models[type(config)]
    raise ModelError(
        f"a config needs a model with a loss, but {type(config).__name__} has none of "
        f"{', '.join((*_ENCODER_DECODERS, *_FAMILIES))}; build the model yourself and use trace(model, batch)"
    )


def synthetic_batch(model: Any, *, batch_size: int, sequence_length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs and labels of a transformers model, by its `main_input_name`.

    Tokens: int64 (batch_size, sequence_length). Images: float (batch_size, channels, height, width).
    """
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    size = int(getattr(text, "vocab_size", None) or 2)

    def tokens() -> torch.Tensor:
        return torch.randint(0, size, (batch_size, sequence_length), generator=generator)

    match model.main_input_name:
        case "input_ids":
            ids = tokens()
            return {"input_ids": ids, "labels": ids.clone()}
        case "pixel_values":
            classes = max(1, int(model.config.num_labels))
            labels = torch.randint(0, classes, (batch_size,), generator=generator)
            return {"pixel_values": _pixels(model, batch_size, generator), "labels": labels}
        case "input_features":
            frames = 2 * int(getattr(model.config, "max_source_positions", sequence_length))
            shape = (batch_size, int(model.config.num_mel_bins), frames)
            return {"input_features": _normal(model, shape, generator), "labels": tokens()}
        case name:
            raise ModelError(
                f"inputs are made up for models of tokens, images and speech features, but "
                f"{type(model).__name__} takes {name!r}; use trace(model, batch)"
            )


def _pixels(model: Any, batch_size: int, generator: torch.Generator) -> torch.Tensor:
    side = getattr(model.config, "image_size", None) or 224
    height, width = side if isinstance(side, list | tuple) else (side, side)
    channels = int(getattr(model.config, "num_channels", None) or 3)
    return _normal(model, (batch_size, channels, int(height), int(width)), generator)


def _normal(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(model.dtype)
