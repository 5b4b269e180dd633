"""A run as it is written: one TOML file with model, task, layout, training and checkpoints, checked when read.

Every value of it can be overridden by `path=value`. Knows what may be written and which numbers go together.
Refuses to know how a model is built, and starts nothing.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shardwise.errors import ConfigError, ShardwiseError
from shardwise.layout import Layout, StageRule, Techniques
from shardwise.plan.sources import check_source
from shardwise.tasks.faults import fault_text, unknown_text

__all__ = [
    "CheckpointOptions",
    "ModelOptions",
    "Run",
    "TaskOptions",
    "TimelineOptions",
    "TrainingOptions",
    "load_run",
    "run_from",
]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class ModelOptions(_Table):
    """[model]: what is trained.

    config     a transformers config: a table with `model_type`, or the path of a JSON file
    class      the transformers class; without it the one for causal language modelling of that config
    path       a folder with safetensors, whose values are the initial ones; with config.json where `config` is not
               given
    factory    "module:function" that returns an `nn.Module`, called with `options` as keywords
    dtype      of the parameters of a transformers model
    """

    config: dict[str, Any] | str | None = None
    class_name: str | None = Field(default=None, alias="class")
    path: str | None = None
    factory: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.factory is not None and (self.config is not None or self.class_name is not None):
            raise ValueError("a model has a factory or a config, but both are given; drop one")
        if self.factory is not None and (":" not in self.factory or self.factory.endswith(":")):
            raise ValueError(f'a factory is written "module:function", but got {self.factory!r}; correct it')
        if self.options and self.factory is None:
            raise ValueError("options are what a factory is called with, but there is none; give a factory")
        return self


class TaskOptions(_Table):
    """[task]: `kind`, and the options of that kind as further keys."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    kind: str = "language_modelling"

    @property
    def options(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class TrainingOptions(_Table):
    """[training]: how it is trained.

    steps, global_batch  optimizer steps in all; samples of one step, over all replicas and micro-batches
    optimizer            "adamw", or "sgd" without momentum, which keeps no state
    warm_up              steps in which the learning rate rises to `learning_rate`
    schedule             "cosine" falls from there to `final_fraction` of it at the last step; or "constant"
    weight_decay         of parameters of two dims and more (not of biases and norms)
    clip                 the greatest norm of all gradients; 0: not clipped
    seed                 of initial values, dropout and the order of data
    evaluate_every       steps between evaluations on held-out samples; 0: none
    evaluate_batches     global batches of one evaluation, at most
    """

    steps: int = Field(ge=1)
    global_batch: int = Field(ge=1)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    warm_up: int = Field(default=0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)
    evaluate_every: int = Field(default=0, ge=0)
    evaluate_batches: int = Field(default=4, ge=1)

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
        if self.warm_up > self.steps:
            raise ValueError(
                f"the warm-up ends within the steps, but warm_up={self.warm_up} and steps={self.steps}; "
                f"use warm_up={self.steps // 10}"
            )
        return self


class CheckpointOptions(_Table):
    """[checkpoint]: saved every `every` steps and at the end, the last `keep` are kept; `every = 0`: never.

    `folder` is RUN_FOLDER/checkpoints if not given.
    """

    folder: str = ""
    every: int = Field(default=0, ge=0)
    keep: int = Field(default=2, ge=1)


class TimelineOptions(_Table):
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


class Run(_Table):
    """A whole run. `folder` gets events, checkpoints and prepared data.

    balance   what makes stages equal: "flops" that were counted, "measured" seconds (every unit call is timed once at
              the start), "parameters", or "depth" (unit calls); not where `layout` says it, or lists the stages
    tp_plan   a table of names of modules, `*` for numbers, and transformers' styles: how shards divide units. It is
              proven, and refused before training where it is wrong; without it a plan is found
    """

    folder: str = "runs/run"
    layout: Layout = Layout()
    balance: Literal["flops", "measured", "parameters", "depth"] = "flops"
    device: Literal["cpu", "cuda"] = "cpu"
    model: ModelOptions = ModelOptions()
    task: TaskOptions = TaskOptions()
    training: TrainingOptions
    checkpoint: CheckpointOptions = CheckpointOptions()
    timeline: TimelineOptions = TimelineOptions()
    tp_plan: dict[str, str] | None = None

    @field_validator("layout", mode="before")
    @classmethod
    def _parsed(cls, value: object) -> object:
        if isinstance(value, str):
            return Layout.parse(value)
        if not isinstance(value, Mapping | Layout):
            raise ValueError(f'it is text or a table, but got {value!r}; write "dp=2,pp=2" or {{ dp = 2, pp = 2 }}')
        return Layout.from_dict(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_source(self.layout, self.layout.num_micro_batches(self.training.global_batch))
        if self.balance != "flops" and self.layout.stages != StageRule.COST:
            raise ValueError(
                f'stages are balanced in one way, but balance = "{self.balance}" and the layout is {self.layout}; '
                "drop balance, or stages of the layout"
            )
        return self

    @property
    def seeded_layout(self) -> Layout:
        """The layout with the run's own seed, by which dropout is keyed, and with what its stages are balanced by.

        "measured" is for whoever has a model to time; until then stages are balanced by flops.
        """
        stages = StageRule(self.balance) if self.balance in ("parameters", "depth") else self.layout.stages
        return dataclasses.replace(self.layout, seed=self.training.seed, stages=stages)

    @property
    def techniques(self) -> Techniques:
        """How numbers are kept and sent."""
        return Techniques()

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one replica in one step."""
        return self.layout.num_micro_batches(self.training.global_batch)

    @property
    def checkpoint_folder(self) -> Path:
        return Path(self.checkpoint.folder) if self.checkpoint.folder else Path(self.folder) / "checkpoints"

    @property
    def events_folder(self) -> Path:
        return Path(self.folder) / "events"

    @property
    def timelines_folder(self) -> Path:
        return Path(self.folder) / "timelines"

    @property
    def task_options(self) -> dict[str, object]:
        """The task's options; a corpus is cached in the run's folder if nothing else is said."""
        options = self.task.options
        if self.task.kind == "language_modelling":
            options.setdefault("cache", str(Path(self.folder) / "data"))
        return options


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """The run of a TOML file, with `path=value` overrides. Raises ConfigError, LayoutError."""
    path = Path(path)
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"a run file is a readable TOML file; {path}: {error.strerror}; correct the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"a run file is TOML, but {path} is not: {error}; correct that place") from error
    written.setdefault("folder", str(Path("runs") / path.stem))
    return run_from(written, overrides, source=str(path))


def run_from(written: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "the run") -> Run:
    """The run of a mapping that reads like the TOML file. Raises ConfigError, LayoutError."""
    tables: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in written.items()}
    for override in overrides:
        _override(tables, override)
    try:
        return Run.model_validate(tables)
    except ValidationError as error:
        faults = "\n".join(f"  {_fault(dict(fault))}" for fault in error.errors())
        raise ConfigError(f"{source} is not a run that can be trained:\n{faults}") from error
    except ShardwiseError as error:
        raise type(error)(f"{source}: {error}") from error


def _override(tables: dict[str, Any], text: str) -> None:
    path, equals, value = text.partition("=")
    *parents, name = path.strip().split(".")
    if not equals or not name:
        raise ConfigError(f"an override is written path=value, but got {text!r}; write training.steps=100")
    table = tables
    for parent in parents:
        inner = table.get(parent, {})
        if parent == "layout" and isinstance(inner, str):
            inner = Layout.parse(inner).to_dict()
        if not isinstance(inner, Mapping):
            raise ConfigError(f"{text!r} sets a key of {parent}, but {parent} is {inner!r}; set {parent} itself")
        table[parent] = table = dict(inner)
    table[name] = _toml_value(value.strip())


def _toml_value(text: str) -> Any:
    """A TOML value; what is none (a bare word, a layout) is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _fault(fault: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return unknown_text(where, str(fault["loc"][-1]), _known(fault["loc"][:-1]))
    return fault_text(where, fault)


def _known(path: tuple[object, ...]) -> list[str]:
    table: type[BaseModel] = Run
    for part in path:
        table = next(t for name, t in _TABLES if name == part)
    return [field.alias or name for name, field in table.model_fields.items()]


_TABLES: tuple[tuple[str, type[BaseModel]], ...] = (
    ("model", ModelOptions),
    ("task", TaskOptions),
    ("training", TrainingOptions),
    ("checkpoint", CheckpointOptions),
    ("timeline", TimelineOptions),
)
