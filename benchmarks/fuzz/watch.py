"""What reading a file may not do: run code, start a process, write, hang, or take memory without bound."""

from __future__ import annotations

import resource
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

__all__ = ["Forbidden", "TimedOut", "Watch"]

# Audit events of Python (https://docs.python.org/3/library/audit_events.html): a process is started, a pickle names
# a function, a library is loaded.
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "socket.connect"),
    *("pickle.find_class", "marshal.loads", "ctypes.dlopen"),
)


class Forbidden(BaseException):
    """Reading a file did what only a program may do; no `except Exception` hides it."""


class TimedOut(BaseException):
    """Reading a file did not end."""


class Watch:
    """Watches this process while `reading`; hooks of Python cannot be taken out again, so there is one for all."""

    def __init__(self, *, seconds: float, max_bytes: int) -> None:
        self._seconds, self._max_bytes = seconds, max_bytes
        self._on = False
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Raises Forbidden, TimedOut or MemoryError out of what runs inside."""
        self._seen.clear()
        before = resource.getrlimit(resource.RLIMIT_AS)
        handler = signal.signal(signal.SIGALRM, _timed_out)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        resource.setrlimit(resource.RLIMIT_AS, (_address_bytes() + self._max_bytes, before[1]))
        self._on = True
        try:
            yield
        finally:
            self._on = False
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_AS, before)
        if self._seen:  # somebody caught what the hook raised
            raise Forbidden(self._seen[0])

    def _hook(self, event: str, told: tuple[Any, ...]) -> None:
        if (
            not self._on
            or not event.startswith(_FORBIDDEN)
            or threading.current_thread() is not threading.main_thread()
        ):
            return
        if told != (None,):  # the process itself, which is no library
            self._seen.append(f"{event} {told!r:.200}")
            raise Forbidden(self._seen[-1])


def _timed_out(_number: int, _frame: FrameType | None) -> NoReturn:
    raise TimedOut


def _address_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
