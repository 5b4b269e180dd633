"""Waits for what every rank has to say about a call: its result, its error, its death, or nothing in time.

It starts and ends no process.
"""

from __future__ import annotations

import selectors
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shardwise.errors import LaunchError
from shardwise.launch.channel import Message
from shardwise.launch.outcome import Failure, Outcome, Success
from shardwise.launch.rank import rank_main, stack_file
from shardwise.launch.starter import RankProcess, RankStarter, describe_exit

__all__ = ["OnMessage", "collect"]

OnMessage = Callable[[int, object], None]

_GRACE_S = 1.0  # how long the others may still report after the first failure
_STACKS_S = 0.5  # how long stuck ranks get to write down where they stand


def collect(
    ranks: Sequence[RankProcess],
    starter: RankStarter,
    *,
    timeout_s: float | None,
    on_message: OnMessage | None = None,
) -> list[Outcome]:
    """The outcome of each rank, in the order in which they were heard of.

    After the first failure the others have a second to report theirs; those that stay silent are left out.
    LaunchError where the time is over and no rank failed: it says where each silent one stands.
    """
    heard: dict[int, Outcome] = {}
    limit = None if timeout_s is None else time.monotonic() + timeout_s
    grace: float | None = None
    with selectors.DefaultSelector() as selector:
        selector.register(starter, selectors.EVENT_READ)
        for process in ranks:
            selector.register(process.channel, selectors.EVENT_READ, process)
        while len(heard) < len(ranks):
            ends = [end for end in (limit, grace) if end is not None]
            wait = max(0.0, min(ends) - time.monotonic()) if ends else None
            ready = selector.select(wait)
            if not ready and wait is not None and time.monotonic() >= min(ends):
                break
            for key, _ in ready:
                if key.data is not None and not _hear(key.data, heard, on_message):
                    selector.unregister(key.data.channel)
            starter.poll()
            _note_deaths(ranks, starter, heard, on_message)
            if grace is None and any(isinstance(outcome, Failure) for outcome in heard.values()):
                grace = time.monotonic() + _GRACE_S
    silent = [process for process in ranks if process.rank not in heard]
    if silent and grace is None:
        raise LaunchError(_overdue(silent, starter, world_size=len(ranks), timeout_s=timeout_s))
    return list(heard.values())


def _hear(process: RankProcess, heard: dict[int, Outcome], on_message: OnMessage | None) -> bool:
    """Takes in one message; False where there will be no more."""
    message = process.channel.receive()
    if message is None:
        return False
    if message.kind == "posted":
        value = message.take_value()
        if on_message is not None:
            on_message(process.rank, value)
    elif process.rank in heard:
        message.close()
    else:
        heard[process.rank] = _outcome(process.rank, message)
    return True


def _outcome(rank: int, message: Message) -> Outcome:
    if message.kind == "error":
        text = str(message.take_value(0))
        return Failure(rank=rank, text=text, error=_error_of(message))
    try:
        return Success(rank=rank, value=message.take_value())
    except Exception as error:
        return Failure(rank=rank, text=f"a result that cannot be read here: {type(error).__name__}: {error}")


def _error_of(message: Message) -> BaseException | None:
    """The exception itself; None where it did not travel or its class cannot be made from its arguments."""
    if len(message.descriptors) < 2:
        return None
    try:
        error = message.take_value(1)
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def _note_deaths(
    ranks: Sequence[RankProcess],
    starter: RankStarter,
    heard: dict[int, Outcome],
    on_message: OnMessage | None,
) -> None:
    for process in ranks:
        if process.rank in heard or process.pid not in starter.exit_codes:
            continue
        while process.channel.readable() and _hear(process, heard, on_message):
            pass  # what it still had to say before it ended
        if process.rank not in heard:
            how = describe_exit(starter.exit_codes[process.pid])
            heard[process.rank] = Failure(rank=process.rank, text=how, died=True)


def _overdue(silent: Sequence[RankProcess], starter: RankStarter, *, world_size: int, timeout_s: float | None) -> str:
    for process in silent:
        starter.signal_rank(process.pid, signal.SIGUSR1)
    time.sleep(_STACKS_S)
    names = ", ".join(str(process.rank) for process in silent)
    ranks = f"rank {names}" if len(silent) == 1 else f"ranks {names}"
    rule = f"{ranks} of {world_size} did not finish within {timeout_s} s; raise the timeout, or see below"
    stacks = [f"rank {process.rank} stood at:\n{_stacks(starter, process)}" for process in silent]
    return "\n\n".join([rule, *stacks])


def _stacks(starter: RankStarter, process: RankProcess) -> str:
    """Its Python stacks, without our frames below the called function."""
    text = Path(stack_file(starter.folder, process.pid)).read_text(errors="replace").strip()
    ours = (rank_main.__code__.co_filename, str(Path(__file__).with_name("zygote.py")), "<frozen runpy>")
    lines = [line for line in text.splitlines() if not any(place in line for place in ours)]
    return "\n".join(lines) or "(it did not answer: it runs no Python, or is stopped)"
