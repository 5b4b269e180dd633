"""The tables of a run file that say what is trained and how long: model, task, training, checkpoint, timeline.

Each is checked by itself when read; which numbers go together across tables is the business of `run_file`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["CheckpointOptions", "ModelOptions", "Table", "TaskOptions", "TimelineOptions", "TrainingOptions"]


_IN_PACKAGE = "package:"


class Table(BaseModel):
    """One table: unknown keys are refused, nothing is converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class ModelOptions(Table):
    """[model]: what is trained.

    config     a transformers config: a table with `model_type`, or the path of a JSON file
    class      the transformers class; without it the one for causal language modelling of that config
    path       a folder with safetensors, whose values are the initial ones; with config.json where `config` is not
               given. "package:NAME/FOLDER" is a folder inside an installed Python package
    factory    "module:function" that returns an `nn.Module`, called with `options` as keywords
    dtype      of the parameters of a transformers model
    batch_norm with what BatchNorm normalises: "own", the micro-batch of a replica, or "synchronised", that of all
               replicas together
    """

    config: dict[str, Any] | str | None = None
    class_name: str | None = Field(default=None, alias="class")
    path: str | None = None
    factory: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    batch_norm: Literal["own", "synchronised"] = "own"

    @field_validator("path", mode="after")
    @classmethod
    def _found(cls, value: str | None) -> str | None:
        return None if value is None else folder_of(value)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.factory is not None and (self.config is not None or self.class_name is not None):
            raise ValueError("a model has a factory or a config, but both are given; drop one")
        if self.factory is not None and (":" not in self.factory or self.factory.endswith(":")):
            raise ValueError(f'a factory is written "module:function", but got {self.factory!r}; correct it')
        if self.options and self.factory is None:
            raise ValueError("options are what a factory is called with, but there is none; give a factory")
        return self


def folder_of(path: str) -> str:
    """A path; "package:NAME/FOLDER" is FOLDER of an installed Python package, which is not imported. Raises ValueError
    where it is not installed."""
    if not path.startswith(_IN_PACKAGE):
        return path
    name, _, inside = path.removeprefix(_IN_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{path!r} names an installed package, but {name!r} is none; install it with pip")
    return str(Path(spec.submodule_search_locations[0]) / inside)


class TaskOptions(Table):
    """[task]: `kind`, and the options of that kind as further keys."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    kind: str = "language_modelling"

    @property
    def options(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class TrainingOptions(Table):
    """[training]: how it is trained.

    steps, global_batch  optimizer steps in all; samples of one step, over all replicas and micro-batches
    optimizer            "adamw"; "sgd" without momentum, which keeps no state; "momentum"; "muon" for hidden matrices
    momentum, nesterov   of "momentum" and "muon"; 0.9 and 0.95 if not given
    accumulate           micro-batches of a replica whose gradients make one update: micro_batches of the layout
    warm_up              steps in which the learning rate rises to `learning_rate`
    schedule             "cosine" and "linear" fall from there to `final_fraction` of it at the last step, "wsd" in the
                         last `decay` steps (0: a fifth of all); "inverse-sqrt" with the steps; or "constant"
    weight_decay         of parameters of two dims and more (not of biases and norms)
    clip                 the greatest norm of all gradients; 0: not clipped
    seed                 of initial values, dropout and the order of data
    evaluate_every       steps between evaluations on held-out samples; 0: none
    evaluate_batches     global batches of one evaluation, at most; without it 4, or all held-out samples of a task that
                         is scored by answers
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    accumulate: int | None = Field(default=None, ge=1)
    optimizer: Literal["adamw", "sgd", "momentum", "muon"] = "adamw"
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool = True
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    warm_up: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant", "linear", "wsd", "inverse-sqrt"] = "cosine"
    decay: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    evaluate_batches: int | None = Field(default=None, ge=1)

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        pair = tuple(value) if isinstance(value, list) else value
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"they are two numbers, but got {value!r}; [0.9, 0.95] is usual")
        return pair

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas lie in [0, 1), but got {list(self.betas)}; [0.9, 0.95] is usual")
        if self.nesterov and self.momentum == 0 and "nesterov" in self.model_fields_set:
            raise ValueError("nesterov looks ahead by the momentum, which is 0; drop one of the two")
        if self.warm_up > self.steps:
            raise ValueError(
                f"the warm-up ends within the steps, but warm_up={self.warm_up} and steps={self.steps}; "
                f"use warm_up={self.steps // 10}"
            )
        if self.decay > self.steps - self.warm_up:
            raise ValueError(
                f"the decay is behind the warm-up, but decay={self.decay} and warm_up={self.warm_up} of "
                f"{self.steps} steps; use decay={max(0, self.steps - self.warm_up) // 5}"
            )
        return self


class CheckpointOptions(Table):
    """[checkpoint]: saved every `every` steps and at the end, the last `keep` are kept; `every = 0`: never.

    `folder` is RUN_FOLDER/checkpoints if not given.
    """

    folder: str = ""
    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)


class TimelineOptions(Table):
    """[timeline]: steps that are recorded on all ranks, in RUN_FOLDER/timelines, for `shardwise draw RUN_FOLDER`.

    steps   counted from 1; -1 is the last
    every   every so many steps, too; 0: none

    Steps that overlap (pipedream-2bw) are not recorded.
    """

    steps: tuple[int, ...] = (5, -1)
    every: int = Field(default=0, ge=0)

    @field_validator("steps", mode="before")
    @classmethod
    def _numbers(cls, value: object) -> object:
        numbers = tuple(value) if isinstance(value, list) else value
        if not isinstance(numbers, tuple) or not all(isinstance(n, int) and (n > 0 or n == -1) for n in numbers):
            raise ValueError(f"they are a list of steps from 1, or -1 for the last, but got {value!r}; write [5, -1]")
        return numbers

    def wants(self, step: int, of: int) -> bool:
        """Whether the step, counted from 0, is recorded, `of` so many."""
        number = step + 1
        wanted = number in self.steps or (number == of and -1 in self.steps)
        return wanted or (self.every > 0 and number % self.every == 0)
