"""What a task says of the model that is trained on it: which head, for how many classes.

Names and numbers alone: a task knows its labels, not how a model is built from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

__all__ = ["Headed", "ModelHead"]


@dataclass(frozen=True, kw_only=True)
class ModelHead:
    """`family` is the class of transformers that finds a model for a config (`AutoModelForTokenClassification`);
    `config` are keys of the config that follow from its labels, `inputs` those that follow from its samples, for a
    model that has no values yet: set where the run does not write them and the config, or the factory, has such a
    key. Without a family any model that is named will do."""

    family: str
    config: Mapping[str, object] = field(default_factory=dict)
    inputs: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class Headed(Protocol):
    """A task that wants a head of its own on a transformers model."""

    def head(self) -> ModelHead:
        """The head; cheap."""
        ...
