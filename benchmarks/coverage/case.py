"""Find a small model of an architecture that trains one step on one device, and its batch and loss.

Knows the maps from architectures to classes; tries ways to shrink, classes and inputs until one works. Refuses to know
layouts. Every attempt that failed is told where none worked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import math
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import transformers
from torch.utils._pytree import tree_leaves
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from benchmarks.coverage.guess import Guess, guesses, parts, repaired
from benchmarks.coverage.inputs import batch_of
from benchmarks.coverage.shrink import POLICIES, Policy, shrunk
from shardwise.trace.objective import LossFunction, objective

__all__ = ["Case", "NotTrainedError", "architectures", "find_case", "pattern_loss"]

LARGEST = 60_000_000  # parameters
_FIRST = (
    "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM",
    "IMAGE_CLASSIFICATION", "CTC", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "SEQUENCE_CLASSIFICATION", "PRETRAINING",
)  # fmt: skip
_LAST = ("MODEL_MAPPING_NAMES", "BACKBONE")
_SKIP_CLASSES = ("PreTrainedModel",)
_GIVE_UP_SECONDS = 25.0  # of a processor


class NotTrainedError(Exception):
    """No attempt built a model that trains one step on one device; the message holds the first reasons."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model in training mode that trains on `batch`, with `loss` where it returns none of its own."""

    architecture: str
    model: Any
    batch: dict[str, Any]
    loss: LossFunction | None
    policy: str
    guess: Guess
    loss_value: float

    @property
    def inputs(self) -> str:
        """What the model is given, in words."""
        return ", ".join(self.batch)


def architectures() -> tuple[str, ...]:
    """Every model type that transformers has a config for."""
    return tuple(CONFIG_MAPPING_NAMES)


def pattern_loss(outputs: Any, batch: Any) -> torch.Tensor:
    """The mean square distance of every float output from a fixed pattern.

    Not from zero: the mean square of what a layer norm made is a constant, and its gradient rounding errors.
    """
    if hasattr(outputs, "keys"):
        outputs = [outputs[name] for name in outputs if "past_key_values" not in name and "cache" not in name]
    parts = [
        (leaf.float() - torch.arange(leaf.numel()).sin().view(leaf.shape)).square().mean()
        for leaf in tree_leaves(outputs)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0
    ]
    return torch.stack(parts).sum()


def find_case(architecture: str) -> Case:
    """The first attempt that trains one step. Raises `NotTrainedError` with the reasons of the attempts."""
    started = time.process_time()
    reasons: dict[str, None] = {}
    try:
        default = default_config(architecture)
        classes = list(_classes(architecture, default))
    except Exception as error:
        raise NotTrainedError(f"config: {_short(error)}") from error
    if not classes:
        raise NotTrainedError("no model class takes this config")
    for kind in classes[:4]:
        for media in (True, False):  # all inputs at any size before fewer inputs
            for policy in POLICIES:
                if time.process_time() - started > _GIVE_UP_SECONDS:
                    break
                try:
                    model = _built(kind, default, policy)
                except Exception as error:
                    reasons[f"{kind.__name__}, {policy.name}: build: {_short(error)}"] = None
                    continue
                for case in _attempts(architecture, model, policy, media, reasons):
                    return case
    raise NotTrainedError("; ".join(_telling(list(reasons))))


def _telling(reasons: list[str]) -> list[str]:
    """Of every class, the attempt at its smallest size and the last one."""
    return [*reasons[:3], *reasons[-1:]] if len(reasons) > 4 else reasons


def _attempts(architecture: str, model: Any, policy: Policy, media: bool, reasons: dict[str, None]) -> Iterator[Case]:
    for first in (guess for guess in guesses(model) if guess.media is media):
        guess: Guess | None = first
        for _ in range(4):
            if guess is None:
                break
            batch: dict[str, Any] = {}
            try:
                batch = batch_of(model, guess)
                loss = None if guess.labels else pattern_loss
                value = train_one_step(model, batch, loss)
                yield Case(
                    architecture=architecture,
                    model=model,
                    batch=batch,
                    loss=loss,
                    policy=policy.name,
                    guess=guess,
                    loss_value=value,
                )
                return
            except Exception as error:
                reasons[f"{type(model).__name__}, {policy.name}: forward: {_short(error)}"] = None
                guess = repaired(guess, str(error), model, batch)


def train_one_step(model: Any, batch: dict[str, Any], loss: LossFunction | None) -> float:
    """The loss of one SGD step, after which weights and buffers are as before. Raises where it is no training."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    try:
        value = objective(model, given, loss)
        torch.autograd.backward([value])
        value = value.detach()
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        total = float(torch.stack(norms).norm())
        if not (math.isfinite(float(value)) and math.isfinite(total) and total > 0):
            raise ValueError(f"loss {float(value)}, gradient norm {total}: not finite, or nothing is learnt")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        return float(value)
    finally:
        model.load_state_dict(state)
        for parameter in model.parameters():
            parameter.grad = None


def default_config(architecture: str) -> Any:
    """The config with the class's own defaults; composites get small well-known parts."""
    kind = transformers.CONFIG_MAPPING[architecture]
    if architecture in _COMPOSITES:
        parts = {name: transformers.CONFIG_MAPPING[part]() for name, part in _COMPOSITES[architecture].items()}
        return kind(**parts)
    return kind()


_COMPOSITES = {
    "encoder-decoder": {"encoder": "bert", "decoder": "bert"},
    "vision-encoder-decoder": {"encoder": "vit", "decoder": "gpt2"},
    "speech-encoder-decoder": {"encoder": "wav2vec2", "decoder": "bert"},
    "vision-text-dual-encoder": {"vision_config": "vit", "text_config": "bert"},
    "rag": {"question_encoder": "dpr", "generator": "bart"},
}


def _built(kind: Any, default: Any, policy: Policy) -> Any:
    """The model of a small config, in training mode, with nothing dropped. Raises what its class raises."""
    config = _completed(shrunk(default, policy), policy)
    if not policy.targets and policy.divisor < 8:
        _check_size(kind, config)
    with torch.random.fork_rng(devices=[]), _marked_memory():
        torch.manual_seed(0)
        model = kind(config)
        _fill(model)
    model = model.float().train()
    if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
        raise ValueError(f"more than {LARGEST:,} parameters are left")
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


@contextlib.contextmanager
def _marked_memory() -> Iterator[None]:
    """Tensors that nobody writes hold NaN, and not what was in memory."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an operation says of its order is no matter here
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _fill(model: nn.Module) -> None:
    """Small random numbers in parameters that their class leaves unwritten (`torch.empty`), zeros in buffers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.isnan().any():
                numbers = torch.randn(parameter.shape, dtype=parameter.dtype) * 0.02
                parameter.copy_(torch.where(parameter.isnan(), numbers, parameter))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.masked_fill_(buffer.isnan(), 0.0)


def _completed(config: Any, policy: Policy) -> Any:
    """With the tokens that training needs (of images, of padding, that a decoder starts from), and weights that show:
    some classes start so near zero that blocks do nothing and their gradients are lost beside those of the rest."""
    decodes = bool(getattr(config, "is_encoder_decoder", False))
    for part in (config, *parts(config)):
        for name, least, instead in (("initializer_range", 1e-4, 0.02), ("initializer_factor", 1e-4, 1.0)):
            value = vars(part).get(name)
            if isinstance(value, float) and 0 < value < least:
                setattr(part, name, instead)
        for name in ("image_token_id", "image_token_index"):
            if name in vars(part) and vars(part)[name] is None:
                setattr(part, name, policy.vocabulary - 40)
        for name in ("pad_token_id", "decoder_start_token_id"):
            if decodes and vars(part).get(name) is None:
                setattr(part, name, vars(part).get("pad_token_id") or 0)
    return config


def _check_size(kind: Any, config: Any) -> None:
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters, more than {LARGEST:,}, are left")


def _classes(architecture: str, config: Any) -> Iterator[Any]:
    """Model classes of an architecture: with a loss first, base models, then whatever takes this config."""
    seen: set[Any] = set()
    found = (*_mapped(architecture), *_in_module(type(config)))
    for kind in sorted(found, key=lambda kind: kind.config_class is not type(config)):  # decoders of a whole come last
        if kind not in seen and kind.__name__ not in seen:
            seen |= {kind, kind.__name__}
            yield kind


def _mapped(architecture: str) -> Iterator[Any]:
    maps = {
        name: value
        for name, value in vars(modeling_auto).items()
        if re.fullmatch(r"MODEL_(FOR_\w+_)?MAPPING_NAMES", name)
    }
    ordered = [f"MODEL_FOR_{part}_MAPPING_NAMES" for part in _FIRST]
    rest = [name for name in maps if name not in ordered and not any(part in name for part in _LAST)]
    for name in (*ordered, *sorted(rest), "MODEL_MAPPING_NAMES"):
        found = maps.get(name, {}).get(architecture, ())
        for one in (found,) if isinstance(found, str) else found:
            kind = getattr(transformers, one, None)
            if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
                yield kind


def _in_module(config_kind: type) -> Iterator[Any]:
    name = config_kind.__module__.replace("configuration_", "modeling_")
    try:
        module = importlib.import_module(name)
    except ImportError:
        return
    for kind in vars(module).values():
        own = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
        if own and getattr(kind, "config_class", None) is config_kind and not kind.__name__.endswith(_SKIP_CLASSES):
            yield kind


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
