"""What happened, on which rank, when: frozen records, and where they go.

Events are how a run speaks to progress bars, reports and the next plan: through a file of JSON lines, never
through calls. This file knows how a record is written and read back. It does not know what kinds exist or
what their data mean: `kind` and `data` belong to whoever emits.

    {"kind": "step", "rank": 0, "step": 12, "seconds": 3.25, "data": {"loss": 4.1}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from shardwise.errors import ConfigError
from shardwise.files import check_regular

__all__ = ["Event", "JsonlSink", "MemorySink", "NullSink", "Sink", "event_files", "read_events"]

_FIELDS = frozenset({"kind", "rank", "step", "seconds", "data"})
_REPAIR = "give the events that a run wrote"


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happened.

    kind     a short name such as `step`, `checkpoint`, `rank_died`
    rank     the global rank it happened on; -1 for the process that launched the ranks
    step     the optimizer step it belongs to; None outside of steps
    seconds  when: seconds since the run began, by the emitter's monotonic clock
    data     JSON values only (strings, finite or infinite numbers, booleans, None, lists, mappings)
    """

    kind: str
    rank: int
    seconds: float
    step: int | None = None
    data: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kind:
            raise ConfigError("an event needs a kind, got an empty string; name what happened")
        if self.rank < -1 or (self.step is not None and self.step < 0):
            raise ConfigError(f"event {self.kind!r}: rank={self.rank} must be ≥ -1 and step={self.step} ≥ 0")
        if not math.isfinite(self.seconds):
            raise ConfigError(f"event {self.kind!r}: seconds={self.seconds} must be finite")

    def to_json(self) -> str:
        """One line, without its newline."""
        record = {"kind": self.kind, "rank": self.rank, "step": self.step, "seconds": self.seconds}
        try:
            return json.dumps({**record, "data": dict(self.data)}, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            rule = f"event {self.kind!r} has data that are not JSON ({error}); convert them first"
            raise ConfigError(rule) from error

    @classmethod
    def from_json(cls, line: str) -> Event:
        """The event of one line; ConfigError says what is wrong with it."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"an event is a line of JSON, but {line[:80]!r} is not: {error}; {_REPAIR}") from error
        if not isinstance(record, dict) or set(record) != _FIELDS or not isinstance(record["data"], dict):
            raise ConfigError(f"an event has exactly the fields {sorted(_FIELDS)}, not {line[:80]!r}; {_REPAIR}")
        try:
            step = None if record["step"] is None else int(record["step"])
            return cls(
                kind=str(record["kind"]),
                rank=int(record["rank"]),
                step=step,
                seconds=float(record["seconds"]),
                data=record["data"],
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"an event's rank and step are integers, seconds a number, not {line[:80]!r}; {_REPAIR}"
            ) from error


class Sink(Protocol):
    """Where events go. Emitting must be cheap and must not fail the run's arithmetic."""

    def emit(self, event: Event) -> None: ...

    def close(self) -> None: ...


class NullSink:
    """Events go nowhere."""

    def emit(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class MemorySink:
    """Events are kept in `events`, in order: for tests and notebooks."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


class JsonlSink:
    """Appends one JSON line an event; each line reaches the file at once, so a killed run loses none.

    A folder gets one file a rank (`events/rank-00003.jsonl`); a path that ends in `.jsonl` is that file.
    Ranks must not share a file. Use with `with`, or call `close`. A resumed run appends; a last line that was
    cut off when its writer was killed is removed first.
    """

    def __init__(self, path: str | Path, *, rank: int = 0) -> None:
        self.path = self.path_of(path, rank=rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(self.path)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")  # open as long as the sink is

    @staticmethod
    def path_of(path: str | Path, *, rank: int = 0) -> Path:
        """The file that a sink of this rank writes."""
        path = Path(path)
        return path if path.suffix == ".jsonl" else path / f"rank-{rank:05d}.jsonl"

    def emit(self, event: Event) -> None:
        self._file.write(event.to_json() + "\n")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _drop_unfinished_line(path: Path) -> None:
    if path.is_file() and (written := path.read_bytes()) and not written.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(written.rfind(b"\n") + 1)


def event_files(path: str | Path) -> tuple[Path, ...]:
    """The `.jsonl` files of a folder in order of rank, or the one file itself."""
    path = Path(path)
    files = tuple(sorted(path.glob("*.jsonl"))) if path.is_dir() else (path,)
    if not files or not files[0].is_file():
        raise ConfigError(f"no events at {path}; give the .jsonl file or the folder that a run wrote")
    return files


def read_events(path: str | Path) -> Iterator[Event]:
    """Every event of a file or folder, file after file, each in the order it was written.

    A last line without its newline was being written when the run was killed: it is left out. Any other line
    that is not an event is a ConfigError that names file and line.
    """
    for file in event_files(path):
        check_regular(file, what="a file of events", repair=_REPAIR)
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    break
                try:
                    yield Event.from_json(line)
                except ConfigError as error:
                    raise ConfigError(f"{file}:{number}: {error}") from error
