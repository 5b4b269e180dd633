"""The process that starts ranks: it imported torch once, and forks. `python -m shardwise.launch.zygote FD`.

    script, notebook, pytest ──starts──▶ zygote ──forks──▶ rank 0, rank 1, …      (milliseconds each)
             └────────────── a socket to each rank; calls and results ──────┘

It has no thread, opens no device and runs nothing of the user's but the imports it was asked to preload. It
ends, and with it every rank, when the process that started it is gone. It does not know what ranks do.
"""

from __future__ import annotations

import gc
import os
import selectors
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

import torch
import torch.distributed  # imported here so that no rank has to

from shardwise.errors import LaunchError
from shardwise.launch.channel import Channel, Message
from shardwise.launch.rank import rank_main

__all__ = ["main"]

_LOOK_FOR_PARENT_S = 1.0


class Closable(Protocol):
    """A socket, a channel, a selector."""

    def close(self) -> None: ...


def main(control_descriptor: int) -> None:
    """Serves fork requests until the other end of the control socket is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that started us
    control = Channel(socket.socket(fileno=control_descriptor))
    start = control.receive()
    if start is None:
        return
    folder, preload, sys_path = cast(tuple[str, tuple[str, ...], tuple[str, ...]], start.take_value())
    sys.path[:] = sys_path
    try:
        if _preload(control, preload):
            gc.collect()
            gc.freeze()  # a collection in a rank would write into every page that it shares with this process
            _serve(control, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _preload(control: Channel, names: tuple[str, ...]) -> bool:
    """Imports what was asked for and reports `ready`, or `failed` with the reason."""
    try:
        for name in names:
            import_module(name)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise LaunchError(f"importing one of {names} opened the GPU, after which no rank can be forked")
    except Exception as error:
        control.send("failed", reason=f"{type(error).__name__}: {error}"[:4096])
        return False
    control.send("ready")
    return True


def _serve(control: Channel, folder: str) -> None:
    parent = os.getppid()
    alive: set[int] = set()
    wake_read, wake_write = socket.socketpair()
    wake_read.setblocking(False)
    wake_write.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # only wakes the selector below
    selector = selectors.DefaultSelector()
    selector.register(control.fileno(), selectors.EVENT_READ)
    selector.register(wake_read.fileno(), selectors.EVENT_READ)
    try:
        while os.getppid() == parent:
            ready = {key.fd for key, _ in selector.select(_LOOK_FOR_PARENT_S)}
            if wake_read.fileno() in ready:
                wake_read.recv(4096)
            if control.fileno() in ready:
                request = control.receive()
                if request is None or request.kind == "end":
                    return
                if request.kind == "signal":
                    _signal(request, alive)
                else:
                    inherited: list[Closable] = [control, wake_read, wake_write, selector]
                    alive.add(_fork(control, request, folder=folder, close_in_child=inherited))
            _report_exits(control, alive)
    except BrokenPipeError:
        return
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)


def _signal(request: Message, alive: set[int]) -> None:
    pid, number = int(str(request.fields["pid"])), int(str(request.fields["number"]))
    if pid in alive:
        os.kill(pid, number)


def _fork(control: Channel, request: Message, *, folder: str, close_in_child: Sequence[Closable]) -> int:
    (descriptor,) = request.descriptors
    with warnings.catch_warnings():
        # Python ≥ 3.12 counts the idle threads of BLAS, which survive a fork by handlers of their own
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _become_rank(descriptor, folder=folder, close=close_in_child)
    os.close(descriptor)
    control.send("forked", rank=request.fields["rank"], pid=pid)
    return pid


def _become_rank(descriptor: int, *, folder: str, close: Sequence[Closable]) -> NoReturn:
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for resource in close:
            resource.close()
        rank_main(Channel(socket.socket(fileno=descriptor)), folder=folder)
    finally:
        os._exit(1)  # never back into the zygote's own code


def _report_exits(control: Channel, alive: set[int]) -> None:
    while alive:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        alive.discard(pid)
        control.send("exited", pid=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # nothing to unwind, and torch takes a second for it
