"""How ranks that another launcher started end together: the first that fails says why, the others say nothing.

    rank 2 fails ── "failed" in the store ──► tells its error, ends with status 1
    rank 0, 1, 3    lose rank 2, find "failed" ─► end with status 1, silently

The launcher ends those that are stuck (mpirun and torchrun do; srun with --kill-on-bad-exit). Knows a store; refuses to
know what ranks do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

from torch._C._distributed_c10d import Store

from shardwise.errors import TransferError
from shardwise.launch.context import RankContext

__all__ = ["ending_together"]

_KEY = "shardwise failed"
_ASKED = "shardwise failed: who asked"
_GRACE_S = 1.5  # how long an error that may be of another's making waits for that one's
_LOOK_S = 0.05
_LATEST_S = 4.0  # how long rank 0 stays for others to ask; those that are stuck never do
_ANSWER = timedelta(seconds=5)


@contextlib.contextmanager
def ending_together(
    context: RankContext, store: Store | None, *, on_failure: Callable[[], None] | None = None
) -> Iterator[None]:
    """Inside, an error of one rank ends all. Every rank uses it, with the store in which they have met.

    The error of the first rank goes on, with a note whose it is; what others raise becomes `SystemExit`. `on_failure`
    is called on each.
    """
    try:
        yield
    except Exception as error:
        if on_failure is not None:
            on_failure()
        if store is None or context.world_size == 1:
            raise
        if isinstance(error, TransferError | RuntimeError):
            time.sleep(_GRACE_S)
        first = _is_first(context, store)
        if context.rank == 0:
            _wait_for_others(context, store)  # where the store lives in this process, they still find it
        if not first:
            raise SystemExit(1) from error
        error.add_note(f"rank {context.rank} of {context.world_size}; the others end with it")
        raise


def _is_first(context: RankContext, store: Store) -> bool:
    """Where the store is gone with rank 0, nobody can know, and everybody speaks."""
    own = str(context.rank)
    try:
        store.set_timeout(_ANSWER)
        store.add(_ASKED, 1)
        said = store.compare_set(_KEY, "", own)
    except Exception:
        return True
    return bytes(said).decode() == own


def _wait_for_others(context: RankContext, store: Store) -> None:
    """Until every rank has asked who was first, or the latest moment."""
    with contextlib.suppress(Exception):
        for _ in range(round(_LATEST_S / _LOOK_S)):
            if store.add(_ASKED, 0) >= context.world_size:
                return
            time.sleep(_LOOK_S)
