"""A store of torch.distributed that lives in rank 0 and is reached through MPI: ranks meet without an address.

    rank r   ── number, question ──► rank 0: its progress thread answers, at once or when the key is there
             ◄── number, answer ────

Knows keys and values; refuses to know what is kept.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

from shardwise.comm.mpi_world import ANSWER, ASK, MpiWorld

__all__ = ["MpiStore"]

_TIMEOUT = timedelta(seconds=300)


class MpiStore(Store):
    """One of a world; every rank makes it, as the same one of several."""

    def __init__(self, world: MpiWorld, *, timeout: timedelta = _TIMEOUT) -> None:
        super().__init__()
        self._world = world
        self._timeout_s = timeout.total_seconds()
        self._asking = threading.Lock()
        self._count = 0
        self._kept = Kept()
        self._waiting: list[tuple[int, int, tuple[Any, ...]]] = []  # rank, number and question without an answer yet
        self._answers: list[Any] = []  # of others, on their way
        if world.rank == 0:
            world.serve(self._serve)

    def set(self, key: str, value: bytes | str) -> None:
        """Keep a value."""
        self._ask("set", key, _bytes(value))

    def get(self, key: str) -> bytes:
        """The value of a key, as soon as there is one. RuntimeError after the timeout."""
        got: bytes = self._ask("get", key)
        return got

    def add(self, key: str, value: int) -> int:
        """Add to a number, which is 0 at first."""
        total: int = self._ask("add", key, value)
        return total

    def compare_set(self, key: str, expected_value: bytes | str, desired_value: bytes | str) -> bytes:
        """Keep what is desired where the value is what is expected, "" being none; the value afterwards."""
        now: bytes = self._ask("compare_set", key, _bytes(expected_value), _bytes(desired_value))
        return now

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Until all keys are there. RuntimeError after the timeout."""
        self._ask("wait", tuple(keys), timeout_s=None if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask("check", tuple(keys)))

    def delete_key(self, key: str) -> bool:
        """Whether it was there."""
        return bool(self._ask("delete_key", key))

    deleteKey = delete_key  # noqa: N815  # under the name that C++ looks for

    def num_keys(self) -> int:
        """How many there are."""
        return int(self._ask("num_keys"))

    getNumKeys = num_keys  # noqa: N815

    def set_timeout(self, timeout: timedelta) -> None:
        """Of questions from now on."""
        self._timeout_s = timeout.total_seconds()

    def _ask(self, *question: Any, timeout_s: float | None = None) -> Any:
        limit_s = self._timeout_s if timeout_s is None else timeout_s
        what = f"the store: {question[0]} {question[1] if len(question) > 1 else ''}"
        if self._world.rank == 0:
            return self._ask_here(question, limit_s, what)
        with self._asking:
            self._count += 1
            return self._ask_rank_0(self._count, question, limit_s, what)

    def _ask_here(self, question: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        found: list[Any] = []

        def answered() -> bool:
            answer = self._kept.answer(question)
            if answer is not None:
                found.append(answer[0])
            return bool(found)

        self._world.wait_until(answered, timeout_s=timeout_s, what=what)
        return found[0]

    def _ask_rank_0(self, number: int, question: tuple[Any, ...], timeout_s: float, what: str) -> Any:
        """Answers that come too late, to questions that were given up, are passed over by their number."""
        world, byte = self._world, self._world.mpi.BYTE
        told = bytearray(pickle.dumps((number, question)))
        sent = world.start(lambda: world.comm.Isend([told, len(told), byte], 0, ASK), told)
        world.wait(sent, timeout_s=timeout_s, what=what)
        found: list[Any] = []

        def answered() -> bool:
            message = _taken(world, 0, ANSWER)
            if message is not None and message[1][0] == number:
                found.append(message[1][1])
            return bool(found)

        world.wait_until(answered, timeout_s=timeout_s, what=what)
        return found[0]

    def _serve(self) -> bool:
        """Takes in what others ask, and answers what can be answered; with the lock of the world."""
        came = False
        while (message := _taken(self._world, self._world.mpi.ANY_SOURCE, ASK)) is not None:
            came = True
            rank, (number, question) = message
            self._waiting.append((rank, number, question))
        self._waiting = [each for each in self._waiting if not self._answered(*each)]
        self._answers = [each for each in self._answers if not each.Test()]
        return came

    def _answered(self, rank: int, number: int, question: tuple[Any, ...]) -> bool:
        answer = self._kept.answer(question)
        if answer is None:
            return False
        told = bytearray(pickle.dumps((number, answer[0])))
        comm, byte = self._world.comm, self._world.mpi.BYTE
        self._answers.append(comm.Isend([told, len(told), byte], rank, ANSWER))  # the request holds the buffer
        return True


class Kept:
    """Keys and values, and what is answered to a question: nothing while it has to wait."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def answer(self, question: tuple[Any, ...]) -> tuple[Any] | None:
        """In a tuple; None: not yet."""
        kind, *told = question
        if kind == "get":
            return (self._values[told[0]],) if told[0] in self._values else None
        if kind == "wait":
            return (True,) if all(key in self._values for key in told[0]) else None
        return (self._at_once(kind, *told),)

    def _at_once(self, kind: str, key: Any = None, *values: Any) -> Any:
        if kind == "set":
            self._values[key] = values[0]
        elif kind == "add":
            self._values[key] = str(int(self._values.get(key, b"0")) + values[0]).encode()
            return int(self._values[key])
        elif kind == "compare_set":
            if self._values.get(key, b"") == values[0]:
                self._values[key] = values[1]
            return self._values.get(key, values[0])
        elif kind == "check":
            return all(each in self._values for each in key)
        elif kind == "delete_key":
            return self._values.pop(key, None) is not None
        elif kind == "num_keys":
            return len(self._values)
        return None


def _taken(world: MpiWorld, source: int, tag: int) -> tuple[int, Any] | None:
    """Who has sent the next message of a tag, and what, if there is one; with the lock of the world."""
    status = world.mpi.Status()
    message = world.comm.Improbe(source, tag, status)
    if message is None:
        return None
    told = bytearray(status.Get_count(world.mpi.BYTE))
    message.Recv([told, len(told), world.mpi.BYTE])
    return int(status.Get_source()), pickle.loads(bytes(told))


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
