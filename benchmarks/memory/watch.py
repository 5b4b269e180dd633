"""Watches the memory of a command and of every process it starts, from outside. Knows /proc; refuses to know ranks.

resident   VmHWM: the kernel's own high-water mark of what is mapped and in memory, shared pages in full
own        PSS: a page that n processes share counts 1/n in each; no mark is kept of it, so it is sampled
private    pages that no other process has; sampled as well
"""

from __future__ import annotations

import dataclasses
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["Sample", "Watched", "watched_command"]

_PERIOD_S = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look at a process; bytes. `seconds` since the command started."""

    seconds: float
    peak_resident: int
    resident: int
    own: int
    private: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watched:
    """All looks at one process, in order."""

    pid: int
    command: str
    samples: tuple[Sample, ...]

    @property
    def peak_resident(self) -> int:
        return max(sample.peak_resident for sample in self.samples)

    @property
    def peak_own(self) -> int:
        return max(sample.own for sample in self.samples)

    @property
    def peak_private(self) -> int:
        return max(sample.private for sample in self.samples)


def watched_command(command: Sequence[str], *, timeout_s: float) -> tuple[str, dict[int, Watched]]:
    """Run a command to its end; its output, and what was seen of it (first) and of its descendants, by pid.

    Raises RuntimeError with the output where it fails, and `subprocess.TimeoutExpired`.
    """
    start = time.monotonic()
    samples: dict[int, list[Sample]] = {}
    commands: dict[int, str] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        root = psutil.Process(process.pid)
        try:
            while process.poll() is None:
                if time.monotonic() - start > timeout_s:
                    raise subprocess.TimeoutExpired(list(command), timeout_s)
                for pid in [process.pid, *_descendants(root)]:
                    sample = _look(pid, time.monotonic() - start)
                    if sample is not None:
                        samples.setdefault(pid, []).append(sample)
                        commands.setdefault(pid, _command(pid))
                time.sleep(_PERIOD_S)
        except BaseException:
            process.terminate()  # its ranks end with it
            raise
        output = process.stdout.read() if process.stdout is not None else ""
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-4000:]}")
    return output, {
        pid: Watched(pid=pid, command=commands[pid], samples=tuple(looks)) for pid, looks in samples.items()
    }


def _descendants(root: psutil.Process) -> list[int]:
    try:
        return [child.pid for child in root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _look(pid: int, seconds: float) -> Sample | None:
    """None where the process has ended."""
    try:
        rollup = _kilobytes(Path(f"/proc/{pid}/smaps_rollup").read_text().partition("\n")[2])
        status = _kilobytes(Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    if "VmHWM" not in status or "Pss" not in rollup:
        return None
    return Sample(
        seconds=seconds,
        peak_resident=status["VmHWM"] * 1024,
        resident=rollup["Rss"] * 1024,
        own=rollup["Pss"] * 1024,
        private=(rollup["Private_Clean"] + rollup["Private_Dirty"]) * 1024,
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _kilobytes(text: str) -> Mapping[str, int]:
    """Of a file in /proc: the fields that are given in kB."""
    fields = (line.partition(":") for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) for name, _, value in fields}
