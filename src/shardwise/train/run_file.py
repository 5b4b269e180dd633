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
from shardwise.layout import Communication, Layout, Precision, StageRule, Techniques
from shardwise.plan.sources import check_source
from shardwise.schedule import GENERATORS
from shardwise.tasks.faults import fault_text, unknown_text

__all__ = [
    "AsynchronousOptions",
    "CheckpointOptions",
    "CommunicationOptions",
    "ModelOptions",
    "PrecisionOptions",
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
    evaluate_batches     global batches of one evaluation, at most
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


class PrecisionOptions(_Table):
    """[precision]: in which dtypes a step computes; the model's own where nothing is said.

    compute             "float32", "bfloat16", "float16", or "float8" where the device has it
    reduce              in which dtype gradients are summed over ranks
    emulate             compute in float32, with operands and results of products rounded to `compute`
    loss_scale          "dynamic", "none" or a number; without it dynamic for float16, else none
    loss_scale_window   steps without an overflow behind which a dynamic one doubles
    logits              "float32": what the head returns is made float32; "compute": it stays as it is
    keep                what stays in float32: "norms", "routers", names of modules
    deterministic       the same bits in every run
    """

    compute: str = "float32"
    reduce: str = "float32"
    emulate: bool = False
    loss_scale: float | int | str | None = None
    loss_scale_window: int = 2000
    logits: str = "float32"
    keep: tuple[str, ...] = ("norms", "routers")
    deterministic: bool = False

    @field_validator("keep", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.value()
        return self

    def value(self) -> Precision:
        """What it says, checked. Raises `ConfigError`."""
        return Precision(**self.model_dump())


class CommunicationOptions(_Table):
    """[communication]: how tensors travel between ranks; as they are where nothing is said.

    gradients     their sums over replicas: "none", "bf16", "fp16", "int8", "powersgd:4" (matrices of that rank),
                  "topk:0.01" (that fraction of them)
    activations   what crosses between stages: "none", "bf16", "fp16", "int8"
    algorithm     of sums of gradients: "auto", "ring", "tree", "hierarchical" (inside each host, then between hosts)
    """

    gradients: str = "none"
    activations: str = "none"
    algorithm: str = "auto"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.value()
        return self

    def value(self) -> Communication:
        """What it says, checked. Raises `ConfigError`."""
        return Communication(**self.model_dump())


class AsynchronousOptions(_Table):
    """[asynchronous]: the replicas of dp are workers, which train by themselves and meet every so many steps.

    method               "local-sgd" (the mean of their weights), "diloco" (an outer optimizer on what they have done),
                         "delayed" (a mean that travels while the next round is computed), "eager-diloco" (both)
    every                steps between two exchanges of a fragment
    outer_learning_rate  of the outer optimizer of diloco and eager-diloco, with outer_momentum and nesterov
    fragments            parts of the parameters that are exchanged one behind the other, each every so many steps
    wire                 how sums travel: "none" (as they are) or what [communication] gradients can be, such as "bf16"
    """

    method: Literal["local-sgd", "diloco", "delayed", "eager-diloco"] = "diloco"
    every: int = Field(default=32, ge=1)
    outer_learning_rate: float = Field(default=0.7, gt=0, allow_inf_nan=False)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = True
    fragments: int = Field(default=1, ge=1)
    wire: str = "none"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        Communication(gradients=self.wire)  # raises ConfigError
        outer = self.model_fields_set & {"outer_learning_rate", "outer_momentum", "nesterov"}
        if outer and not self.method.endswith("diloco"):
            raise ValueError(
                f"{self.method} has no outer optimizer, but {', '.join(sorted(outer))} is given; drop it, or use "
                'method = "diloco"'
            )
        if self.fragments > self.every:
            raise ValueError(
                f"a fragment is exchanged in a step of its own, but there are {self.fragments} and every={self.every}; "
                f"use fragments={self.every} or fewer"
            )
        return self


class Run(_Table):
    """A whole run. `folder` gets events, checkpoints and prepared data.

    balance   what makes stages equal: "flops" that were counted, "measured" seconds (every unit call is timed once at
              the start), "parameters", or "depth" (unit calls); not where `layout` says it, or lists the stages
    compile   torch.compile's backend for every unit, such as "inductor"; without it units are not compiled
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
    precision: PrecisionOptions = PrecisionOptions()
    communication: CommunicationOptions = CommunicationOptions()
    compile: str = ""
    asynchronous: AsynchronousOptions | None = None

    @field_validator("layout", mode="before")
    @classmethod
    def _parsed(cls, value: object) -> object:
        if isinstance(value, str):
            return Layout.parse(value)
        if not isinstance(value, Mapping | Layout):
            raise ValueError(f'it is text or a table, but got {value!r}; write "dp=2,pp=2" or {{ dp = 2, pp = 2 }}')
        return Layout.from_dict(value) if isinstance(value, Mapping) else value

    @model_validator(mode="before")
    @classmethod
    def _accumulated(cls, tables: Any) -> Any:
        """`training.accumulate` is the layout's number of micro-batches, under the name that many know."""
        training = tables.get("training") if isinstance(tables, Mapping) else None
        wanted = training.get("accumulate") if isinstance(training, Mapping) else None
        layout = tables.get("layout", Layout()) if wanted is not None else None
        if not isinstance(wanted, int) or wanted < 1 or not isinstance(layout, str | Mapping | Layout):
            return tables
        known = cls._parsed(layout)
        assert isinstance(known, Layout)
        if known.micro_batches not in (None, wanted):
            raise ValueError(
                f"accumulate is the layout's number of micro-batches, but accumulate = {wanted} and micro_batches = "
                f"{known.micro_batches}; write one of the two"
            )
        return {**tables, "layout": dataclasses.replace(known, micro_batches=wanted)}

    @model_validator(mode="after")
    def _together(self) -> Self:
        check_source(self.layout, self.layout.num_micro_batches(self.training.global_batch))
        if self.balance != "flops" and self.layout.stages != StageRule.COST:
            raise ValueError(
                f'stages are balanced in one way, but balance = "{self.balance}" and the layout is {self.layout}; '
                "drop balance, or stages of the layout"
            )
        if self.asynchronous is not None:
            self._has_workers()
        assert self.techniques  # checked when made
        return self

    def _has_workers(self) -> None:
        layout = self.layout
        if layout.dp == 1:
            raise ValueError(
                "workers that meet now and then are the replicas of dp, but dp=1; set layout.dp=2, or drop "
                "[asynchronous]"
            )
        if layout.schedule in GENERATORS and not GENERATORS[layout.schedule].flushes:
            raise ValueError(
                f"workers meet behind a step, but {layout.schedule} is never between two steps; use schedule = 1f1b"
            )

    @property
    def seeded_layout(self) -> Layout:
        """The layout with the run's own seed, by which dropout is keyed, and with what its stages are balanced by; that
        of one worker, where there are several.

        "measured" is for whoever has a model to time; until then stages are balanced by flops.
        """
        stages = StageRule(self.balance) if self.balance in ("parameters", "depth") else self.layout.stages
        layout = dataclasses.replace(self.layout, seed=self.training.seed, stages=stages)
        if self.asynchronous is None:
            return layout
        return dataclasses.replace(layout, dp=1, micro_batches=self.num_micro_batches)

    @property
    def num_workers(self) -> int:
        """Groups of ranks that train by themselves: one, unless the run is asynchronous."""
        return 1 if self.asynchronous is None else self.layout.dp

    @property
    def techniques(self) -> Techniques:
        """How numbers are kept and sent."""
        return Techniques(
            precision=self.precision.value(), communication=self.communication.value(), compile=self.compile
        )

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
    ("precision", PrecisionOptions),
    ("communication", CommunicationOptions),
    ("asynchronous", AsynchronousOptions),
)
