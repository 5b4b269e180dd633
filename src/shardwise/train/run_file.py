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

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from shardwise.errors import ConfigError, ShardwiseError
from shardwise.files import read_text
from shardwise.layout import SYNCHRONISED, Layout, StageRule, Techniques
from shardwise.plan.sources import check_source
from shardwise.schedule import GENERATORS
from shardwise.tasks import wanted_of_run
from shardwise.tasks.faults import fault_text, unknown_text
from shardwise.train.auto_options import AutoOptions
from shardwise.train.run_tables import (
    CheckpointOptions,
    ModelOptions,
    Table,
    TaskOptions,
    TimelineOptions,
    TrainingOptions,
)
from shardwise.train.technique_tables import AsynchronousOptions, CommunicationOptions, PrecisionOptions

__all__ = ["Run", "load_run", "run_from"]


class Run(Table):
    """A whole run. `folder` gets events, checkpoints and prepared data.

    balance   what makes stages equal: "flops" that were counted, "measured" seconds (every unit call is timed once at
              the start), "parameters", or "depth" (unit calls); not where `layout` says it, or lists the stages
    cluster   what a step is estimated for: a file that `shardwise probe` wrote, or a name such as "h100x8"; without it
              FOLDER/cluster.toml where there is one, else what is typical
    threads   of torch, in every rank; without it OMP_NUM_THREADS, or the cores of this machine, shared among its ranks
              (1 where another launcher starts them). Runs with one thread a rank are comparable bit by bit
    compile   torch.compile's backend for every unit, such as "inductor"; without it units are not compiled
    tp_plan   a table of names of modules, `*` for numbers, and transformers' styles: how shards divide units. It is
              proven, and refused before training where it is wrong; without it a plan is found
    """

    folder: str = "runs/run"
    layout: Layout = Layout()
    balance: Literal["flops", "measured", "parameters", "depth"] = "flops"
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = Field(default=None, ge=1)
    model: ModelOptions = ModelOptions()
    task: TaskOptions = TaskOptions()
    training: TrainingOptions
    checkpoint: CheckpointOptions = CheckpointOptions()
    timeline: TimelineOptions = TimelineOptions()
    tp_plan: dict[str, str] | None = None
    precision: PrecisionOptions = PrecisionOptions()
    communication: CommunicationOptions = CommunicationOptions()
    compile: str = ""
    cluster: str = ""
    asynchronous: AsynchronousOptions | None = None
    auto: AutoOptions = AutoOptions()

    @field_validator("layout", mode="before")
    @classmethod
    def _parsed(cls, value: object) -> object:
        if value == "auto":
            raise ValueError(
                '"auto" is found by `shardwise train`, verify and plan; elsewhere write the layout that they tell'
            )
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
        if self.layout.shares is not None:
            self._has_shares()
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

    def _has_shares(self) -> None:
        told = ":".join(map(str, self.layout.shares or ()))
        if self.asynchronous is not None:
            raise ValueError(
                f"workers that meet now and then need not wait for each other, but shares={told}; drop shares of the "
                "layout, or [asynchronous]"
            )
        if self.techniques.batch_norm == SYNCHRONISED:
            raise ValueError(
                f"replicas whose BatchNorm sees all samples together have as many micro-batches, but shares={told}; "
                'drop shares, or model.batch_norm = "synchronised"'
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
            precision=self.precision.value(),
            communication=self.communication.value(),
            compile=self.compile,
            batch_norm=self.model.batch_norm,
        )

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of one replica in one step."""
        return self.layout.num_micro_batches(self.training.global_batch)

    @property
    def most_micro_batches(self) -> int:
        """Micro-batches, in one step, of the replica that has the most."""
        return self.layout.most_micro_batches(self.training.global_batch)

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
        """The task's options; data are cached in the run's folder, and tokens are those of the model that is loaded, if
        nothing else is said."""
        options, wanted = self.task.options, wanted_of_run(self.task.kind)
        if "cache" in wanted:
            options.setdefault("cache", str(Path(self.folder) / "data"))
        if "tokenizer" in wanted and self.model.path is not None:
            options.setdefault("tokenizer", self.model.path)
        return options


def load_run(path: str | Path, overrides: Sequence[str] = (), *, layout: Layout | None = None) -> Run:
    """The run of a TOML file, with `path=value` overrides; on `layout` in place of its own, where one is given. Raises
    ConfigError, LayoutError."""
    path = Path(path)
    text = read_text(path, what="a run file", repair="correct the path")
    try:
        written = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"a run file is TOML, but {path} is not: {error}; correct that place") from error
    written.setdefault("folder", str(Path("runs") / path.stem))
    if layout is not None:
        written["layout"] = layout
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
    ("auto", AutoOptions),
)
