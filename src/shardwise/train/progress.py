"""Progress for people: a bar on a terminal, plain lines elsewhere. Knows events; refuses to know a run's insides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from shardwise.events import Event
from shardwise.quantities import format_bytes, format_count, format_duration, format_seconds

__all__ = ["ProgressSink"]

_PLAIN_EVERY_S = 10.0  # between two plain lines
_SMOOTH = 0.1  # weight of the newest step in the mean time of a step


class ProgressSink:
    """A `Sink` that shows what a run tells. `total` steps are known from its event `start`.

    bar   False where the terminal may not be the user's: mpirun gives every rank one, and writes to a file what it says
    """

    def __init__(
        self, console: Console | None = None, *, bar: bool = True, plain_every_s: float = _PLAIN_EVERY_S
    ) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._shows_bar = bar and self._console.is_terminal
        self._plain_every_s = plain_every_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = self._first = 0
        self._mean_s = 0.0
        self._counts, self._samples = "tokens", 0  # what a step's weight counts; of "samples" every step has as many
        self._printed_s = float("-inf")
        self._sent_bytes: Mapping[str, int] = {}  # of the last step, by axis and kind
        self._timeline = ""  # of the last step that was recorded

    def emit(self, event: Event) -> None:
        """Show one event; kinds it does not know are left out."""
        data: Mapping[str, Any] = event.data
        match event.kind:
            case "plan":
                self._print(str(data["text"]) + "\n")
            case "estimate" | "layout" | "relayout" | "measured" | "refused":
                self._print(str(data["text"]))
            case "start":
                self._start(data)
            case "step":
                self._step(event.step or 0, data)
            case "compiled":
                for note in data["notes"]:
                    self._print(f"rank 0: {note}")
            case "evaluation":
                self._evaluation(_number(event), data)
            case "checkpoint":
                self._print(
                    f"checkpoint of step {_number(event)} in {data['folder']} ({format_seconds(data['step_s'])})"
                )
            case "timeline":
                self._timeline = str(data["text"]) if data["num_ranks"] > 1 else ""
            case "end":
                self._end(data)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _start(self, data: Mapping[str, Any]) -> None:
        self._total, self._first = int(data["steps"]), int(data["first_step"])
        self._counts, self._samples = data.get("counts", self._counts), int(data.get("global_batch", 0))
        self._print(f"data: {data['data']}")
        resumed = f", resumed after step {self._first}" if self._first else ""
        self._print(
            f"training {format_count(data['num_parameters'], 'parameters')} for {self._total} steps on "
            f"{data['layout']}{resumed}; ready after {format_duration(data['ready_s'])}"
        )
        if data.get("precision"):
            self._print(f"precision: {data['precision']}")
        for line in data.get("split_backward", ()):
            self._print(f"  rank 0: {line}")
        if self._shows_bar:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=self._console
            )
            self._task = self._bar.add_task("", total=self._total, completed=self._first)
            self._bar.start()

    def _step(self, step: int, data: Mapping[str, Any]) -> None:
        seconds = float(data["step_s"])
        first = step <= self._first + 1  # the first step of a signature traces it; it tells nothing of the others
        self._mean_s = seconds if first else self._mean_s + _SMOOTH * (seconds - self._mean_s)
        left = (self._total - step - 1) * self._mean_s
        memory = data["memory_bytes"]
        self._sent_bytes = data.get("sent_bytes", {})
        counted = self._samples if self._counts == "samples" else data["weight"]
        text = (
            f"step {step + 1}/{self._total}  loss {data['loss']:.4f}  "
            f"{format_count(counted / self._mean_s)} {self._counts}/s  "
            f"memory {' '.join(map(format_bytes, memory))}  ETA {format_duration(left)}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step + 1, description=text)
            return
        now, last = time.monotonic(), step + 1 == self._total
        if step == self._first or last or now - self._printed_s >= self._plain_every_s:
            self._printed_s = now
            self._print(text)

    def _evaluation(self, number: int, data: Mapping[str, Any]) -> None:
        own = ("loss", "weight", "samples", "figures", "report")
        figures = [f"{k} {v:.2f}" for k, v in data.items() if k not in own]
        figures += [f"{k} {v:.4f}" for k, v in data.get("figures", {}).items()]
        told = "".join(f"  {figure}" for figure in figures)
        self._print(f"evaluation after step {number}: held-out loss {data['loss']:.4f}{told}")
        if data.get("report"):
            self._print(str(data["report"]))

    def _end(self, data: Mapping[str, Any]) -> None:
        self.close()
        if data["first_loss"] is None:
            self._print(f"nothing left to train: all {self._total} steps are done")
        else:
            self._print(
                f"loss {data['first_loss']:.4f} -> {data['last_loss']:.4f} (mean of the last 10 steps) in "
                f"{format_duration(data['train_s'])}"
            )
            sent = [f"{kind} {format_bytes(nbytes)}" for kind, nbytes in self._sent_bytes.items() if nbytes]
            if sent:
                self._print(f"rank 0 sends in a step: {', '.join(sent)}")
            if self._timeline:
                self._print(self._timeline)


def _number(event: Event) -> int:
    """Steps as people count them."""
    return (event.step or 0) + 1
