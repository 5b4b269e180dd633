"""The near end of the zygote: starts it, asks it for ranks, and hears which of them ended and how.

One starter may serve several pools. It knows processes and their exit codes, not calls or results.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shardwise.errors import LaunchError
from shardwise.launch.channel import Channel, Message, channel_pair
from shardwise.launch.environment import child_environment

__all__ = ["RankProcess", "RankStarter", "describe_exit"]

_END_S = 5.0


@dataclass(frozen=True, kw_only=True)
class RankProcess:
    """A started rank and our end of the channel to it."""

    rank: int
    pid: int
    channel: Channel


def describe_exit(code: int) -> str:
    """`-9` -> `"was killed by signal 9 (SIGKILL)"`, `3` -> `"ended with exit code 3"`."""
    if code >= 0:
        return f"ended with exit code {code}"
    names = {int(member): member.name for member in signal.Signals}
    return f"was killed by signal {-code} ({names.get(-code, 'unknown')})"


class RankStarter:
    """Starts ranks in milliseconds each, once the first few seconds of importing torch are over.

    preload  modules to import once, before any rank is forked (they must not open the GPU)
    Use with `with`. Ending it ends every rank it started. LaunchError where it cannot be started.
    """

    def __init__(self, *, preload: Sequence[str] = (), start_timeout_s: float = 120.0) -> None:
        if sys.platform != "linux":
            raise LaunchError(f"shardwise starts local ranks on Linux, not on {sys.platform}; start with torchrun")
        self.folder = tempfile.mkdtemp(prefix="shardwise-")
        self.exit_codes: dict[int, int] = {}
        self._control, theirs = channel_pair()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "shardwise.launch.zygote", str(theirs.fileno())],
            env=child_environment(str(Path(__file__).parents[2])),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        self.close = weakref.finalize(self, _close, self._control, self._process, self.folder, os.getpid())
        self._control.send_values("start", (self.folder, tuple(preload), tuple(sys.path)))
        self._started = False
        self._preload = tuple(preload)
        self._deadline = time.monotonic() + start_timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        return bool(self.close.alive) and self._process.poll() is None

    def fileno(self) -> int:
        """Readable when `poll` has something to learn."""
        self._must_be_open()
        return self._control.fileno()

    def start_rank(self, rank: int) -> RankProcess:
        """Forks one rank."""
        self._must_be_open()
        self._wait_until_started()
        channel, theirs = channel_pair()
        try:
            self._control.send("fork", (theirs.fileno(),), rank=rank)
        except OSError as error:
            raise self._gone() from error
        finally:
            theirs.close()
        while True:
            message = self._receive()
            if message.kind == "forked":
                pid = int(str(message.fields["pid"]))
                self.exit_codes.pop(pid, None)  # of an earlier process with the same id
                return RankProcess(rank=rank, pid=pid, channel=channel)

    def signal_rank(self, pid: int, number: signal.Signals) -> None:
        """Signals a rank, if it still lives: only the process that forked it can be sure of its id."""
        self._must_be_open()
        try:
            self._control.send("signal", pid=pid, number=int(number))
        except OSError as error:
            raise self._gone() from error

    def poll(self) -> None:
        """Takes in, without waiting, which ranks ended: `exit_codes[pid]`, negative for a signal."""
        self._must_be_open()
        while self._control.readable():
            self._receive()

    def _must_be_open(self) -> None:
        if not self.close.alive:
            raise LaunchError("the process that starts ranks has ended; make a new RankStarter or RankPool")

    def _wait_until_started(self) -> None:
        if self._started:
            return
        if not self._control.readable(within_s=max(0.0, self._deadline - time.monotonic())):
            self.close()
            raise LaunchError(f"importing torch and {self._preload} took too long; try again, or raise start_timeout_s")
        message = self._receive()
        if message.kind == "failed":
            self.close()
            raise LaunchError(f"preloading {self._preload} failed: {message.fields['reason']}; correct the list")
        self._started = True

    def _receive(self) -> Message:
        message = self._control.receive()
        if message is None:
            raise self._gone()
        if message.kind == "exited":
            self.exit_codes[int(str(message.fields["pid"]))] = int(str(message.fields["code"]))
        return message

    def _gone(self) -> LaunchError:
        try:
            how = describe_exit(self._process.wait(_END_S))
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        self.close()
        return LaunchError(f"the process that starts ranks {how}, and all ranks ended with it; start again")


def _close(control: Channel, process: subprocess.Popen[bytes], folder: str, owner: int) -> None:
    """Asks the zygote to end; its ranks end with it. A forked copy of this process has no say in it."""
    if os.getpid() == owner:
        with suppress(BrokenPipeError):
            control.send("end")
    control.close()
    if os.getpid() != owner:
        return
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
