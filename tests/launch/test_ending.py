"""Of ranks that fail together the first says why; an error that may be of another's making waits for that one's."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch.distributed import HashStore

from shardwise.errors import ConfigError, TransferError
from shardwise.launch import RankContext, ending
from shardwise.launch.ending import ending_together


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was waited, without waiting."""
    waited: list[float] = []
    monkeypatch.setattr(ending.time, "sleep", waited.append)
    return waited


def context(rank: int, world_size: int = 4) -> RankContext:
    return RankContext(rank=rank, world_size=world_size, local_rank=rank, rendezvous="")


def test_the_first_error_goes_on_and_says_whose_it_is(pauses: list[float]) -> None:
    store = HashStore()
    with pytest.raises(ConfigError, match="the reason") as raised, ending_together(context(2), store):
        raise ConfigError("the reason")
    assert raised.value.__notes__ == ["rank 2 of 4; the others end with it"]
    assert pauses == []


def test_the_others_end_silently_with_status_1(pauses: list[float]) -> None:
    store = HashStore()
    with pytest.raises(ConfigError), ending_together(context(2), store):
        raise ConfigError("the reason")
    for rank in (1, 3, 0):
        with pytest.raises(SystemExit) as raised, ending_together(context(rank), store):
            raise TransferError("rank 2 is gone")
        assert raised.value.code == 1
    assert pauses == [1.5, 1.5, 1.5]  # each gave rank 2 time to speak first


@pytest.mark.parametrize("first", [0, 2])
def test_rank_0_stays_until_all_have_asked_because_the_store_may_live_in_it(
    monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    store, said = HashStore(), []
    late = iter((3, 1) if first else (3, 1, 2))

    def another_comes(_: float) -> None:
        rank = next(late, None)
        if rank is not None:
            said.append(rank if ending._is_first(context(rank), store) else None)

    monkeypatch.setattr(ending.time, "sleep", another_comes)
    if first:
        assert ending._is_first(context(first), store)
    with pytest.raises(SystemExit if first else ConfigError), ending_together(context(0), store):
        raise ConfigError("the reason")
    assert said == [None, None] if first else [None, None, None]


def test_rank_0_does_not_wait_for_ever_for_ranks_that_are_stuck(pauses: list[float]) -> None:
    with pytest.raises(ConfigError), ending_together(context(0), HashStore()):
        raise ConfigError("the reason")
    assert sum(pauses) == pytest.approx(4.0)


def test_where_the_store_is_gone_everybody_speaks() -> None:
    class Gone(HashStore):
        def set_timeout(self, timeout: timedelta) -> None:
            raise RuntimeError("connection reset")

    with pytest.raises(TransferError, match="lost"), ending_together(context(1), Gone()):
        raise TransferError("lost rank 0")


def test_who_is_alone_raises_as_ever_and_is_told_of_the_failure() -> None:
    told: list[str] = []
    failed = lambda: told.append("failed")  # noqa: E731
    with pytest.raises(ConfigError), ending_together(context(0, 1), None, on_failure=failed):
        raise ConfigError("the reason")
    assert told == ["failed"]


def test_without_an_error_nothing_is_said() -> None:
    store = HashStore()
    with ending_together(context(1), store):
        pass
    assert store.num_keys() == 0
