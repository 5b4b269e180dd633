"""What became of a call on each rank, and which of several failures is the cause of the others.

Pure: values in, one value or one error out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.errors import LaunchError

__all__ = ["Failure", "Outcome", "Success", "failure_of_call"]

# What gloo, NCCL and shared memory say on the ranks whose peer is gone; seldom the cause, nearly always the effect.
_PEER_IS_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "Read timeout",
    "remote process exited",
    "closed the channel: it has ended",
    "closed their sockets: they have ended",
    "closed its socket: it has ended",
)


@dataclass(frozen=True, kw_only=True)
class Success:
    """The call returned."""

    rank: int
    value: object


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The call did not return.

    text   a traceback, or how the process ended, or where it stood
    error  the exception itself where it could travel
    died   the process ended by itself, without an exception
    """

    rank: int
    text: str
    error: BaseException | None = None
    died: bool = False

    @property
    def is_effect(self) -> bool:
        """It looks as if only the loss of a peer was felt."""
        return not self.died and any(phrase in self.last_line for phrase in _PEER_IS_GONE)

    @property
    def last_line(self) -> str:
        return self.text.rstrip().rpartition("\n")[2]


Outcome = Success | Failure


def failure_of_call(failures: Sequence[Failure], *, world_size: int) -> BaseException:
    """The error to raise for a call that failed on `failures`, in the order in which they were heard of.

    The cause is a rank that died, else the first that does not merely miss a peer. An exception that
    travelled is raised as itself; its `__cause__` is a LaunchError with the tracebacks of all failed ranks.
    Ranks that only lost their peer get one line.
    """
    cause = min(failures, key=lambda failure: (not failure.died, failure.is_effect))
    others = [failure for failure in failures if failure is not cause]
    told = [_told(cause, world_size)]
    told += [_told_briefly(other, world_size) if other.is_effect else _told(other, world_size) for other in others]
    report = LaunchError("\n\n".join(told))
    if not isinstance(cause.error, Exception):
        return report
    cause.error.add_note(f"raised on rank {cause.rank} of {world_size}")
    cause.error.__cause__ = report
    return cause.error


def _told(failure: Failure, world_size: int) -> str:
    head = f"rank {failure.rank} of {world_size}"
    if failure.died:
        return f"{head} {failure.text}"
    return f"{head} raised:\n{failure.text.rstrip()}"


def _told_briefly(failure: Failure, world_size: int) -> str:
    return f"rank {failure.rank} of {world_size} then lost its peer: {failure.last_line[:200]}"
