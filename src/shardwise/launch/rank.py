"""The life of one rank: it waits for calls, runs them, sends back the result or the error with its traceback.

It knows the channel to the process that started it, and leaves the process without unwinding after an error:
a process whose peers are gone may hang in torch's own clean-up.
"""

from __future__ import annotations

import ctypes
import faulthandler
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch

from shardwise.errors import LaunchError
from shardwise.launch.channel import Channel
from shardwise.launch.context import RankContext, init_process_group
from shardwise.launch.surroundings import ModuleFiles, Surroundings

__all__ = ["Call", "Start", "rank_main", "stack_file"]

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a rank is told first. `process_group_timeout_s` None: the function makes the default group."""

    rank: int
    world_size: int
    rendezvous: str
    num_threads: int
    process_group_timeout_s: float | None


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call: `function(context, *args)`."""

    function: Callable[..., object]
    args: tuple[object, ...]


def stack_file(folder: str, pid: int) -> str:
    """Where a rank writes the stacks of its threads when it gets SIGUSR1."""
    return os.path.join(folder, f"stacks-{pid}.txt")


def rank_main(channel: Channel, *, folder: str) -> NoReturn:
    """Serves calls until the channel closes, then ends the process."""
    try:
        _die_with_parent()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(line_buffering=True, write_through=False)  # whole lines, at once
        with open(stack_file(folder, os.getpid()), "w") as stacks:
            faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
            _serve(channel)
    except BaseException:
        traceback.print_exc()  # nobody is left to tell
        _end(1)
    _end(0)


def _die_with_parent() -> None:
    """The kernel kills us when the process that forked us is gone, however that happened."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(channel: Channel) -> None:
    files = ModuleFiles()
    sys.meta_path.insert(0, files)
    context: RankContext | None = None
    while (message := channel.receive()) is not None:
        try:
            surroundings = message.take_value(0)
            assert isinstance(surroundings, Surroundings)
            files.follow(surroundings)
            if context is None:
                context = _join(message.take_value(1), channel)
                channel.send_values("ready", None)
                continue
            call = message.take_value(1)
            assert isinstance(call, Call)
            result = call.function(context, *call.args)
            del call
            channel.send_values("result", result)
            del result
        except BaseException as error:
            _report(channel, error)
            _end(1)


def _join(start: object, channel: Channel) -> RankContext:
    assert isinstance(start, Start)
    torch.set_num_threads(start.num_threads)

    def post(value: object) -> None:
        channel.send_values("posted", value)

    context = RankContext(
        rank=start.rank,
        world_size=start.world_size,
        local_rank=start.rank,
        rendezvous=start.rendezvous,
        post=post,
    )
    if start.process_group_timeout_s is not None:
        init_process_group(context, timeout_s=start.process_group_timeout_s)
    return context


def _report(channel: Channel, error: BaseException) -> None:
    """Sends the traceback as text and, where it can travel, the exception itself."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    sys.stdout.flush()
    try:
        channel.send_values("error", text, error.with_traceback(None))
    except LaunchError:
        channel.send_values("error", text)
