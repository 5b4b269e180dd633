"""A `Layout`: how many replicas, shards and stages, which micro-batches and schedule, and what stands on which stage.

A value: parsed, printed, compared and saved. Refuses to know models, devices and process groups.

    dp=2,pp=2,tp=2,micro_batches=4,schedule=gpipe,stages=[embed+layers.0|layers.1-3+head],seed=1
    pp=2,schedule=zb-v,chunks=2          4 stages, two on each rank of the pipeline
    dp=2,fsdp=4,zero=3                   HSDP: parameters, gradients and optimizer state divided by 4, twice
    cp=4,context=ulysses                 every sequence divided among 4 ranks
    dp=2,shares=6:2                      replicas of unequal speed: 6 of 8 micro-batches for the first
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, TypeVar

from shardwise.describe.tensor import SequenceParallel
from shardwise.errors import LayoutError, ScheduleError
from shardwise.layout import rules
from shardwise.schedule import GENERATORS, chunks_of

__all__ = ["SCHEDULE_FILES", "SEARCHED", "Context", "Layout", "Offload", "StageRule", "Stages", "Unshard"]

_Word = TypeVar("_Word", bound=StrEnum)

SEARCHED = "searched"  # the schedule that is found for the model, not one of GENERATORS
SCHEDULE_FILES = (".json", ".csv")  # a schedule whose name ends so is the path of a file


class StageRule(StrEnum):
    """What the stages are balanced by."""

    COST = "cost"  # flops forward and backward, or measured seconds
    PARAMETERS = "parameters"
    DEPTH = "depth"  # unit calls


class Context(StrEnum):
    """How ranks that divide a sequence attend to each other's tokens."""

    RING = "ring"  # keys and values go round
    ULYSSES = "ulysses"  # every rank gets all tokens of its heads


class Unshard(StrEnum):
    """How long parameters that are divided among ranks are whole."""

    MICRO_BATCH = "micro-batch"  # while a unit computes; gradients are divided behind every backward
    STEP = "step"  # from a stage's first forward to its last backward of a step


class Offload(StrEnum):
    """What waits in the host's memory until it is needed."""

    NONE = "none"
    ACTIVATIONS = "activations"
    OPTIMIZER = "optimizer"
    BOTH = "both"


Stages = StageRule | tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """`dp` times `fsdp` times `ep` replicas of pipelines of `pp` times `cp` times `tp` ranks. Raises `LayoutError`
    where a rule is broken.

    fsdp: replicas that divide the state of training among them: at `zero=1` the optimizer's, at 2 gradients too, at 3
        parameters too. With dp > 1 besides, that many such groups hold the same (hybrid sharding).
    unshard: how long parameters are whole at zero=3; None: a step where there is a pipeline, else a micro-batch.
    cp: ranks that divide every sequence; `context` says how they attend.
    recompute: "none", "full" (of a unit only its inputs are kept), "selective" (attention and what costs little is
        computed again), or the bytes that a rank may keep of activations, such as "512MiB".
    offload: what waits in the host's memory.
    ep: replicas that divide the experts among them; each has its own share of the batch, and the rest of the model.

    sequence_parallel: "on" where, between the layers that shards divide, each shard is to work on its tokens (needs
        tp > 1); "regather" for less memory and more traffic.
    micro_batches: of one replica and step; None: 1 without a pipeline, else 2 * pp, at most one a sample.
    shares: of each replica, where they are not equal (needs fsdp = ep = 1); `micro_batches` is their mean.
    schedule: a name of `schedule.GENERATORS`, "searched", or the path of a schedule file (.json, or torch's .csv).
    chunks: stages a rank; None: as few as the schedule is made for.
    stages: a rule to balance them by, or unit names for each stage (see `unit_names.expand`).
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1
    ep: int = 1
    fsdp: int = 1
    zero: int = 3
    unshard: Unshard | None = None
    cp: int = 1
    context: Context = Context.RING
    recompute: str = "none"
    offload: Offload = Offload.NONE
    sequence_parallel: SequenceParallel = SequenceParallel.OFF
    micro_batches: int | None = None
    shares: tuple[int, ...] | None = None
    schedule: str = "1f1b"
    chunks: int | None = None
    stages: Stages = StageRule.COST
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _stages(self.stages))
        rules.check_axes(dp=self.dp, pp=self.pp, tp=self.tp, ep=self.ep, fsdp=self.fsdp, cp=self.cp)
        object.__setattr__(self, "unshard", None if self.unshard is None else _word(Unshard, "unshard", self.unshard))
        object.__setattr__(self, "context", _word(Context, "context", self.context))
        object.__setattr__(self, "offload", _word(Offload, "offload", self.offload))
        rules.check_zero(self.zero)
        rules.check_recompute(self.recompute)
        object.__setattr__(self, "sequence_parallel", _sequence_parallel(self.sequence_parallel))
        rules.check_sequence_parallel(bool(self.sequence_parallel), tp=self.tp, ep=self.ep, cp=self.cp)
        rules.check_offload(
            activations=self.offloads_activations,
            recompute=self.recompute,
            sequence_parallel=bool(self.sequence_parallel),
        )
        rules.check_micro_batches(self.micro_batches)
        rules.check_schedule(self.schedule, (*GENERATORS, SEARCHED), files=SCHEDULE_FILES)
        object.__setattr__(self, "shares", _shares(self.shares))
        if self.shares is not None:
            rules.check_shares(
                self.shares,
                dp=self.dp,
                micro_batches=self.micro_batches,
                fsdp=self.fsdp,
                ep=self.ep,
                generated=self.schedule in GENERATORS and GENERATORS[self.schedule].flushes,
            )
            object.__setattr__(self, "micro_batches", sum(self.shares) // self.dp)
        rules.check_chunks(self.chunks)
        chunks = self._chunks()
        if not isinstance(self.stages, StageRule):
            rules.check_explicit_stages(self.stages, pp=self.pp, chunks=chunks)

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.num_replicas * self.pp * self.cp * self.tp

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline: ranks of it, times the stages that each one owns."""
        return self.pp * self._chunks()

    @property
    def reads_schedule(self) -> bool:
        """Whether the schedule is the path of a file."""
        return self.schedule.endswith(SCHEDULE_FILES)

    @property
    def num_replicas(self) -> int:
        """Shares of a batch: replicas that hold the same, times those that divide state, times those of experts."""
        return self.dp * self.fsdp * self.ep

    @property
    def unshards_by_step(self) -> bool:
        """Whether parameters that are divided are whole for a step, not for a micro-batch."""
        return self.unshard is Unshard.STEP if self.unshard is not None else self.pp > 1

    @property
    def offloads_activations(self) -> bool:
        """Whether what forwards keep waits in the host's memory."""
        return self.offload in (Offload.ACTIVATIONS, Offload.BOTH)

    @property
    def offloads_optimizer(self) -> bool:
        """Whether what the optimizer remembers waits in the host's memory."""
        return self.offload in (Offload.OPTIMIZER, Offload.BOTH)

    def num_micro_batches(self, global_batch: int) -> int:
        """Of one replica in one step of `global_batch` samples, in the mean where there are shares. Raises
        `LayoutError` if there are too few."""
        wanted = 1 if self.pp == 1 else 2 * self.pp
        chosen = self.micro_batches or max(1, min(wanted, global_batch // self.num_replicas))
        replicas = self.dp * self.fsdp
        rules.check_batch(dp=replicas, micro_batches=chosen, global_batch=global_batch, ep=self.ep)
        return chosen

    def most_micro_batches(self, global_batch: int) -> int:
        """Of any replica in one step. Raises `LayoutError` if there are too few samples."""
        return max(self.num_micro_batches(global_batch), *(self.shares or (1,)))

    def __str__(self) -> str:
        default = Layout(dp=self.dp, pp=self.pp)
        fields = {"dp": self.dp, "pp": self.pp, **self._differences(default)}
        stages = fields.get("stages")
        if isinstance(stages, list):
            fields["stages"] = f"[{'|'.join('+'.join(units) for units in stages)}]"
        if self.shares is not None:
            fields["shares"] = ":".join(map(str, self.shares))
        return ",".join(f"{name}={value}" for name, value in fields.items())

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The inverse of `str`: `name=value` with commas between; stages given by hand as `[a+b|c]`."""
        fields: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or name in fields:
                raise LayoutError(
                    f"a layout is written name=value once each, with commas between, but got {part!r:.200} in "
                    f'{text!r:.400}; write for example "dp=2,pp=2,micro_batches=4"'
                )
            fields[name] = value if name in _WORDS else _integer(name, value)
        stages = fields.get("stages", "")
        if stages.startswith("[") and stages.endswith("]"):
            fields["stages"] = [stage.split("+") for stage in stages[1:-1].split("|")]
        return cls.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """Numbers, texts and lists, fit for JSON and TOML; what is left to shardwise is left out."""
        return {"dp": self.dp, "pp": self.pp, **self._differences(None)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Layout:
        """The inverse of `to_dict`; fields may be missing. Raises `LayoutError` for one that is unknown."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if unknown:
            raise LayoutError(f"a layout has {', '.join(known)}, but got {', '.join(unknown)}; drop it")
        return cls(**fields)

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The layout that `to_json` wrote. Raises `LayoutError`."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LayoutError(f"a layout in JSON is an object of its fields, but {error}; fix it") from error
        if not isinstance(fields, dict):
            raise LayoutError(f"a layout in JSON is an object of its fields, but got {text!r}; fix it")
        return cls.from_dict(fields)

    def _chunks(self) -> int:
        if self.schedule not in GENERATORS:
            return self.chunks or 1
        try:
            return chunks_of(self.schedule, self.chunks)
        except ScheduleError as error:
            raise LayoutError(str(error)) from error

    def _differences(self, default: Layout | None) -> dict[str, Any]:
        """The fields after dp and pp that differ from `default` (all, if it is None), as plain values."""
        fields: dict[str, Any] = {}
        for name in _AFTER_DP_AND_PP:
            value = getattr(self, name)
            if value is None or (default is not None and value == getattr(default, name)):
                continue
            if name == "stages" and isinstance(value, tuple):
                value = [list(units) for units in value]
            fields[name] = list(value) if isinstance(value, tuple) else value
        return {name: str(value) if isinstance(value, StrEnum) else value for name, value in fields.items()}


_WORDS = ("schedule", "shares", "stages", "sequence_parallel", "unshard", "context", "recompute", "offload")
_AFTER_DP_AND_PP = (
    "tp",
    "ep",
    "fsdp",
    "zero",
    "unshard",
    "cp",
    "context",
    "recompute",
    "offload",
    "sequence_parallel",
    "micro_batches",
    "shares",
    "schedule",
    "chunks",
    "stages",
    "seed",
)


def _word(kind: type[_Word], name: str, value: object) -> _Word:
    """One of an enumeration's words. Raises `LayoutError`."""
    try:
        return kind(str(value))
    except ValueError:
        words = list(kind)
        raise LayoutError(
            f"{name} is {', '.join(words)}, but got {value!r}; write for example {name}={words[0]}"
        ) from None


def _sequence_parallel(value: object) -> SequenceParallel:
    """From a word, or from true and false."""
    words = {"true": "on", "false": "off"}
    text = words.get(str(value).lower(), str(value).lower())
    if text not in list(SequenceParallel):
        raise LayoutError(
            f"sequence_parallel is {', '.join(SequenceParallel)}, but got {value!r}; write for example "
            "sequence_parallel=on"
        )
    return SequenceParallel(text)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise LayoutError(f"{name} is a whole number, but got {text!r}; write for example {name}=2") from None


def _shares(value: object) -> tuple[int, ...] | None:
    """From numbers, or from a text such as 6:2."""
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(_integer("a share", part.strip()) for part in value.split(":"))
    if isinstance(value, list | tuple):
        return tuple(value)
    raise LayoutError(f"shares are numbers with colons between, but got {value!r}; write for example shares=6:2")


def _stages(value: object) -> Stages:
    """A rule by its name, or a stage as any sequence of unit names."""
    if isinstance(value, str):
        try:
            return StageRule(value)
        except ValueError:
            raise LayoutError(
                f"stages are balanced by {', '.join(StageRule)} or listed by hand, but got {value!r}; "
                'use one of these, or lists such as [["embed", "layers.0"], ["layers.1", "head"]]'
            ) from None
    if isinstance(value, list | tuple) and all(isinstance(units, list | tuple) for units in value):
        stages = tuple(tuple(units) for units in value)
        if all(isinstance(unit, str) and unit for units in stages for unit in units):
            return stages
    raise LayoutError(
        f"stages given by hand are lists of unit names, one for each stage, but got {value!r}; "
        'write for example [["embed", "layers.0"], ["layers.1", "head"]]'
    )
