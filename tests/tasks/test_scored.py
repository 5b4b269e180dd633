"""Scores: finite figures, and who counts as a task that is scored."""

from __future__ import annotations

import math

import pytest

from shardwise.errors import ConfigError
from shardwise.tasks import RandomTokens, Score, Scored


def test_a_score_has_finite_figures() -> None:
    assert Score(figures={"f1": 0.5}, report="table").figures == {"f1": 0.5}
    with pytest.raises(ConfigError, match="a figure is a finite number, but f1 is nan"):
        Score(figures={"f1": math.nan})


def test_a_task_without_answers_is_not_scored() -> None:
    assert not isinstance(RandomTokens(), Scored)
