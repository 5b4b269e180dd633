"""Of several failures one is the cause; the others felt it."""

from __future__ import annotations

import pytest

from shardwise.errors import ConfigError, LaunchError
from shardwise.launch.outcome import Failure, failure_of_call

LOST = Failure(rank=0, text="Traceback …\nRuntimeError: Connection closed by peer [127.0.0.1]", error=RuntimeError("x"))
WRONG = Failure(rank=1, text="Traceback …\nConfigError: no such file", error=ConfigError("no such file"))
KILLED = Failure(rank=2, text="was killed by signal 9 (SIGKILL)", died=True)


def test_an_exception_comes_back_as_itself_with_its_rank_and_traceback() -> None:
    error = failure_of_call([WRONG], world_size=4)
    assert error is WRONG.error
    assert "raised on rank 1 of 4" in error.__notes__
    assert str(error.__cause__) == "rank 1 of 4 raised:\nTraceback …\nConfigError: no such file"


def test_a_lost_peer_is_the_effect_even_if_heard_first() -> None:
    error = failure_of_call([LOST, WRONG], world_size=4)
    assert error is WRONG.error
    assert "rank 0 of 4 then lost its peer: RuntimeError: Connection closed" in str(error.__cause__)


def test_a_dead_rank_is_the_cause_of_all() -> None:
    error = failure_of_call([LOST, WRONG, KILLED], world_size=4)
    assert isinstance(error, LaunchError)
    assert str(error).startswith("rank 2 of 4 was killed by signal 9 (SIGKILL)")
    assert "no such file" in str(error)


def test_where_all_lost_a_peer_the_first_one_heard_is_raised() -> None:
    assert failure_of_call([LOST], world_size=2) is LOST.error


def test_what_would_end_our_own_process_is_wrapped() -> None:
    left = Failure(rank=0, text="SystemExit: 3", error=SystemExit(3))
    error = failure_of_call([left], world_size=1)
    assert isinstance(error, LaunchError)
    assert "SystemExit: 3" in str(error)


@pytest.mark.parametrize(
    "last",
    [
        "TransferError: waiting for x from rank 2 failed: rank 2 closed the channel: it has ended; gone",
        "RuntimeError: ranks at places [1] of the group closed their sockets: they have ended",
        "RuntimeError: a rank of this host closed its socket: it has ended",
    ],
)
def test_ranks_that_miss_a_peer_in_shared_memory_are_effects_too(last: str) -> None:
    text = f"Traceback …\n{last}"
    told = str(failure_of_call([Failure(rank=0, text=text), KILLED], world_size=4))
    assert told.startswith("rank 2 of 4 was killed by signal 9")
    assert "rank 0 of 4 then lost its peer" in told
