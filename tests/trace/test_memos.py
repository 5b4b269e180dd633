"""Memos of a model are found wherever they stand; those of torch and of other code are left alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from shardwise.trace.memos import forget, memos_of


@functools.lru_cache
def table(width: int) -> torch.Tensor:
    return torch.ones(width)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    memory = functools.lru_cache(maxsize=1)(function)

    def call(*args: Any) -> Any:
        return memory(*args)

    return call


class Base(nn.Module):
    @staticmethod
    @functools.lru_cache
    def inherited(width: int) -> torch.Tensor:
        return torch.ones(width)


class Remembers(Base):
    def __init__(self) -> None:
        super().__init__()
        self.own = functools.lru_cache(maxsize=4)(torch.ones)

    @wrapped
    def hidden(self, width: int) -> torch.Tensor:
        return torch.ones(width)


def test_memos_of_classes_modules_and_files_are_found_and_emptied() -> None:
    model = nn.Sequential(Remembers(), nn.Linear(2, 2))
    memory = model[0]
    calls: list[Callable[[int], torch.Tensor]] = [memory.own, memory.hidden, memory.inherited, table]
    first = [call(2) for call in calls]
    assert all(call(2) is made for call, made in zip(calls, first, strict=True))
    memos = memos_of(model)
    assert len(memos) == 4
    forget(memos)
    assert all(call(2) is not made for call, made in zip(calls, first, strict=True))


def test_a_model_of_torchs_own_layers_has_none() -> None:
    assert memos_of(nn.Sequential(nn.Linear(2, 2), nn.TransformerEncoderLayer(4, 2))) == ()
